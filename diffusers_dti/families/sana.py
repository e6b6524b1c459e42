"""SANA 1.0, 1.5 and Sprint: Gemma 2, a linear transformer on the latents of a deep autoencoder, flow matching."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from PIL import Image
from torch import Tensor

from .base import Batch, Conditioning, upcast
from .flow import FlowFamily
from .unpadded import encoder_inputs

SPRINT_GUIDANCE = 4.5  # the default of Sprint's pipeline call, which the network is told


class Sana(FlowFamily):
    """SANA and its variants with the same transformer: PAG, ControlNet, Sprint.

    Sprint's transformer is the same network after distillation. It is trained here as the flow model that it still is, at the
    noise levels that its own pipeline uses, without the losses that it was distilled with.
    """

    name = "SANA"
    denoisers = ("transformer",)
    text_length = 300
    # The authors' settings (paper, appendix; their launchers and advice).
    defaults: ClassVar[Mapping[str, Any]] = {
        "resolution": 1024,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 500,
        "kappa": 5e-5,
        "zero_pad": True,
    }

    @classmethod
    def matches(cls, pipe: Any) -> bool:
        parts = pipe.components
        transformer, vae = (getattr(parts.get(name), "_orig_mod", parts.get(name)) for name in ("transformer", "vae"))
        both = isinstance(transformer, SanaTransformer2DModel) and isinstance(vae, AutoencoderDC)
        return both and parts.get("text_encoder") is not None

    @property
    def resolution_step(self) -> int:
        return self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size

    @torch.no_grad()
    def encode_images(self, crops: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return the scaled latents and zeros: SANA's autoencoder is deterministic."""
        vae, encoded = self.pipe.vae, []
        with upcast(vae):
            for pixels in crops:
                latents = vae.encode(pixels[None].to(vae.device)).latent * vae.config.scaling_factor
                encoded.append((latents.cpu(), torch.zeros(latents.shape)))
        return encoded

    def encode_prompts(self, prompts: Sequence[str], zero_pads: Sequence[int]) -> Conditioning:
        """Return Gemma's last states, (n, longest, 2304), and a mask of the real ones; no instruction precedes the prompts."""
        pipe = self.pipe
        lowered = [p.lower().strip() for p in prompts]  # as the pipeline does
        inputs = encoder_inputs(pipe.tokenizer, pipe.text_encoder, lowered, self.text_length, zero_pads)
        states = pipe.text_encoder(**inputs, use_cache=False).last_hidden_state
        return {"context": states, "mask": inputs["attention_mask"]}

    def predict(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        transformer = self.pipe.transformer
        config, dtype = transformer.config, transformer.dtype
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
        """Generate at the training resolution, without the instruction that training has not seen."""
        size = {"height": resolution, "width": resolution, "use_resolution_binning": False}
        return self.pipe(prompt, complex_human_instruction=None, generator=generator, **size).images[0]
