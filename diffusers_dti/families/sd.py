"""Stable Diffusion 1.5 and 2.x: one CLIP encoder, a UNet, the scheduler's own prediction type."""

from collections.abc import Sequence
from typing import Any

from diffusers import DDPMScheduler
from torch import Tensor

from ..training.samples import Batch
from .unet import DENOISERS, TEXT_LENGTH, draw, encode_images, error, is_plain_unet, resolution_step, training_scheduler

__all__ = [
    "DEFAULTS", "DENOISERS", "NAME", "TEXT_LENGTH", "draw", "encode_images", "encode_prompts", "loss", "matches",
    "resolution_step", "training_scheduler",
]  # fmt: skip

NAME = "Stable Diffusion 1.5 and 2.x"

# the paper has no settings for these: SDXL's, at the models' own resolution
DEFAULTS: dict[str, Any] = {
    "resolution": 512,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_train_steps": 400,
    "kappa": 1e-4,
}


def matches(pipe: Any) -> bool:
    """Stable Diffusion and its variants with a plain UNet: img2img, ControlNet, fine-tunes."""
    parts = pipe.components
    return (
        getattr(getattr(parts.get("text_encoder"), "config", None), "model_type", None) == "clip_text_model"
        and not any(name in parts for name in ("text_encoder_2", "image_noising_scheduler"))
        and is_plain_unet(pipe)
        and pipe.unet.config.addition_embed_type is None
    )


def encode_prompts(pipe: Any, prompts: Sequence[str], zero_pads: Sequence[int]) -> dict[str, Tensor]:
    """The encoder's last states after its final norm, (n, 77, 768 or 1024)."""
    tokenizer, encoder = pipe.tokenizer, pipe.text_encoder
    ids = tokenizer(
        list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return {"context": encoder(ids.to(encoder.device)).last_hidden_state}


def loss(pipe: Any, scheduler: DDPMScheduler, batch: Batch, conditioning: dict[str, Tensor]) -> Tensor:
    """The error of the UNet's prediction, a scalar in float32."""
    dtype = pipe.unet.dtype
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    prediction = pipe.unet(noisy.to(dtype), batch.timesteps, conditioning["context"].to(dtype)).sample
    return error(scheduler, prediction, batch)
