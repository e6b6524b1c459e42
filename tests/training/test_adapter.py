"""Adapters trained with the token: what stock diffusers makes of their files, and what is left behind."""

import subprocess
import sys

import pytest
import torch
from helpers import everything, same
from safetensors.torch import load_file
from tiny_pipelines import generate

from diffusers_dti import DTITrainer
from diffusers_dti.training.adapter import Adapter

SETTINGS = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "train_batch_size": 1}
FILE = "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("method", ["dco", "oft"])
def test_stock_diffusers_generates_the_same_image(sdxl, photos, tmp_path, method):
    """T19: in a process that never imports this package."""
    sdxl.save_pretrained(tmp_path / "pipe")
    settings = SETTINGS | {"max_train_steps": 4, "adapter_learning_rate": 1e-2, "pooling": "legacy"}
    DTITrainer(sdxl, **settings, method=method, output_dir=tmp_path / "dog").fit(photos)
    token_alone = generate(sdxl, "a dog on the beach")
    picture = generate(sdxl, "a <dog> on the beach")
    script = """
import sys, torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
folder = sys.argv[1]
pipe = StableDiffusionXLPipeline.from_pretrained(f"{folder}/pipe", add_watermarker=False)
for file, parts in (("learned_embeds", (pipe.text_encoder, pipe.tokenizer)),
                    ("learned_embeds_2", (pipe.text_encoder_2, pipe.tokenizer_2))):
    pipe.load_textual_inversion(f"{folder}/dog/{file}.safetensors", text_encoder=parts[0], tokenizer=parts[1])
pipe.load_lora_weights(f"{folder}/dog", weight_name="pytorch_lora_weights.safetensors")
assert "diffusers_dti" not in sys.modules
out = pipe("a <dog> on the beach", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np",
           height=16, width=16).images
torch.save(torch.from_numpy(out), f"{folder}/picture.pt")
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, stdout=subprocess.DEVNULL)
    stock = torch.load(tmp_path / "picture.pt")
    difference = (stock - picture).abs().max().item()
    print(f"{method}: reloaded by stock diffusers, greatest difference of a pixel {difference:.1e}")
    # OFT is written as a LoRA of as many ranks as it takes
    assert difference <= {"dco": 1e-5, "oft": 1e-4}[method]
    sdxl.unload_lora_weights()
    assert (generate(sdxl, "a <dog> on the beach") - picture).abs().max() > 1e-3  # the adapter does something
    assert not torch.equal(generate(sdxl, "a dog on the beach"), token_alone)


def test_oft_as_a_lora_is_the_same_change(sdxl):
    """Against the layers' own output, in float64 where the layer allows."""
    adapter = Adapter(sdxl, "unet", "oft", 4, "<dog>", 0)
    for p in adapter.parameters.values():
        p.data.normal_(0, 0.05)
    state = adapter._as_lora()
    for path, layer in sdxl.unet.named_modules():
        if hasattr(layer, "oft_R"):
            one = torch.eye(layer.in_features)
            with torch.no_grad():
                change = layer(one) - layer.base_layer(one)
            found = (state[f"{path}.lora.up.weight"] @ state[f"{path}.lora.down.weight"]).T
            assert (found - change).norm() <= 2e-3 * change.norm()
            assert change.norm() > 0.01


def test_the_pipeline_gets_the_adapter_and_gives_it_back(sdxl, photos):
    sdxl.encode_prompt("a dog")
    before, picture = everything(sdxl), generate(sdxl, "a dog")
    trainer = DTITrainer(sdxl, **SETTINGS, adapter="lora", max_train_steps=3, adapter_learning_rate=1e-2)
    trainer.fit(photos)
    assert list(sdxl.unet.peft_config) == ["dti_dog"] and not torch.equal(generate(sdxl, "a dog"), picture)
    assert not any(p.requires_grad for p in trainer.adapter.parameters.values())
    with pytest.raises(ValueError, match=r"has adapters loaded \(dti_dog\).*unload_lora_weights"):
        DTITrainer(sdxl, **SETTINGS | {"placeholder_token": "<cat>"}, method="dco")
    sdxl.unload_lora_weights()
    sdxl.unload_directional_inversion()
    assert same(everything(sdxl), before) and torch.equal(generate(sdxl, "a dog"), picture)


def test_a_failing_step_takes_the_adapter_out(sdxl, photos):
    sdxl.encode_prompt("a dog")
    before, picture = everything(sdxl), generate(sdxl, "a dog")

    def failing(trainer, step):
        if step == 2:
            raise RuntimeError("at step 2")

    with pytest.raises(RuntimeError, match="at step 2"):
        DTITrainer(sdxl, **SETTINGS, method="dco").fit(photos, callback_on_step_end=failing)
    assert same(everything(sdxl), before) and torch.equal(generate(sdxl, "a dog"), picture)
    assert not getattr(sdxl.unet, "peft_config", None)


@pytest.mark.parametrize("method", ["dco", "oft"])
def test_an_interrupted_run_can_still_be_saved(sdxl, photos, tmp_path, method):
    def interrupt(trainer, step):
        if step == 3:
            raise KeyboardInterrupt

    trainer = DTITrainer(sdxl, **SETTINGS, method=method)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(photos, callback_on_step_end=interrupt)
    trainer.save_pretrained(tmp_path)
    assert load_file(tmp_path / FILE) and (tmp_path / "learned_embeds_2.safetensors").is_file()


def test_under_sequential_offload(sdxl, photos, tmp_path):
    """Where after training the weights are on the meta device."""
    sdxl.enable_sequential_cpu_offload(device="cpu")
    trainer = DTITrainer(sdxl, **SETTINGS, method="dco", max_train_steps=3, output_dir=tmp_path)
    trainer.fit(photos)
    state = load_file(tmp_path / FILE)
    assert any(v.any() for k, v in state.items() if ".up." in k or "lora_B" in k)


def test_words_that_are_methods_of_modules(sdxl, photos):
    settings = SETTINGS | {"placeholder_token": "<train>"}
    DTITrainer(sdxl, **settings, adapter="lora", max_train_steps=2).fit(photos)
    assert list(sdxl.unet.peft_config) == ["dti_train"]


def test_one_trainer_after_the_other(sdxl, photos):
    """The second one finds the first one's adapter, says so, and leaves it alone."""
    first, second = (
        DTITrainer(sdxl, **SETTINGS | {"placeholder_token": word}, method="dco", max_train_steps=2) for word in ("<a>", "<b>")
    )
    first.fit(photos)
    picture = generate(sdxl, "a <a>")
    with pytest.raises(ValueError, match="has adapters loaded"):
        second.fit(photos)
    assert torch.equal(generate(sdxl, "a <a>"), picture) and list(sdxl.directional_inversions) == ["<a>"]


def test_the_adapter_joins_in_at_its_step(sdxl, photos):
    states = {}

    def keep(trainer, step):
        states[step] = {k: p.detach().clone() for k, p in trainer.adapter.parameters.items()}

    trainer = DTITrainer(sdxl, **SETTINGS, adapter="lora", adapter_start_step=2, max_train_steps=4)
    trainer.fit(photos, callback_on_step_end=keep)
    up = next(k for k in states[1] if "lora_B" in k)
    assert not states[2][up].any() and states[3][up].any() and not torch.equal(states[3][up], states[4][up])


@pytest.mark.parametrize("rate", [1e-4, 3e-3])
def test_the_adapter_learns_at_its_own_rate(sdxl, photos, rate):
    """AdamW's first step is one rate long; neither `learning_rate` nor `scale_lr` plays a part."""
    settings = SETTINGS | {"train_batch_size": 3, "learning_rate": 0.02, "adapter_learning_rate": rate}
    trainer = DTITrainer(sdxl, **settings, adapter="lora", adapter_start_step=0, max_train_steps=1)
    trainer.fit(photos)
    moved = torch.cat([p.detach().abs().flatten() for name, p in trainer.adapter.parameters.items() if "lora_B" in name])
    assert moved.max().item() == pytest.approx(rate, rel=1e-3)  # they start at zero
    assert moved.median().item() == pytest.approx(rate, rel=0.1)


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644)])
def test_the_umask_decides_who_may_read_the_adapter(sdxl, tmp_path, umask, mode, set_umask):
    set_umask(umask)
    adapter = Adapter(sdxl, "unet", "lora", 4, "<dog>", 0)
    adapter.keep()
    adapter.save(tmp_path / "new" / "folder")
    (file,) = (tmp_path / "new" / "folder").iterdir()
    assert file.name == FILE and file.stat().st_mode & 0o777 == mode


def test_off_is_the_denoiser_without_it(sdxl):
    picture = generate(sdxl, "a dog")
    adapter = Adapter(sdxl, "unet", "lora", 4, "<dog>", 0)
    assert torch.equal(generate(sdxl, "a dog"), picture)  # it begins as no change
    for p in adapter.parameters.values():
        p.data.normal_()
    adapter.train(False)
    with adapter.off():
        assert torch.equal(generate(sdxl, "a dog"), picture)
    assert not torch.equal(generate(sdxl, "a dog"), picture)
    assert not any(p.requires_grad for p in adapter.parameters.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_keeps_the_adapter_in_float32(sdxl, photos, dtype):
    sdxl.to(dtype)
    trainer = DTITrainer(sdxl, **SETTINGS, method="dco", max_train_steps=3)
    trainer.fit(photos)
    assert {p.dtype for p in trainer.adapter.parameters.values()} == {torch.float32}
    assert any(p.any() for k, p in trainer.adapter.parameters.items() if "lora_B" in k)


@pytest.mark.parametrize("adapter", ["lora", "oft"])
def test_on_every_family(pipe, photos, tmp_path, adapter):
    trainer = DTITrainer(pipe, **SETTINGS, adapter=adapter, max_train_steps=2)
    trainer.fit(photos)
    trainer.save_pretrained(tmp_path)
    component = trainer.family.denoisers[0]
    state = load_file(tmp_path / FILE)
    assert state and all(k.startswith(f"{component}.") and "lora" in k for k in state)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path, weight_name=FILE)
    assert len(getattr(pipe, component).peft_config) == 1


def test_two_denoisers_take_no_adapter(wan22):
    with pytest.raises(ValueError, match="trained in one model, and WanPipeline has transformer and transformer_2"):
        DTITrainer(wan22, **SETTINGS, adapter="lora")
