"""Wan 2.1 and 2.2, text to video: UMT5, one transformer or two, flow matching; a photo is a video of one frame."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from ..pipeline.offload import in_float32
from ..training.samples import Batch
from .flow import error, noisy_latents
from .flow import training_scheduler as flow_scheduler
from .unpadded import encoder_inputs

NAME = "Wan"
TEXT_LENGTH = 512
DENOISERS = ("transformer", "transformer_2")

# the authors' settings (their launcher)
DEFAULTS: dict[str, Any] = {
    "resolution": 512,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 500,
    "kappa": 5e-5,
    "zero_pad": False,
}


def matches(pipe: Any) -> bool:
    """Wan from text alone, also to edit videos; not the models that take a picture's channels beside the latents."""
    parts = pipe.components
    vae, *models = (getattr(parts.get(name), "_orig_mod", parts.get(name)) for name in ("vae", *DENOISERS))
    models = [m for m in models if m is not None]
    return (
        parts.get("text_encoder") is not None
        and isinstance(vae, AutoencoderKLWan)
        and bool(models)
        and all(isinstance(m, WanTransformer3DModel) and m.config.in_channels == vae.config.z_dim for m in models)
    )


def training_scheduler(pipe: Any) -> FlowMatchEulerDiscreteScheduler:
    """See `flow.training_scheduler`.

    Raises:
        ValueError: also where the pipeline changes from one transformer to the other and has only one of them.
    """
    boundary = pipe.config.get("boundary_ratio")
    missing = [n for n in DENOISERS[: 1 if boundary is None else 2] if getattr(pipe, n, None) is None]
    if missing:
        raise ValueError(
            f"This {type(pipe).__name__} (boundary_ratio {boundary}) has no {missing[0]}, and training draws noise of all "
            "levels: load the pipeline with all its transformers."
        )
    return flow_scheduler(pipe)


def resolution_step(pipe: Any) -> int:
    """Pixels of which the resolution must be a multiple."""
    return pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[-1]


@torch.no_grad()
def encode_images(pipe: Any, crops: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Normalised modes of the latents, (1, c, 1, h, w) float32 on the CPU, of each crop in [-1, 1], and zeros for spread."""
    config, encoded = pipe.vae.config, []
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    with in_float32(pipe.vae):
        for pixels in crops:
            mode = pipe.vae.encode(pixels[None, :, None].to(pipe.vae.device)).latent_dist.mode().cpu()
            encoded.append(((mode - mean) / std, torch.zeros(mode.shape)))
    return encoded


def encode_prompts(pipe: Any, prompts: Sequence[str], zero_pads: Sequence[int]) -> dict[str, Tensor]:
    """UMT5's last states, followed by zeros up to 512 positions, which the transformer does not mask: (n, 512, 4096)."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    cleaned = [prompt_clean(p) for p in prompts]
    inputs = encoder_inputs(pipe.tokenizer, pipe.text_encoder, cleaned, TEXT_LENGTH, zero_pads)
    states = pipe.text_encoder(**inputs).last_hidden_state * inputs["attention_mask"][..., None]
    return {"context": pad(states, (0, 0, 0, TEXT_LENGTH - states.shape[1]))}


def loss(pipe: Any, scheduler: FlowMatchEulerDiscreteScheduler, batch: Batch, conditioning: dict[str, Tensor]) -> Tensor:
    """The error of the velocity, a scalar in float32. Of Wan 2.2's two transformers each takes its side of the boundary."""
    latents, sigmas = noisy_latents(scheduler, batch)
    prediction = torch.zeros_like(latents)
    boundary = pipe.config.get("boundary_ratio")
    high = torch.ones_like(sigmas, dtype=torch.bool) if boundary is None else sigmas >= boundary
    for name, chosen in zip(DENOISERS, (high, ~high)):
        if chosen.any():
            model = getattr(pipe, name)
            part = model(
                latents[chosen].to(model.dtype),
                sigmas[chosen] * scheduler.config.num_train_timesteps,
                conditioning["context"][chosen].to(model.dtype),
            ).sample
            prediction = prediction.index_put((chosen,), part.float())
    return error(prediction, batch)


def draw(pipe: Any, prompt: str, resolution: int, generator: torch.Generator) -> Image.Image:
    """A video of one frame at the training's resolution."""
    size = {"height": resolution, "width": resolution, "num_frames": 1}
    return pipe(prompt, generator=generator, output_type="pil", **size).frames[0][0]
