"""Lumina 2: Gemma 2 behind a system prompt, a transformer over text and image, and flow matching."""

import functools
from collections.abc import Sequence

from diffusers import AutoencoderKL, Lumina2Transformer2DModel
from torch import Tensor

from ..pipeline.protocols import Pipeline
from .base import Batch, Conditioning, uncompiled_component
from .flow import KLFlowFamily
from .templated import TemplatedEncoder


class Lumina2(KLFlowFamily):
    """Lumina Image 2.0."""

    name = "Lumina 2"
    text_length = 256  # of the text with its system prompt
    token_states = True

    @classmethod
    def matches(cls, pipe: Pipeline) -> bool:
        return (
            isinstance(uncompiled_component(pipe, "transformer"), Lumina2Transformer2DModel)
            and isinstance(uncompiled_component(pipe, "vae"), AutoencoderKL)
            and pipe.components.get("text_encoder") is not None
        )

    def clean_prompt(self, prompt: str) -> str:
        """Return a prompt behind the pipeline's system prompt."""
        return f"{self.pipe.system_prompt} <Prompt Start> {prompt}"

    @functools.cached_property
    def encoder(self) -> TemplatedEncoder:
        """The encoder with the template."""
        return TemplatedEncoder(self, self.pipe.tokenizer, self.pipe.text_encoder)

    def encode_prompts(self, prompts: Sequence[str], zero_pads: Sequence[int]) -> Conditioning:
        """Return Gemma's penultimate states, (n, longest, 2304), and a mask of the real ones."""
        states, mask = self.encoder(prompts)
        return {"context": states, "mask": mask.to(states.device, non_blocking=True)}

    def predict(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        dtype = self.dtypes["transformer"]
        latents, sigmas = self.noisy_latents(batch)
        # The model counts time from noise to image, and its velocity points that way.
        velocity = self.pipe.transformer(
            hidden_states=latents.to(dtype),
            timestep=1 - sigmas,
            encoder_hidden_states=conditioning["context"].to(dtype),
            encoder_attention_mask=conditioning["mask"],
        ).sample
        return -velocity
