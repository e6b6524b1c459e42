"""FLUX.2 klein: Qwen3 behind its chat template, a transformer over text and image, and flow matching."""

import functools
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import Tensor

from ..pipeline.protocols import Pipeline
from .base import Batch, Conditioning, uncompiled_component
from .flow import KLFlowFamily
from .templated import TemplatedEncoder, as_message

LAYERS = (9, 18, 27)  # the default of the pipeline's call


class Flux2Klein(KLFlowFamily):
    """FLUX.2 klein, 4B and 9B, base and distilled.

    The distilled model is the same network for few steps. Training uses it as the flow model that it still is, at all noise
    levels and without the losses that it was distilled with.
    """

    name = "FLUX.2 klein"
    text_length = 512  # of the text with its template
    editors = ("Flux2KleinPipeline",)

    @classmethod
    def matches(cls, pipe: Pipeline) -> bool:
        return (
            isinstance(uncompiled_component(pipe, "transformer"), Flux2Transformer2DModel)
            and isinstance(uncompiled_component(pipe, "vae"), AutoencoderKLFlux2)
            and getattr(getattr(pipe.components.get("text_encoder"), "config", None), "model_type", None) == "qwen3"
        )

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mode of the latents in 2 x 2 patches, normalized, (1, 4c, h / 2, w / 2), and zeros."""
        vae = self.pipe.vae
        mode = self.pipe._patchify_latents(vae.encode(pixels).latent_dist.mode())
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        return (mode - mean) / std, torch.zeros_like(mode)

    def clean_prompt(self, prompt: str) -> str:
        """Return a prompt in Qwen3's chat template, with thinking switched off."""
        return as_message(self.pipe.tokenizer, prompt, thinking=False)

    @functools.cached_property
    def encoder(self) -> TemplatedEncoder:
        """The encoder with the template."""
        return TemplatedEncoder(self, self.pipe.tokenizer, self.pipe.text_encoder, layers=LAYERS, padded=True)

    def encode_prompts(self, prompts: Sequence[str], zero_pads: Sequence[int]) -> Conditioning:
        """Return three of Qwen3's states side by side, (n, 512, 3 x 2560). The transformer does not mask the padding."""
        return {"context": self.encoder(prompts)[0]}

    def predict(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        pipe, dtype, context = self.pipe, self.dtypes["transformer"], conditioning["context"]
        latents, sigmas = self.noisy_latents(batch)
        velocity = pipe.transformer(
            hidden_states=pipe._pack_latents(latents.to(dtype)),
            timestep=sigmas,
            guidance=None,
            encoder_hidden_states=context.to(dtype),
            txt_ids=pipe._prepare_text_ids(context).to(latents.device, non_blocking=True),
            img_ids=pipe._prepare_latent_ids(latents).to(latents.device, non_blocking=True),
        ).sample
        return velocity.transpose(1, 2).unflatten(2, latents.shape[-2:])
