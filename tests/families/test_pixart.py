"""Compare PixArt-α and PixArt-Σ with their own pipelines."""

from contextlib import ExitStack

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from helpers import differing, family_batch, states
from tiny_pipelines import build_vae, t5_encoder, t5_tokenizer

from diffusers_dti import DTITrainer
from diffusers_dti.families import Batch, find_family
from diffusers_dti.families.pixart import PixArt
from diffusers_dti.pipeline.text_encoders import find_text_encoders
from diffusers_dti.training.trainable import TrainableRows

PROMPTS = [" A photo of a <dog> on the beach", "a <dog>"]


@pytest.fixture(params=["alpha", "sigma"])
def pipe(request, tmp_path):
    """Build a small pipeline. α is told the size of images, as the released model for 1024 pixels is."""
    alpha = request.param == "alpha"
    torch.manual_seed(8)
    tokenizer = t5_tokenizer(tmp_path / "t5")
    # The latents' side in α's configuration is what its pipeline goes by.
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=48,
        sample_size=128 if alpha else 64, patch_size=2, caption_channels=16, use_additional_conditions=alpha,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    cls = PixArtAlphaPipeline if alpha else PixArtSigmaPipeline
    made = cls(tokenizer, t5_encoder(tokenizer, 16), build_vae(), transformer.eval(), scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def encode(pipe, prompts):
    """Return the states of each prompt's real tokens, as the pipeline encodes them."""
    context, mask, *_ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device="cpu")
    return [states[own > 0] for states, own in zip(context, mask)]


def encode_in_training(pipe, prompts):
    conditioning = find_family(pipe).encode_prompts(prompts, [0] * len(prompts))
    return [states[own > 0] for states, own in zip(conditioning["context"], conditioning["mask"])]


def test_prompts_and_their_gradients(pipe, concept):
    family, made = find_family(pipe), concept(pipe)
    assert type(family) is PixArt and family.text_length == (120 if "Alpha" in type(pipe).__name__ else 300)
    pipe.load_directional_inversion(made)
    (component, encoder), results = *find_text_encoders(pipe).items(), []
    for how in (encode, encode_in_training):
        rows = TrainableRows(encoder.token_ids("<dog>"), made.directions[component], made.scales[component])
        with ExitStack() as stack:
            stack.enter_context(rows.swapped_in(encoder))
            encoded = how(pipe, PROMPTS)
        sum((s * torch.linspace(-1, 1, s.numel()).view_as(s)).sum() for s in encoded).backward()
        results.append([*encoded, rows.direction.grad])
    for ours, its in zip(*results, strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_prediction_is_what_the_sampler_gets(pipe, monkeypatch):
    """Also the loss, written in float64: mean w (prediction - noise)² of latents that the formula makes noisy."""
    family, seen = find_family(pipe), {}
    step = type(pipe.scheduler).step

    def note(self, output, timestep, sample, **kwargs):
        seen.update(output=output, timestep=timestep, sample=sample)
        return step(self, output, timestep, sample, **kwargs)

    monkeypatch.setattr(type(pipe.scheduler), "step", note)
    size = {"height": 32, "width": 64, "use_resolution_binning": False, "clean_caption": False}
    pipe("a dog on the beach", **size, guidance_scale=1.0, num_inference_steps=2, output_type="latent")
    batch = Batch(seen["sample"], seen["sample"], None, seen["timestep"][None], [], [], [], (32, 64), [])
    monkeypatch.setattr(family, "noisy_latents", lambda batch: batch.latents)
    conditioning = family.encode_prompts(["a dog on the beach"], [0])
    torch.testing.assert_close(family.predict(batch, conditioning), seen["output"], rtol=1e-4, atol=1e-5)

    batch = family_batch(pipe)
    conditioning = family.encode_prompts(batch.prompts, batch.zero_pads)
    kept = (1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)).cumprod(0)[batch.timesteps].view(-1, 1, 1, 1)
    noisy = (kept.sqrt() * batch.latents + (1 - kept).sqrt() * batch.noise).float()
    monkeypatch.setattr(family, "noisy_latents", lambda batch: noisy)
    expected = (family.predict(batch, conditioning).double() - batch.noise).square().mean()
    assert find_family(pipe).loss(batch, conditioning).item() == pytest.approx(expected.item(), rel=1e-5)


@torch.no_grad()
def test_latents_decode_as_the_pipeline_decodes_its_own(pipe, monkeypatch):
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ((latents, _),) = find_family(pipe).encode_images(pixels)
    expected = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
    monkeypatch.setattr(type(pipe.scheduler), "step", lambda *args, **kwargs: (latents, latents))
    size = {"height": 32, "width": 32, "use_resolution_binning": False, "clean_caption": False}
    image = pipe("a dog", **size, num_inference_steps=1, output_type="pt").images
    torch.testing.assert_close(image, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-3)


def test_a_word_is_learned(pipe, photos, tmp_path):
    """The loss on held-out draws falls; what is learned is drawn, saved, loads again, and is unloaded without a trace."""
    before = states(pipe)
    settings = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "train_batch_size": 2}
    settings |= {"gradient_accumulation_steps": 1, "max_train_steps": 8, "learning_rate": 0.1, "scale_lr": False}
    settings |= {"validation_prompt": "a {}", "output_dir": tmp_path / "dog", "heldout_loss_steps": 4}
    trainer = DTITrainer(pipe, **settings)
    learned = trainer.fit(photos)
    heldout = [entry["heldout_loss"] for entry in trainer.history if "heldout_loss" in entry]
    assert heldout[-1] < heldout[0] and learned.metadata["family"] == "PixArt" and len(trainer.validation_images[8]) == 1
    with torch.no_grad():
        now = encode(pipe, ["a <dog>"])
        pipe.unload_directional_inversion()
        assert not [k for k in differing(states(pipe), before) if "attributes" not in k and "modules" not in k]
        pipe.load_directional_inversion(str(tmp_path / "dog"))
        for a, b in zip(encode(pipe, ["a <dog>"]), now):
            torch.testing.assert_close(a, b)
