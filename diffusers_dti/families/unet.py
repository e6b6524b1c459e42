"""What the UNet families share: the forward process, the VAE's posterior, the target of the scheduler's prediction type."""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..data import Batch
from ..offload import in_float32


def training_scheduler(pipe: Any) -> DDPMScheduler:
    """The forward process of the pipeline's scheduler, whatever sampler that is."""
    return DDPMScheduler.from_config(pipe.scheduler.config)


def is_plain_unet(pipe: Any) -> bool:
    """A UNet that takes latents and nothing else beside them: no inpainting, depth or instruction channels."""
    parts = pipe.components
    unet, vae = parts.get("unet"), parts.get("vae")
    return unet is not None and vae is not None and unet.config.in_channels == vae.config.latent_channels


@torch.no_grad()
def encode_images(pipe: Any, crops: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Mean and standard deviation of the scaled latents, (1, c, h, w) float32 on the CPU, of each crop in [-1, 1]."""
    encoded, scale = [], pipe.vae.config.scaling_factor
    with in_float32(pipe.vae):
        for pixels in crops:
            posterior = pipe.vae.encode(pixels[None].to(pipe.vae.device)).latent_dist
            encoded.append(((posterior.mean * scale).cpu(), (posterior.std * scale).cpu()))
    return encoded


def error(scheduler: DDPMScheduler, prediction: Tensor, batch: Batch) -> Tensor:
    """Mean squared error of a prediction, weighted where there are masks; a scalar in float32.

    Raises:
        ValueError: for a prediction type that is not known.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        target = batch.noise
    elif kind == "v_prediction":
        target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    elif kind == "sample":
        target = batch.latents
    else:
        raise ValueError(f"The scheduler's prediction_type {kind!r} is not known; it must be epsilon, v_prediction or sample.")
    squared = (prediction.float() - target.float()).square()
    return (squared if batch.weights is None else batch.weights * squared).mean()
