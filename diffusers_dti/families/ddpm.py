"""Denoising diffusion: noise added step by step, and the scheduler's own prediction type."""

import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor

from .base import Batch, Family

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class DDPMFamily(Family):
    """Share the forward process, the VAE's posterior, and the target of the scheduler's prediction type."""

    scheduler: DDPMScheduler

    def training_scheduler(self) -> DDPMScheduler:
        config = self.pipe.scheduler.config
        if "beta_schedule" not in config or config.get("prediction_type") not in PREDICTION_TYPES:
            raise ValueError(
                f"{type(self.pipe.scheduler).__name__} with prediction_type {config.get('prediction_type')!r} has no forward "
                f"process to train with: that takes a `beta_schedule` and one of {', '.join(PREDICTION_TYPES)}. Give the "
                "pipeline the scheduler that its model was trained with."
            )
        return DDPMScheduler.from_config(config)

    @property
    def resolution_step(self) -> int:
        return self.pipe.vae_scale_factor

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipe.vae
        posterior, scale = vae.encode(pixels).latent_dist, vae.config.scaling_factor
        return posterior.mean * scale, posterior.std * scale

    def noisy_latents(self, batch: Batch) -> Tensor:
        """Add noise to the latents at the batch's timesteps, in the denoiser's dtype."""
        return self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps).to(self.dtypes[self.denoisers[0]])

    def target(self, batch: Batch) -> Tensor:
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "epsilon":
            return batch.noise
        if prediction_type == "v_prediction":
            return self.scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
        return batch.latents

    def generate(self, prompt: str, resolution: int, generator: torch.Generator) -> Image.Image:
        """Generate at the pipeline's own size."""
        return self.pipe(prompt, generator=generator).images[0]
