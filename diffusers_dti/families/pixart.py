"""PixArt-α and PixArt-Σ: T5, a transformer with cross-attention, and denoising diffusion."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, PixArtAlphaPipeline, PixArtTransformer2DModel
from PIL import Image
from torch import Tensor

from ..pipeline.protocols import Pipeline
from .base import Batch, Conditioning, uncompiled_component
from .ddpm import DDPMFamily
from .flow import FlowFamily
from .unpadded import encoder_inputs


class PixArt(DDPMFamily):
    """PixArt-α, PixArt-Σ, and their variants with the same transformer.

    The distilled ones (LCM, DMD) are trained as the noise-predicting network that they still are, without the losses that they
    were distilled with.
    """

    name = "PixArt"
    denoisers = ("transformer",)
    text_length = 300
    # The paper has no settings for them. They get SANA's, which has the same resolution and reads prompts in the same way.
    defaults: ClassVar[Mapping[str, Any]] = FlowFamily.defaults

    def __init__(self, pipe: Pipeline):
        super().__init__(pipe)
        if isinstance(pipe, PixArtAlphaPipeline):
            self.text_length = 120

    @classmethod
    def matches(cls, pipe: Pipeline) -> bool:
        return (
            isinstance(uncompiled_component(pipe, "transformer"), PixArtTransformer2DModel)
            and isinstance(uncompiled_component(pipe, "vae"), AutoencoderKL)
            and pipe.components.get("text_encoder") is not None
        )

    @property
    def resolution_step(self) -> int:
        return self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size

    def clean_prompt(self, prompt: str) -> str:
        """Return a prompt as the pipeline cleans it with `clean_caption=False`: otherwise it would remove <dog>."""
        return prompt.lower().strip()

    def encode_prompts(self, prompts: Sequence[str], zero_pads: Sequence[int]) -> Conditioning:
        """Return T5's last states, (n, longest, 4096), and a mask of the real ones."""
        pipe, cleaned = self.pipe, [self.clean_prompt(p) for p in prompts]
        inputs = encoder_inputs(self, pipe.tokenizer, pipe.text_encoder, cleaned, self.text_length, zero_pads)
        return {"context": pipe.text_encoder(**inputs).last_hidden_state, "mask": inputs["attention_mask"]}

    def predict(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        transformer, noisy = self.pipe.transformer, self.noisy_latents(batch)
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if transformer.use_additional_conditions:  # PixArt-α at 1024 pixels
            height, width = batch.resolution
            for name, value in (("resolution", [height, width]), ("aspect_ratio", [height / width])):
                same = torch.tensor([value] * len(noisy), dtype=noisy.dtype)
                size[name] = same.to(noisy.device, non_blocking=True)
        prediction: Tensor = transformer(
            noisy,
            encoder_hidden_states=conditioning["context"].to(noisy.dtype),
            encoder_attention_mask=conditioning["mask"],
            timestep=batch.timesteps,
            added_cond_kwargs=size,
        ).sample
        return prediction[:, : batch.latents.shape[1]]  # the rest is the variance, which samplers do not use either

    def generate(self, prompt: str, resolution: int, generator: torch.Generator) -> Image.Image:
        """Generate at the training resolution, with the prompt as training reads it."""
        size = {"height": resolution, "width": resolution, "use_resolution_binning": False}
        return self.pipe(prompt, generator=generator, clean_caption=False, **size).images[0]
