"""The pipeline while it is trained, and after it."""

import diffusers
import pytest
import torch
import transformers
from helpers import hooks
from tiny_pipelines import fresh_copy
from torch.nn import Module

from diffusers_dti import DTIConfig, DTITrainer
from diffusers_dti.families import find_family
from diffusers_dti.training.frozen import frozen, gradient_checkpointing


def flags(pipe):
    """Each module's mode and each parameter's need for a gradient."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    modes = {f"{name}.{path}": m.training for name, part in modules.items() for path, m in part.named_modules()}
    gradients = {f"{name}.{path}": p.requires_grad for name, part in modules.items() for path, p in part.named_parameters()}
    return modes, gradients


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_frozen_and_comes_back(pipe, fails):
    pipe.components["vae"].train()
    next(pipe.components["text_encoder"].parameters()).requires_grad_(False)
    before = flags(pipe)
    assert True in before[0].values() and {True, False} <= set(before[1].values())
    try:
        with frozen(find_family(pipe)):
            inside = flags(pipe)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert not any(inside[0].values()) and not any(inside[1].values())
    assert flags(pipe) == before


def test_dropout_is_off(wan):
    """UMT5 has some, and after `train()` it would act."""
    encoder = wan.text_encoder.train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert not torch.equal(encoder(ids).last_hidden_state, encoder(ids).last_hidden_state)
        with frozen(find_family(wan)):
            assert torch.equal(encoder(ids).last_hidden_state, encoder(ids).last_hidden_state)


def test_offloading_is_off_meanwhile(sdxl):
    sdxl.enable_sequential_cpu_offload(device="cpu")
    before = hooks(sdxl)
    assert any(before.values())
    with frozen(find_family(sdxl)):
        assert not any(part for part in hooks(sdxl).values() if any(h[1] != "NoneType" for h in part))
        assert {p.device.type for p in sdxl.unet.parameters()} == {"cpu"}
    assert hooks(sdxl) == before


class Places:
    """Pretend that there is a second device, "cpu:0", and list which models go where."""

    def __init__(self, pipe, monkeypatch, home="cpu"):
        self.names = {id(m): name for name, m in pipe.components.items() if isinstance(m, Module)}
        self.where = dict.fromkeys(self.names.values(), torch.device(home))
        self.moves = []
        for kind in (diffusers.ModelMixin, transformers.PreTrainedModel):
            real = kind.to
            monkeypatch.setattr(kind, "device", property(lambda model: self.where[self.names[id(model)]]))
            monkeypatch.setattr(kind, "to", lambda model, *args, real=real, **kwargs: self.move(model, real, args, kwargs))

    def move(self, model, real, args, kwargs):
        device = args[0] if args else kwargs.get("device")
        if isinstance(device, torch.device | str):
            name, device = self.names[id(model)], torch.device(device)
            if device != self.where[name]:
                self.moves.append((name, str(device)))
            self.where[name] = device
        return real(model, *args, **kwargs)


def test_the_order_of_moves_under_model_offload(sdxl, photos, monkeypatch):
    """The VAE is alone on the device while it encodes, and comes back for validation images only."""
    sdxl.enable_model_cpu_offload(device="cpu")
    places = Places(sdxl, monkeypatch)
    at_steps = []
    trainer = DTITrainer(
        sdxl, placeholder_token="<dog>", initializer_token="dog", resolution=16, max_train_steps=2, validation_prompt="a {}"
    )
    trainer.fit(photos, callback_on_step_end=lambda t, step: at_steps.append(dict(places.where)))
    alone, trained = [("vae", "cpu:0"), ("vae", "cpu")], ["unet", "text_encoder", "text_encoder_2"]
    come, leave = [(name, "cpu:0") for name in trained], [(name, "cpu") for name in reversed(trained)]
    assert places.moves == [*alone, *come, *alone, *leave]  # the second time for the images
    for where in at_steps:
        assert where == {"vae": torch.device("cpu"), **dict.fromkeys(trained, torch.device("cpu:0"))}


@pytest.mark.parametrize("fails", [False, True])
def test_only_the_vae_leaves_without_offload(sdxl, photos, monkeypatch, fails):
    places = Places(sdxl, monkeypatch, home="cpu:0")
    monkeypatch.setattr(type(sdxl), "_execution_device", torch.device("cpu:0"))
    try:
        with frozen(find_family(sdxl)):
            inside = dict(places.where)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert [name for name, device in inside.items() if device == torch.device("cpu")] == ["vae"]
    assert places.moves == [("vae", "cpu"), ("vae", "cpu:0")]


@pytest.mark.parametrize("fails", [False, True])
def test_gradient_checkpointing_is_temporary(sdxl, fails):
    try:
        with gradient_checkpointing(find_family(sdxl), DTIConfig(gradient_checkpointing=True)):
            assert sdxl.unet.is_gradient_checkpointing
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert not sdxl.unet.is_gradient_checkpointing


def test_gradient_checkpointing_that_was_on_stays_on(sdxl):
    sdxl.unet.enable_gradient_checkpointing()
    for enabled in (True, False):
        with gradient_checkpointing(find_family(sdxl), DTIConfig(gradient_checkpointing=enabled)):
            assert sdxl.unet.is_gradient_checkpointing
        assert sdxl.unet.is_gradient_checkpointing
    sdxl.unet.disable_gradient_checkpointing()
    with gradient_checkpointing(find_family(sdxl), DTIConfig()):
        assert not sdxl.unet.is_gradient_checkpointing


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_gradient_checkpointing_of_every_nth_part(wan, photos, monkeypatch, interval):
    """Those parts run twice, and what is learned is the same."""
    settings = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "max_train_steps": 1}
    settings |= {"gradient_accumulation_steps": 1, "heldout_loss_steps": 0}
    expected = DTITrainer(fresh_copy(wan), **settings).fit(photos)
    runs = []
    for number, block in enumerate(wan.transformer.blocks):
        block.register_forward_pre_hook(lambda module, args, number=number: runs.append(number))
    made = DTITrainer(wan, **settings, gradient_checkpointing=True, gradient_checkpointing_interval=interval).fit(photos)
    assert torch.equal(made.embeddings["text_encoder"], expected.embeddings["text_encoder"])
    assert runs == ([0, 1, 1, 0] if interval == 1 else [0, 1, 0])
