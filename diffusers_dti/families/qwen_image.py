"""Qwen-Image: Qwen2.5-VL behind a system prompt, a transformer over text and image, and flow matching."""

import functools
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import Tensor

from ..pipeline.protocols import Pipeline
from .base import Batch, Conditioning, uncompiled_component
from .flow import KLFlowFamily
from .templated import TemplatedEncoder


class QwenImage(KLFlowFamily):
    """Qwen-Image from text. Its editing variants read images along with the prompt and do not match."""

    name = "Qwen-Image"
    text_length = 1024 + 34  # of the text with its system prompt

    @classmethod
    def matches(cls, pipe: Pipeline) -> bool:
        return (
            isinstance(uncompiled_component(pipe, "transformer"), QwenImageTransformer2DModel)
            and isinstance(uncompiled_component(pipe, "vae"), AutoencoderKLQwenImage)
            and pipe.components.get("text_encoder") is not None
            and "processor" not in pipe.components
        )

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the normalized latents, (1, c, h, w): a photo is a video of one frame."""
        vae = self.pipe.vae
        posterior = vae.encode(pixels[:, :, None]).latent_dist
        mean = torch.tensor(vae.config.latents_mean, device=pixels.device).view(1, -1, 1, 1)
        std = torch.tensor(vae.config.latents_std, device=pixels.device).view(1, -1, 1, 1)
        return (posterior.mean[:, :, 0] - mean) / std, posterior.std[:, :, 0] / std

    def clean_prompt(self, prompt: str) -> str:
        """Return a prompt in the pipeline's template."""
        return self.pipe.prompt_template_encode.format(prompt)

    @functools.cached_property
    def encoder(self) -> TemplatedEncoder:
        """The encoder with the template."""
        pipe = self.pipe
        drop = pipe.prompt_template_encode_start_idx
        return TemplatedEncoder(self, pipe.tokenizer, pipe.text_encoder, layers=(-1,), drop=drop)

    def encode_prompts(self, prompts: Sequence[str], zero_pads: Sequence[int]) -> Conditioning:
        """Return the last states after the system prompt, (n, longest, 3584), and a mask of the real ones."""
        states, mask = self.encoder(prompts)
        return {"context": states, "mask": mask.to(states.device, non_blocking=True)}

    def predict(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        pipe, dtype = self.pipe, self.dtypes["transformer"]
        latents, sigmas = self.noisy_latents(batch)
        n, channels, height, width = latents.shape
        velocity = pipe.transformer(
            hidden_states=pipe._pack_latents(latents.to(dtype), n, channels, height, width),
            timestep=sigmas,
            encoder_hidden_states=conditioning["context"].to(dtype),
            encoder_hidden_states_mask=conditioning["mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * n,
        ).sample
        scale = pipe.vae_scale_factor
        return pipe._unpack_latents(velocity, height * scale, width * scale, scale)[:, :, 0]
