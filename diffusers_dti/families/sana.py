"""SANA 1.0, 1.5 and Sprint: Gemma 2, a linear transformer on the latents of a deep autoencoder, flow matching."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from PIL import Image
from torch import Tensor

from ..pipeline.offload import in_float32
from ..training.samples import Batch
from .flow import error, noisy_latents, training_scheduler
from .unpadded import encoder_inputs

__all__ = [
    "DEFAULTS", "DENOISERS", "NAME", "TEXT_LENGTH", "draw", "encode_images", "encode_prompts", "loss", "matches",
    "resolution_step", "training_scheduler",
]  # fmt: skip

NAME = "SANA"
TEXT_LENGTH = 300
DENOISERS = ("transformer",)

# the authors' settings (paper, appendix; their launchers and advice)
DEFAULTS: dict[str, Any] = {
    "resolution": 1024,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 500,
    "kappa": 5e-5,
    "zero_pad": True,
}
SPRINT_GUIDANCE = 4.5  # the default of its pipeline's call, which the network is told


def matches(pipe: Any) -> bool:
    """SANA and its variants with the same transformer: PAG, ControlNet, Sprint."""
    parts = pipe.components
    transformer, vae = (getattr(parts.get(name), "_orig_mod", parts.get(name)) for name in ("transformer", "vae"))
    both = isinstance(transformer, SanaTransformer2DModel) and isinstance(vae, AutoencoderDC)
    return both and parts.get("text_encoder") is not None


def resolution_step(pipe: Any) -> int:
    """Pixels of which the resolution must be a multiple."""
    return pipe.vae_scale_factor * pipe.transformer.config.patch_size


@torch.no_grad()
def encode_images(pipe: Any, crops: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The scaled latents, (1, c, h, w) float32 on the CPU, of each crop in [-1, 1], and zeros: they have no spread."""
    encoded = []
    with in_float32(pipe.vae):
        for pixels in crops:
            latents = pipe.vae.encode(pixels[None].to(pipe.vae.device)).latent * pipe.vae.config.scaling_factor
            encoded.append((latents.cpu(), torch.zeros(latents.shape)))
    return encoded


def encode_prompts(pipe: Any, prompts: Sequence[str], zero_pads: Sequence[int]) -> dict[str, Tensor]:
    """Gemma's last states, (n, longest, 2304), and which of them are real; no instruction before the prompt."""
    lowered = [p.lower().strip() for p in prompts]  # as the pipeline has it
    inputs = encoder_inputs(pipe.tokenizer, pipe.text_encoder, lowered, TEXT_LENGTH, zero_pads)
    states = pipe.text_encoder(**inputs, use_cache=False).last_hidden_state
    return {"context": states, "mask": inputs["attention_mask"]}


def loss(pipe: Any, scheduler: FlowMatchEulerDiscreteScheduler, batch: Batch, conditioning: dict[str, Tensor]) -> Tensor:
    """The error of the transformer's velocity, a scalar in float32.

    Sprint's transformer is the same network after distillation. It is trained here as the flow model that it still is, on the
    noise levels that its own pipeline calls it with, without the losses it was distilled by.
    """
    config, dtype = pipe.transformer.config, pipe.transformer.dtype
    latents, sigmas = noisy_latents(scheduler, batch)
    if config.guidance_embeds:
        guidance = torch.full_like(sigmas, SPRINT_GUIDANCE * config.guidance_embeds_scale, dtype=dtype)
        time = {"timestep": sigmas, "guidance": guidance}
    else:
        time = {"timestep": sigmas * scheduler.config.num_train_timesteps * config.timestep_scale}
    prediction = pipe.transformer(
        latents.to(dtype),
        encoder_hidden_states=conditioning["context"].to(dtype),
        encoder_attention_mask=conditioning["mask"],
        **time,
    ).sample
    return error(prediction, batch)


def draw(pipe: Any, prompt: str, resolution: int, generator: torch.Generator) -> Image.Image:
    """A picture at the training's resolution, without the instruction that training has not seen."""
    size = {"height": resolution, "width": resolution, "use_resolution_binning": False}
    return pipe(prompt, complex_human_instruction=None, generator=generator, **size).images[0]
