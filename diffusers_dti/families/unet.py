"""What the UNet families share: the forward process, the VAE's posterior, the target of the scheduler's prediction type."""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.utils.torch_utils import is_compiled_module
from PIL import Image
from torch import Tensor

from ..pipeline.offload import in_float32
from ..training.samples import Batch
from .objective import squared_error

DENOISERS = ("unet",)
TEXT_LENGTH = 77
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def training_scheduler(pipe: Any) -> DDPMScheduler:
    """The forward process of the pipeline's scheduler, whatever sampler that is.

    Raises:
        ValueError: for schedulers of another kind of process, or of a prediction type that is not known.
    """
    config = pipe.scheduler.config
    if "beta_schedule" not in config or config.get("prediction_type") not in PREDICTION_TYPES:
        raise ValueError(
            f"{type(pipe.scheduler).__name__} with prediction_type {config.get('prediction_type')!r} has no forward process "
            f"that training knows: it needs a `beta_schedule` and one of {', '.join(PREDICTION_TYPES)}. Give the pipeline the "
            "scheduler that its model was trained with."
        )
    return DDPMScheduler.from_config(config)


def resolution_step(pipe: Any) -> int:
    """Pixels of which the resolution must be a multiple."""
    return pipe.vae_scale_factor


def draw(pipe: Any, prompt: str, resolution: int, generator: torch.Generator) -> Image.Image:
    """A picture in the pipeline's own size."""
    return pipe(prompt, generator=generator).images[0]


def is_plain_unet(pipe: Any) -> bool:
    """A 2D UNet that takes latents and nothing beside them: no frames, no inpainting, depth or instruction channels."""
    parts = pipe.components
    unet, vae = parts.get("unet"), parts.get("vae")
    unet = unet._orig_mod if unet is not None and is_compiled_module(unet) else unet
    return isinstance(unet, UNet2DConditionModel) and vae is not None and unet.config.in_channels == vae.config.latent_channels


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
    """Squared error of a prediction, a scalar in float32."""
    target = {
        "epsilon": lambda: batch.noise,
        "v_prediction": lambda: scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps),
        "sample": lambda: batch.latents,
    }[scheduler.config.prediction_type]()
    return squared_error(prediction, target, batch)
