"""Stable Diffusion 1.5, 2.x and XL: CLIP encoders, a UNet, and the scheduler's own prediction type."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..pipeline.protocols import Pipeline
from .base import Batch, Conditioning, uncompiled_component
from .ddpm import DDPMFamily


class StableDiffusionXL(DDPMFamily):
    """SDXL and its variants with both encoders and a plain UNet: img2img, ControlNet, fine-tunes."""

    name = "SDXL"
    denoisers = ("unet",)
    text_length = 77
    # The authors' settings (paper, appendix; their launchers).
    defaults: ClassVar[Mapping[str, Any]] = {
        "resolution": 768,
        "train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 400,
        "kappa": 1e-4,
    }

    @classmethod
    def matches(cls, pipe: Pipeline) -> bool:
        both = all(pipe.components.get(name) is not None for name in ("text_encoder", "text_encoder_2"))
        return both and has_plain_unet(pipe) and pipe.unet.config.addition_embed_type == "text_time"

    def encode_prompts(self, prompts: Sequence[str], zero_pads: Sequence[int]) -> Conditioning:
        """Return the penultimate states of both encoders, (n, 77, 2048), and the second's projected pooled state, (n, 1280)."""
        pipe, states = self.pipe, []
        for tokenizer, encoder in [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]:
            ids = self.padded_ids(tokenizer, prompts).to(self.device, non_blocking=True)
            out = encoder(ids, output_hidden_states=True)
            states.append(out.hidden_states[-2])
        return {"context": torch.cat(states, -1), "pooled": out.text_embeds}

    def predict(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        noisy = self.noisy_latents(batch)
        time_ids = [
            (*size, *corner, *batch.resolution) for size, corner in zip(batch.original_sizes, batch.crop_corners, strict=True)
        ]
        return self.pipe.unet(
            noisy,
            batch.timesteps,
            conditioning["context"].to(noisy.dtype),
            added_cond_kwargs={
                "text_embeds": conditioning["pooled"].to(noisy.dtype),
                "time_ids": torch.tensor(time_ids, dtype=noisy.dtype).to(noisy.device, non_blocking=True),
            },
        ).sample


class StableDiffusion(DDPMFamily):
    """Stable Diffusion 1.5 and 2.x, and their variants with a plain UNet: img2img, ControlNet, fine-tunes."""

    name = "Stable Diffusion 1.5 and 2.x"
    denoisers = ("unet",)
    text_length = 77
    # The paper has no settings for these models. They get SDXL's, at their own resolution.
    defaults: ClassVar[Mapping[str, Any]] = {**StableDiffusionXL.defaults, "resolution": 512}

    @classmethod
    def matches(cls, pipe: Pipeline) -> bool:
        parts = pipe.components
        return (
            getattr(getattr(parts.get("text_encoder"), "config", None), "model_type", None) == "clip_text_model"
            and not any(name in parts for name in ("text_encoder_2", "image_noising_scheduler"))
            and has_plain_unet(pipe)
            and pipe.unet.config.addition_embed_type is None
        )

    def encode_prompts(self, prompts: Sequence[str], zero_pads: Sequence[int]) -> Conditioning:
        """Return the encoder's last states after its final norm, (n, 77, 768 or 1024)."""
        ids = self.padded_ids(self.pipe.tokenizer, prompts).to(self.device, non_blocking=True)
        return {"context": self.pipe.text_encoder(ids).last_hidden_state}

    def predict(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        noisy = self.noisy_latents(batch)
        return self.pipe.unet(noisy, batch.timesteps, conditioning["context"].to(noisy.dtype)).sample


def has_plain_unet(pipe: Pipeline) -> bool:
    """Return whether there is a 2D UNet that takes only latents: no frames, and no channels to inpaint, for depth or edits."""
    unet, vae = uncompiled_component(pipe, "unet"), pipe.components.get("vae")
    return isinstance(unet, UNet2DConditionModel) and vae is not None and unet.config.in_channels == vae.config.latent_channels
