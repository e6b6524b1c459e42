"""Stable Diffusion XL: two CLIP encoders, a UNet, the scheduler's own prediction type."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..training.samples import Batch
from .unet import DENOISERS, TEXT_LENGTH, draw, encode_images, error, is_plain_unet, resolution_step, training_scheduler

__all__ = [
    "DEFAULTS", "DENOISERS", "NAME", "TEXT_LENGTH", "draw", "encode_images", "encode_prompts", "loss", "matches",
    "resolution_step", "training_scheduler",
]  # fmt: skip

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
    """SDXL and its variants with both encoders and a plain UNet: img2img, ControlNet, fine-tunes."""
    both = all(pipe.components.get(name) is not None for name in ("text_encoder", "text_encoder_2"))
    return both and is_plain_unet(pipe) and pipe.unet.config.addition_embed_type == "text_time"


def encode_prompts(pipe: Any, prompts: Sequence[str], zero_pads: Sequence[int]) -> dict[str, Tensor]:
    """Penultimate states of both encoders, (n, 77, 2048), and the second's projected pooled state, (n, 1280)."""
    states = []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = tokenizer(
            list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        out = encoder(ids.to(encoder.device), output_hidden_states=True)
        states.append(out.hidden_states[-2])
    return {"context": torch.cat(states, -1), "pooled": out.text_embeds}


def loss(pipe: Any, scheduler: DDPMScheduler, batch: Batch, conditioning: dict[str, Tensor]) -> Tensor:
    """The error of the UNet's prediction, a scalar in float32."""
    dtype = pipe.unet.dtype  # looked up once: diffusers goes through every module for it
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    time_ids = [(*size, *corner, *batch.resolution) for size, corner in zip(batch.original_sizes, batch.crop_corners)]
    prediction = pipe.unet(
        noisy.to(dtype),
        batch.timesteps,
        conditioning["context"].to(dtype),
        added_cond_kwargs={
            "text_embeds": conditioning["pooled"].to(dtype),
            "time_ids": torch.tensor(time_ids, device=noisy.device, dtype=dtype),
        },
    ).sample
    return error(scheduler, prediction, batch)
