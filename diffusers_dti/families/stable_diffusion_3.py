"""Stable Diffusion 3 and 3.5: two CLIP encoders, T5, a transformer over text and image, and flow matching."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor
from torch.nn.functional import pad

from ..pipeline.protocols import Pipeline
from .base import Batch, Conditioning, uncompiled_component
from .flow import KLFlowFamily


class StableDiffusion3(KLFlowFamily):
    """Stable Diffusion 3 and 3.5, also without their T5, which saves memory: a concept then has rows for both CLIPs."""

    name = "Stable Diffusion 3"
    text_length = 256

    @classmethod
    def matches(cls, pipe: Pipeline) -> bool:
        transformer, vae = uncompiled_component(pipe, "transformer"), uncompiled_component(pipe, "vae")
        return (
            isinstance(transformer, SD3Transformer2DModel)
            and isinstance(vae, AutoencoderKL)
            and transformer.config.in_channels == vae.config.latent_channels  # not for inpainting
            and all(pipe.components.get(name) is not None for name in ("text_encoder", "text_encoder_2"))
        )

    def encode_prompts(self, prompts: Sequence[str], zero_pads: Sequence[int]) -> Conditioning:
        """Return the CLIPs' penultimate states beside each other, then T5's, (n, 77 + 256, 4096), and both pooled states."""
        pipe, states, pooled = self.pipe, [], []
        for tokenizer, encoder in [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]:
            ids = self.padded_ids(tokenizer, prompts).to(self.device, non_blocking=True)
            out = encoder(ids, output_hidden_states=True)
            states.append(out.hidden_states[-2])
            pooled.append(out.text_embeds)
        clip = torch.cat(states, -1)
        width = pipe.transformer.config.joint_attention_dim
        if pipe.components.get("text_encoder_3") is None:
            t5 = clip.new_zeros(len(prompts), self.text_length, width)
        else:
            ids = self.padded_ids(pipe.tokenizer_3, prompts, self.text_length)
            t5 = pipe.text_encoder_3(ids.to(self.device, non_blocking=True)).last_hidden_state
        context = torch.cat([pad(clip, (0, width - clip.shape[-1])), t5], 1)
        return {"context": context, "pooled": torch.cat(pooled, -1)}

    def predict(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        dtype = self.dtypes["transformer"]
        latents, sigmas = self.noisy_latents(batch)
        return self.pipe.transformer(
            hidden_states=latents.to(dtype),
            timestep=sigmas * self.scheduler.config.num_train_timesteps,
            encoder_hidden_states=conditioning["context"].to(dtype),
            pooled_projections=conditioning["pooled"].to(dtype),
        ).sample
