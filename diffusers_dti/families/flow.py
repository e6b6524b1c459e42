"""Flow matching: the straight path from latents to noise, with its velocity as the target."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from .base import Batch, Family

PREDICTION_TYPES = ("flow_prediction", "trigflow")


class FlowFamily(Family):
    """Share what the flow matching families have in common. All noise levels have the same weight."""

    # The authors' settings for SANA (paper, appendix; their launchers and advice).
    defaults: ClassVar[Mapping[str, Any]] = {
        "resolution": 1024,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 500,
        "kappa": 5e-5,
    }
    scheduler: FlowMatchEulerDiscreteScheduler

    def training_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """Return sigmas in even steps from 1 down to 1/1000.

        The `flow_shift` of a sampler is ignored, as in the authors' training. The `shift` of a scheduler that is made for flow
        matching is kept, unless it depends on the resolution: diffusers' training scripts then use none.
        """
        scheduler, config = self.pipe.scheduler, self.pipe.scheduler.config
        flow = type(scheduler).__name__.startswith("FlowMatch")
        if not flow and config.get("prediction_type") not in PREDICTION_TYPES:
            raise ValueError(
                f"{type(scheduler).__name__} with prediction_type {config.get('prediction_type')!r} is not a scheduler for "
                "flow matching: give the pipeline the one that its model was trained with."
            )
        shift = config.get("shift", 1.0) if flow and not config.get("use_dynamic_shifting") else 1.0
        return FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=shift)

    def noisy_latents(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (1 - sigma) latents + sigma noise, and the sigmas, (n,). `batch.timesteps` count down from sigma 1."""
        sigmas = self.scheduler.sigmas.to(batch.latents.device, non_blocking=True)[batch.timesteps]
        at = sigmas.view(-1, *[1] * (batch.latents.ndim - 1))
        return (1 - at) * batch.latents + at * batch.noise, sigmas

    def target(self, batch: Batch) -> Tensor:
        return batch.noise - batch.latents


class KLFlowFamily(FlowFamily):
    """Share what families have in common whose transformer takes 2 x 2 patches of an `AutoencoderKL`'s latents.

    The paper has no settings for them. They get SANA's.
    """

    denoisers = ("transformer",)
    token_states = False

    @property
    def resolution_step(self) -> int:
        return 2 * self.pipe.vae_scale_factor

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipe.vae
        posterior, scale = vae.encode(pixels).latent_dist, vae.config.scaling_factor
        return (posterior.mean - (vae.config.shift_factor or 0)) * scale, posterior.std * scale

    def generate(self, prompt: str, resolution: int, generator: torch.Generator) -> Image.Image:
        """Generate at the training resolution."""
        return self.pipe(prompt=prompt, generator=generator, height=resolution, width=resolution).images[0]
