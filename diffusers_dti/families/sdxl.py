"""Stable Diffusion XL: two CLIP encoders, a UNet, the scheduler's own prediction type."""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..data import Batch
from ..offload import in_float32

NAME = "SDXL"

# the authors' settings (paper, appendix; their launchers)
DEFAULTS: dict[str, Any] = {
    "resolution": 768,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_train_steps": 400,
    "kappa": 1e-4,
}


def matches(pipe: Any) -> bool:
    """SDXL and its variants with both encoders: img2img, inpainting with a plain UNet, fine-tunes."""
    parts = pipe.components
    unet = parts.get("unet")
    return (
        unet is not None
        and getattr(unet.config, "addition_embed_type", None) == "text_time"
        and unet.config.in_channels == parts["vae"].config.latent_channels
        and all(parts.get(name) is not None for name in ("text_encoder", "text_encoder_2"))
    )


def training_scheduler(pipe: Any) -> DDPMScheduler:
    """The forward process of the pipeline's scheduler, whatever sampler that is."""
    return DDPMScheduler.from_config(pipe.scheduler.config)


@torch.no_grad()
def encode_images(pipe: Any, crops: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Mean and standard deviation of the scaled latents, (1, c, h, w) float32 on the CPU, of each crop in [-1, 1]."""
    encoded, scale = [], pipe.vae.config.scaling_factor
    with in_float32(pipe.vae):
        for pixels in crops:
            posterior = pipe.vae.encode(pixels[None].to(pipe.vae.device)).latent_dist
            encoded.append(((posterior.mean * scale).cpu(), (posterior.std * scale).cpu()))
    return encoded


def encode_prompts(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Penultimate states of both encoders, (n, 77, 2048), and the second's projected pooled state, (n, 1280)."""
    states = []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        out = encoder(ids.to(encoder.device), output_hidden_states=True)
        states.append(out.hidden_states[-2])
    return {"context": torch.cat(states, -1), "pooled": out.text_embeds}


def loss(pipe: Any, scheduler: DDPMScheduler, batch: Batch, conditioning: dict[str, Tensor]) -> Tensor:
    """Mean squared error of the UNet's prediction, weighted where there are masks; a scalar in float32."""
    unet, latents, noise = pipe.unet, batch.latents, batch.noise
    dtype = unet.dtype  # looked up once: diffusers goes through every module for it
    noisy = scheduler.add_noise(latents, noise, batch.timesteps)
    height, width = batch.resolution
    time_ids = [(*size, *corner, height, width) for size, corner in zip(batch.original_sizes, batch.crop_corners)]
    prediction = unet(
        noisy.to(dtype),
        batch.timesteps,
        conditioning["context"].to(dtype),
        added_cond_kwargs={
            "text_embeds": conditioning["pooled"].to(dtype),
            "time_ids": torch.tensor(time_ids, device=noisy.device, dtype=dtype),
        },
    ).sample
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, batch.timesteps)
    elif kind == "sample":
        target = latents
    else:
        raise ValueError(f"The scheduler's prediction_type {kind!r} is not known; it must be epsilon, v_prediction or sample.")
    error = (prediction.float() - target.float()).square()
    return (error if batch.weights is None else batch.weights * error).mean()
