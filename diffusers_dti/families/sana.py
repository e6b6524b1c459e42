"""SANA 1.0, 1.5 and Sprint: Gemma 2, a linear transformer on the latents of a deep autoencoder, and flow matching."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from PIL import Image
from torch import Tensor

from ..pipeline.protocols import Pipeline
from .base import Batch, Conditioning, uncompiled_component
from .flow import FlowFamily
from .unpadded import encoder_inputs

SPRINT_GUIDANCE = 4.5  # the default of Sprint's pipeline call, which is an input of the network


class Sana(FlowFamily):
    """SANA and its variants with the same transformer: PAG, ControlNet, Sprint.

    Sprint's transformer is the same network after distillation. Training uses it as the flow model that it still is, at the
    noise levels of its own pipeline, without the losses that it was distilled with.
    """

    name = "SANA"
    denoisers = ("transformer",)
    text_length = 300
    defaults: ClassVar[Mapping[str, Any]] = {**FlowFamily.defaults, "zero_pad": True}

    @classmethod
    def matches(cls, pipe: Pipeline) -> bool:
        return (
            isinstance(uncompiled_component(pipe, "transformer"), SanaTransformer2DModel)
            and isinstance(uncompiled_component(pipe, "vae"), AutoencoderDC)
            and pipe.components.get("text_encoder") is not None
        )

    @property
    def resolution_step(self) -> int:
        return self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scaled latents and zeros: SANA's autoencoder is deterministic."""
        latents = self.pipe.vae.encode(pixels).latent * self.pipe.vae.config.scaling_factor
        return latents, torch.zeros_like(latents)

    def clean_prompt(self, prompt: str) -> str:
        return prompt.lower().strip()

    def encode_prompts(self, prompts: Sequence[str], zero_pads: Sequence[int]) -> Conditioning:
        """Return Gemma's last states, (n, longest, 2304), and a mask of the real ones. No instruction precedes the prompts."""
        pipe, cleaned = self.pipe, [self.clean_prompt(p) for p in prompts]
        inputs = encoder_inputs(self, pipe.tokenizer, pipe.text_encoder, cleaned, self.text_length, zero_pads)
        states = pipe.text_encoder(**inputs, use_cache=False).last_hidden_state
        return {"context": states, "mask": inputs["attention_mask"]}

    def predict(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        transformer = self.pipe.transformer
        config, dtype = transformer.config, self.dtypes["transformer"]
        latents, sigmas = self.noisy_latents(batch)
        if config.guidance_embeds:
            guidance = torch.full_like(sigmas, SPRINT_GUIDANCE * config.guidance_embeds_scale, dtype=dtype)
            time = {"timestep": sigmas, "guidance": guidance}
        else:
            time = {"timestep": sigmas * self.scheduler.config.num_train_timesteps * config.timestep_scale}
        return transformer(
            latents.to(dtype),
            encoder_hidden_states=conditioning["context"].to(dtype),
            encoder_attention_mask=conditioning["mask"],
            **time,
        ).sample

    def generate(self, prompt: str, resolution: int, generator: torch.Generator) -> Image.Image:
        """Generate at the training resolution, without the instruction that the pipeline puts before prompts by default."""
        size = {"height": resolution, "width": resolution, "use_resolution_binning": False}
        return self.pipe(prompt, complex_human_instruction=None, generator=generator, **size).images[0]
