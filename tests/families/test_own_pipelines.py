"""Compare each family of flow matching models with its own pipeline: prompts, gradients, predictions, latents, a whole run."""

import functools
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from helpers import differing, family_batch, states
from tiny_modern import CALLS, PIPELINES, VARIANTS, encode
from tiny_pipelines import fresh_copy

from diffusers_dti import DTITrainer
from diffusers_dti.families import Batch, find_family
from diffusers_dti.pipeline.text_encoders import find_text_encoders
from diffusers_dti.training.trainable import TrainableRows

PROMPTS = ["a photo of a <dog> on the beach near the red tower", "a <dog>", "a cat and a <dog>, <dog>"]


@pytest.fixture(params=PIPELINES)
def pipe(request, modern):
    return fresh_copy(modern(request.param))


def encode_in_training(pipe, prompts):
    """Return the states of each prompt's real tokens, and the pooled ones."""
    conditioning = find_family(pipe).encode_prompts(prompts, [0] * len(prompts))
    context = conditioning["context"]
    mask = conditioning.get("mask", torch.ones(context.shape[:2]))
    pooled = [conditioning["pooled"]] if "pooled" in conditioning else []
    return [states[own > 0] for states, own in zip(context, mask)] + pooled


def swap_in(pipe, concept, stack):
    """Swap in a concept's rows until the stack closes, and return them by component."""
    rows = {}
    for component, encoder in find_text_encoders(pipe).items():
        rows[component] = TrainableRows(encoder.token_ids("<dog>"), concept.directions[component], concept.scales[component])
        stack.enter_context(rows[component].swapped_in(encoder))
    return rows


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("vectors", [1, 3])
def test_prompts_and_their_gradients(pipe, vectors, concept):
    """The conditioning and a direction's gradient in training are those of the pipeline's `encode_prompt`."""
    made = concept(pipe, vectors=vectors)
    pipe.load_directional_inversion(made)
    results = []
    for how in (encode, encode_in_training):
        with ExitStack() as stack:
            rows = swap_in(pipe, made, stack)
            states = how(pipe, list(PROMPTS))
        weights = [torch.randn(s.shape, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(states)]
        sum((s * w).sum() for s, w in zip(states, weights)).backward()
        results.append((states, {component: own.direction.grad for component, own in rows.items()}))
    (theirs, their_gradients), (ours, our_gradients) = results
    assert [s.shape for s in ours] == [s.shape for s in theirs]
    differences = [relative(a, b) for a, b in zip(ours, theirs)]
    differences += [relative(our_gradients[c], g) for c, g in their_gradients.items()]
    print(f"{type(pipe).__name__}, {vectors} vectors: states and gradients differ by {max(differences):.1e}")
    assert max(differences) < 1e-5 and all(g.norm() > 0 for g in their_gradients.values())


def test_rows_in_training_are_rows_in_the_table(pipe, concept):
    """A prompt has the same states with rows swapped in and with the concept loaded."""
    made, other = concept(pipe), concept(pipe, seed=1)
    pipe.load_directional_inversion(made)
    loaded = encode(pipe, list(PROMPTS))
    pipe.unload_directional_inversion()
    pipe.load_directional_inversion(other)
    with ExitStack() as stack:
        swap_in(pipe, made, stack)
        swapped = encode_in_training(pipe, PROMPTS)
    for a, b in zip(swapped, loaded):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_prediction_is_what_the_sampler_gets(pipe, monkeypatch):
    """On the pipeline's own noisy latents, at its own noise level: also the sign, the scale of time and the packing."""
    family, seen = find_family(pipe), {}
    name = type(pipe).__name__
    step = type(pipe.scheduler).step

    def note(self, output, timestep, sample, **kwargs):
        seen.update(output=output, sigma=float(timestep) / 1000, sample=sample)
        return step(self, output, timestep, sample, **kwargs)

    monkeypatch.setattr(type(pipe.scheduler), "step", note)
    with torch.no_grad():
        size = 16 * pipe.vae_scale_factor
        settings = {"height": size, "width": size, "output_type": "latent", "num_inference_steps": 3} | CALLS[name]
        pipe(prompt="a dog on the beach", generator=torch.Generator().manual_seed(0), **settings)
    latents = unpacked(pipe, seen["sample"])
    batch = Batch(latents, latents, None, torch.zeros(1), [], [], [], (32, 32), [])
    monkeypatch.setattr(family, "noisy_latents", lambda batch: (batch.latents, torch.tensor([seen["sigma"]])))
    prediction = family.predict(batch, family.encode_prompts(["a dog on the beach"], [0]))
    torch.testing.assert_close(prediction, unpacked(pipe, seen["output"]), rtol=1e-4, atol=1e-5)


SHIFTS = {
    "ZImagePipeline": 3.0,
    "Lumina2Pipeline": 6.0,
    "StableDiffusion3Pipeline": 3.0,
}  # the others' depend on the resolution


@torch.no_grad()
def test_the_loss_is_the_written_one(pipe, monkeypatch):
    """In float64, with and without masks: mean w (prediction - (noise - latents))² at sigma = shift s / (1 + (shift - 1) s)."""
    family, other = find_family(pipe), find_family(pipe)
    monkeypatch.setattr(type(family), "text_length", 160)  # shorter padding, for speed
    batch, shift = family_batch(pipe), SHIFTS.get(type(pipe).__name__, 1.0)
    conditioning = family.encode_prompts(batch.prompts, batch.zero_pads)
    s = (1000 - batch.timesteps.double()) / 1000
    sigma = shift * s / (1 + (shift - 1) * s)
    at = sigma.view(-1, 1, 1, 1)
    noisy = (1 - at) * batch.latents + at * batch.noise
    # As in the test above, where this is what the sampler gets.
    monkeypatch.setattr(other, "noisy_latents", lambda batch: (noisy.float(), sigma.float()))
    errors = (other.predict(batch, conditioning).double() - (batch.noise.double() - batch.latents)).square()
    weights = torch.rand(2, 1, *noisy.shape[-2:], generator=torch.Generator().manual_seed(0)) * 2
    for w in (None, weights):
        expected = (errors if w is None else w * errors).mean((1, 2, 3))
        masked = replace(batch, weights=w)
        torch.testing.assert_close(family.sample_losses(masked, conditioning).double(), expected, rtol=1e-5, atol=0)
        assert family.loss(masked, conditioning).item() == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_trained_as_their_own_pipelines(name, modern, photos, concept, monkeypatch):
    """FLUX.1 schnell has no input for guidance, and Stable Diffusion 3 works without T5."""
    pipe = fresh_copy(modern(name))
    test_prompts_and_their_gradients(pipe, 1, concept)
    pipe.unload_directional_inversion()
    with monkeypatch.context() as patch:
        test_the_prediction_is_what_the_sampler_gets(pipe, patch)
    monkeypatch.setattr(type(find_family(pipe)), "text_length", 160)
    learned = DTITrainer(pipe, placeholder_token="<dog>", initializer_token="dog", resolution=32, max_train_steps=1).fit(photos)
    assert set(learned.directions) == {"text_encoder", "text_encoder_2"}


def unpacked(pipe, latents):
    """Return latents as (n, c, h, w), also of a pipeline that hands them to its sampler as a sequence of patches."""
    name, scale = type(pipe).__name__, pipe.vae_scale_factor
    if latents.ndim == 4:
        return latents
    if name == "Flux2KleinPipeline":
        return pipe._unpack_latents_with_ids(latents, pipe._prepare_latent_ids(torch.empty(1, 1, 8, 8)))
    return pipe._unpack_latents(latents, 16 * scale, 16 * scale, scale).view(1, 4, 16, 16)


def packed(pipe, latents):
    """Return latents as the pipeline's loop holds them."""
    if not hasattr(pipe, "_pack_latents"):
        return latents
    shape = () if type(pipe).__name__ == "Flux2KleinPipeline" else latents.shape
    return pipe._pack_latents(latents, *shape)


@torch.no_grad()
def test_latents_decode_as_the_pipeline_decodes_its_own(pipe, monkeypatch):
    """A photo that we encode and the pipeline decodes is the VAE's reconstruction of it."""
    side = 16 * pipe.vae_scale_factor
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ((latents, std),) = find_family(pipe).encode_images(pixels)
    video = type(pipe).__name__ == "QwenImagePipeline"
    posterior = pipe.vae.encode(pixels[:, :, None] if video else pixels).latent_dist
    expected = pipe.vae.decode(posterior.mode()).sample
    expected = expected[:, :, 0] if video else expected
    monkeypatch.setattr(type(pipe.scheduler), "step", lambda self, output, t, sample, **kwargs: (packed(pipe, latents),))
    settings = {"height": side, "width": side, "output_type": "pt", "num_inference_steps": 1} | CALLS[type(pipe).__name__]
    image = pipe(prompt="a dog", **settings).images
    torch.testing.assert_close(image, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-3)
    if std.any():  # where samples are drawn, in units of the VAE they are as spread as its own
        assert (std / latents.std(dim=(2, 3), keepdim=True)).mean().item() == pytest.approx(
            (posterior.std / posterior.mean.std(dim=(-2, -1), keepdim=True)).mean().item(), rel=1e-4
        )


def test_a_word_is_learned(pipe, photos, tmp_path, monkeypatch):
    """The loss on held-out draws falls; what is learned is saved, loads again, and is unloaded without a trace."""
    family, before = type(find_family(pipe)), states(pipe)
    monkeypatch.setattr(family, "text_length", 160)  # shorter padding, for speed
    settings = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "train_batch_size": 2}
    settings |= {"gradient_accumulation_steps": 1, "max_train_steps": 8, "learning_rate": 0.1, "scale_lr": False}
    trainer = DTITrainer(pipe, **settings, output_dir=tmp_path / "dog", heldout_loss_steps=4)
    learned = trainer.fit(photos)
    heldout = [entry["heldout_loss"] for entry in trainer.history if "heldout_loss" in entry]
    assert heldout[-1] < heldout[0] and learned.metadata["family"] == family.name
    with torch.no_grad():
        now = encode(pipe, ["a <dog>"])
        pipe.unload_directional_inversion()
        # The encoders' first call leaves attributes and hooks of transformers.
        assert not [k for k in differing(states(pipe), before) if "attributes" not in k and "modules" not in k]
        pipe.load_directional_inversion(str(tmp_path / "dog"))
        for a, b in zip(encode(pipe, ["a <dog>"]), now):
            torch.testing.assert_close(a, b)


def test_settings_work_together(pipe, photos, tmp_path, monkeypatch):
    """The trainer's own word, two vectors, validation images, and an adapter that stock diffusers loads."""
    family, call = type(find_family(pipe)), type(pipe).__call__
    monkeypatch.setattr(family, "text_length", 160)
    quick = CALLS[type(pipe).__name__] | {"num_inference_steps": 1}
    generate = functools.wraps(call)(lambda *args, **kwargs: call(*args, **kwargs | quick))
    monkeypatch.setattr(type(pipe), "__call__", generate)
    word = "dog" if "Klein" in type(pipe).__name__ else "auto"  # with 28 layers, the search takes long
    settings = {"placeholder_token": "<dog>", "initializer_token": word, "num_vectors": 2, "resolution": 32}
    settings |= {"adapter": "lora", "adapter_learning_rate": 0.1, "validation_prompt": "a {}"}
    trainer = DTITrainer(pipe, **settings, train_batch_size=1, max_train_steps=2, output_dir=tmp_path)
    learned = trainer.fit(photos[:1])
    assert learned.num_vectors == 2 and len(trainer.validation_images[2]) == 1
    batch = family_batch(pipe, prompts=["a <dog>"] * 2)

    @torch.no_grad()
    def prediction():
        bound = find_family(pipe)
        return bound.predict(batch, bound.encode_prompts(batch.prompts, batch.zero_pads))

    trained = prediction()
    pipe.unload_lora_weights()
    plain = prediction()
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(prediction(), trained, rtol=1e-4, atol=1e-5)
    assert relative(plain, trained) > 1e-4
