"""Z-Image and Z-Image-Turbo: Qwen3 behind its chat template, a transformer over text and image, and flow matching."""

import functools
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor

from ..pipeline.protocols import Pipeline
from .base import Batch, Conditioning, uncompiled_component
from .flow import KLFlowFamily
from .templated import TemplatedEncoder, as_message


class ZImage(KLFlowFamily):
    """Z-Image and its variants with the same inputs: img2img, inpainting.

    Turbo is the same network after distillation. Training uses it as the flow model that it still is, at all noise levels and
    without the losses that it was distilled with. Its weights do not change, so it remains a model for few steps.
    """

    name = "Z-Image"
    text_length = 512  # of the text with its template
    token_states = True

    @classmethod
    def matches(cls, pipe: Pipeline) -> bool:
        transformer = uncompiled_component(pipe, "transformer")
        return (
            isinstance(transformer, ZImageTransformer2DModel)
            and transformer.config.get("siglip_feat_dim") is None  # Omni reads images as well
            and isinstance(uncompiled_component(pipe, "vae"), AutoencoderKL)
            and pipe.components.get("text_encoder") is not None
        )

    def clean_prompt(self, prompt: str) -> str:
        """Return a prompt in Qwen3's chat template."""
        return as_message(self.pipe.tokenizer, prompt, thinking=True)

    @functools.cached_property
    def encoder(self) -> TemplatedEncoder:
        """The encoder with the template."""
        return TemplatedEncoder(self, self.pipe.tokenizer, self.pipe.text_encoder)

    def encode_prompts(self, prompts: Sequence[str], zero_pads: Sequence[int]) -> Conditioning:
        """Return Qwen3's penultimate states, (n, longest, 2560), and on the CPU a mask of the real ones."""
        states, mask = self.encoder(prompts)
        return {"context": states, "mask": mask}

    def predict(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        dtype = self.dtypes["transformer"]
        latents, sigmas = self.noisy_latents(batch)
        lengths = conditioning["mask"].sum(-1).tolist()
        prompts = [states[:length] for states, length in zip(conditioning["context"].to(dtype), lengths)]
        images = list(latents.to(dtype).unsqueeze(2).unbind())
        # The model counts time from noise to image, and its velocity points that way.
        velocities = self.pipe.transformer(images, 1 - sigmas, prompts, return_dict=False)[0]
        return -torch.stack(velocities).squeeze(2)
