"""FLUX.1: CLIP's pooled state, T5, a transformer over text and image, and flow matching."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor

from ..pipeline.protocols import Pipeline
from .base import Batch, Conditioning, uncompiled_component
from .flow import KLFlowFamily

GUIDANCE = 3.5  # the default of the pipeline's call and of diffusers' training script, which is an input of dev's network


class Flux(KLFlowFamily):
    """FLUX.1 dev and schnell, and their variants with the same inputs: img2img, Kontext.

    Both are distilled, dev for guidance and schnell for few steps. Training uses them as the flow models that they still are,
    dev at guidance 3.5, without the losses that they were distilled with.
    """

    name = "Flux"
    text_length = 512
    editors = ("FluxKontextPipeline",)

    @classmethod
    def matches(cls, pipe: Pipeline) -> bool:
        transformer, vae = uncompiled_component(pipe, "transformer"), uncompiled_component(pipe, "vae")
        return (
            isinstance(transformer, FluxTransformer2DModel)
            and isinstance(vae, AutoencoderKL)
            and transformer.config.in_channels == 4 * vae.config.latent_channels  # not for inpainting, depth or edges
            and all(pipe.components.get(name) is not None for name in ("text_encoder", "text_encoder_2"))
        )

    def encode_prompts(self, prompts: Sequence[str], zero_pads: Sequence[int]) -> Conditioning:
        """Return T5's last states, (n, 512, 4096), and CLIP's pooled state, (n, 768), which is all that is used of CLIP."""
        clip, t5 = self.pipe.text_encoder, self.pipe.text_encoder_2
        pooled = clip(self.padded_ids(self.pipe.tokenizer, prompts).to(self.device, non_blocking=True)).pooler_output
        ids = self.padded_ids(self.pipe.tokenizer_2, prompts, self.text_length)
        return {"context": t5(ids.to(self.device, non_blocking=True)).last_hidden_state, "pooled": pooled}

    def predict(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        pipe, dtype, context = self.pipe, self.dtypes["transformer"], conditioning["context"]
        latents, sigmas = self.noisy_latents(batch)
        n, channels, height, width = latents.shape
        velocity = pipe.transformer(
            hidden_states=pipe._pack_latents(latents.to(dtype), n, channels, height, width),
            timestep=sigmas,
            guidance=torch.full_like(sigmas, GUIDANCE) if pipe.transformer.config.guidance_embeds else None,
            encoder_hidden_states=context.to(dtype),
            pooled_projections=conditioning["pooled"].to(dtype),
            txt_ids=torch.zeros(context.shape[1], 3, device=latents.device, dtype=dtype),
            img_ids=pipe._prepare_latent_image_ids(n, height // 2, width // 2, latents.device, dtype),
        ).sample
        scale = pipe.vae_scale_factor
        return pipe._unpack_latents(velocity, height * scale, width * scale, scale)
