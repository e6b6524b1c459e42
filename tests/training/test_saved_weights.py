"""Training under group offloading. On a CPU both devices are the CPU: the tests pretend which memory is the device's."""

import weakref

import diffusers
import pytest
import torch
from diffusers.hooks import group_offloading
from helpers import differing, states
from packaging.version import Version
from tiny_modern import PIPELINES as MODERN
from tiny_pipelines import fresh_copy
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_dti import DTITrainer
from diffusers_dti.families.stable_diffusion import StableDiffusion
from diffusers_dti.training import saved_weights

pytestmark = pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.38"), reason="diffusers needs an accelerator for group offloading"
)
CPU = torch.device("cpu")
TRAINED = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
SETTINGS = {
    "placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "max_train_steps": 2, "train_batch_size": 1,
    "gradient_accumulation_steps": 1, "heldout_loss_steps": 0,
}  # fmt: skip
KINDS = {
    "leaf": {"offload_type": "leaf_level"},
    "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "two blocks": {"offload_type": "block_level", "num_blocks_per_group": 2},
}


class Device(TorchDispatchMode):
    """Give every weight that is loaded memory of its own. What is not there cannot be computed with, and what is there counts.

    Attributes:
        misplaced: the operations that read a weight at home.
        peak: the most bytes of weights that were on the device at once.
    """

    def __init__(self, pipe, monkeypatch):
        super().__init__()
        self.misplaced, self.peak, self.copies, self.home = [], 0, [], {}
        trained = [pipe.components.get(n) for n in TRAINED]
        self.weights = [p for model in trained if model is not None for p in model.parameters()]
        self.total = sum(p.nbytes for p in self.weights)
        monkeypatch.setattr(group_offloading.ModuleGroup, "_onload_from_memory", lambda group: self.move(group, True))
        monkeypatch.setattr(group_offloading.ModuleGroup, "_offload_to_memory", lambda group: self.move(group, False))
        monkeypatch.setattr(saved_weights, "fetch", lambda data, device, dtype: self.copy(data))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads = not any(value.alias_info for value in func._schema.returns)  # no view, and nothing in place
        at_home = {p.data_ptr() for p in self.weights if p not in self.home}
        if reads and any(isinstance(a, torch.Tensor) and a.data_ptr() in at_home for a in args):
            self.misplaced.append(func.name())
        return func(*args, **(kwargs or {}))

    def move(self, group, loads):
        tensors = [t for module in group.modules for t in (*module.parameters(), *module.buffers())]
        for tensor in (*tensors, *group.parameters, *group.buffers):
            if loads and tensor not in self.home:
                self.home[tensor] = tensor.data
                tensor.data = self.copy(tensor.data)
            elif not loads and tensor in self.home:
                tensor.data = self.home.pop(tensor)

    def copy(self, data):
        array = data.numpy().copy()
        self.copies = [(size, there) for size, there in self.copies if there() is not None]
        self.copies.append((array.nbytes, weakref.ref(array)))
        self.peak = max(self.peak, sum(size for size, _ in self.copies))
        return torch.from_numpy(array)


def offload(pipe, **kind):
    pipe.enable_group_offload(CPU, CPU, exclude_modules=["vae"], **kind)


def offload_hooks(pipe):
    """Return diffusers' hooks on each module, comparable."""
    found = []
    for component in TRAINED:
        model = pipe.components.get(component)
        for name, module in [] if model is None else model.named_modules():
            for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
                found.append((component, name, type(hook).__name__, hook.config.offload_type, len(hook.group.modules)))
    return found


@pytest.mark.parametrize(
    ("family", "kind", "checkpointing"),
    [
        ("sd", "leaf", False), ("sd", "block", True), ("sana", "block", False), ("sana", "leaf", True), ("wan", "leaf", False),
        ("wan", "two blocks", True), ("qwen_image", "block", True), ("z_image", "leaf", False), ("flux", "leaf", True),
        ("sd3", "block", False),
    ],
)  # fmt: skip
def test_the_same_rows_with_the_weights_at_home(family, kind, checkpointing, request, modern, photos, monkeypatch):
    pipe = fresh_copy(modern(family)) if family in MODERN else request.getfixturevalue(family)
    settings = SETTINGS | {"gradient_checkpointing": checkpointing}
    expected = DTITrainer(fresh_copy(pipe), **settings).fit(photos)
    device = Device(pipe, monkeypatch)
    offload(pipe, **KINDS[kind])
    before = offload_hooks(pipe)

    def watch(trainer, step):  # the steps alone: at the start the table's norms are read, which may be at home
        if step == 1:
            device.peak = 0
            device.__enter__()
        else:
            device.__exit__(None, None, None)

    made = DTITrainer(pipe, **settings).fit(photos, callback_on_step_end=watch)
    for component, rows in expected.embeddings.items():
        assert torch.equal(made.embeddings[component], rows)
    assert device.misplaced == []
    largest = max(p.nbytes for p in device.weights)  # Z-Image's first layer for the time, which is not small here
    assert 0 < device.peak < max(1.1 * largest, (0.35 if kind == "leaf" else 0.8) * device.total)
    assert offload_hooks(pipe) == before and not device.home


def test_the_vae_and_validation_images(sd, photos, monkeypatch):
    """Also with the VAE offloaded, and with checkpointing that the user has switched on."""

    def generate(family, prompt, resolution, generator):
        return family.pipe(prompt, num_inference_steps=2, generator=generator).images[0]

    monkeypatch.setattr(StableDiffusion, "generate", generate)
    settings = SETTINGS | {"resolution": 16, "validation_prompt": "a {}", "train_batch_size": 2}
    plain = DTITrainer(fresh_copy(sd), **settings)
    expected = plain.fit(photos)
    own = []

    def checkpoint(module, *args):
        own.append(module)
        return module(*args)

    sd.unet.enable_gradient_checkpointing(checkpoint)
    sd.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    trainer = DTITrainer(sd, **settings)
    made = trainer.fit(photos)
    assert torch.equal(made.embeddings["text_encoder"], expected.embeddings["text_encoder"])
    assert [i.tobytes() for i in trainer.validation_images[2]] == [i.tobytes() for i in plain.validation_images[2]]
    (photo, *_) = trainer.family.encode_images([torch.zeros(3, 16, 16)])
    assert torch.equal(photo[0], plain.family.encode_images([torch.zeros(3, 16, 16)])[0][0])
    assert own == [] and sd.unet.is_gradient_checkpointing
    assert {m._gradient_checkpointing_func for m in sd.unet.modules() if hasattr(m, "gradient_checkpointing")} == {checkpoint}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_interrupted_pass_leaves_no_weight_on_the_device(sd, photos, monkeypatch, checkpointing):
    device = Device(sd, monkeypatch)
    offload(sd, **KINDS["block"])
    before, hooked = states(sd), offload_hooks(sd)
    calls = []

    def interrupt(module, args):
        calls.append(module)
        if len(calls) == 2:  # in the second step, or with checkpointing where the block runs again
            assert bool(device.home) != checkpointing
            raise KeyboardInterrupt

    handle = sd.unet.mid_block.resnets[1].conv2.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        DTITrainer(sd, **SETTINGS, gradient_checkpointing=checkpointing).fit(photos)
    handle.remove()
    assert not device.home and offload_hooks(sd) == hooked and not differing(states(sd), before)


def test_what_comes_next_is_not_loaded_where_a_block_runs_again(sd, monkeypatch):
    """As streams would."""
    offload(sd, **KINDS["leaf"])
    block = sd.unet.requires_grad_(False).mid_block.resnets[0]
    loaded = []
    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", lambda group: loaded.append(group))
    hook, other = (m._diffusers_hook.get_hook("group_offloading") for m in (block.conv2, sd.unet.conv_out))
    hook.next_group = other.group
    other.group.onload_self = False
    inputs = torch.zeros(1, 32, 4, 4), torch.zeros(1, 64)
    block(*inputs)
    assert loaded[-1] is other.group
    loaded.clear()
    weight = block.conv1.weight
    with saved_weights.weights_in_place(block, CPU):
        block(*inputs)
        assert block.conv1.weight is not weight
    assert loaded == [] and block.conv1.weight is weight
    block(*inputs)
    assert loaded[-1] is other.group


def test_weights_on_the_disk_are_refused(sd, photos, tmp_path):
    sd.unet.enable_group_offload(CPU, CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    with pytest.raises(ValueError, match="^The weights of unet are offloaded to the disk.*without `offload_to_disk_path`"):
        DTITrainer(sd, **SETTINGS).fit(photos)


def test_an_adapter_in_an_offloaded_denoiser_is_refused(sd, photos):
    offload(sd, **KINDS["leaf"])
    with pytest.raises(ValueError, match='^The unet is offloaded by groups, .*exclude_modules="unet"'):
        DTITrainer(sd, **SETTINGS, adapter="lora")
