"""Wan 2.1 and 2.2, text to video: UMT5, one transformer or two, flow matching; a photo is a video of one frame."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from .base import Batch, Conditioning, upcast
from .flow import FlowFamily
from .unpadded import encoder_inputs


class Wan(FlowFamily):
    """Wan from text alone, also for editing videos; not the models that take an image's channels beside the latents."""

    name = "Wan"
    denoisers = ("transformer", "transformer_2")
    text_length = 512
    # The authors' settings (their launcher).
    defaults: ClassVar[Mapping[str, Any]] = {
        "resolution": 512,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 500,
        "kappa": 5e-5,
        "zero_pad": False,
    }

    @classmethod
    def matches(cls, pipe: Any) -> bool:
        parts = pipe.components
        vae, *models = (getattr(parts.get(name), "_orig_mod", parts.get(name)) for name in ("vae", *cls.denoisers))
        models = [m for m in models if m is not None]
        return (
            parts.get("text_encoder") is not None
            and isinstance(vae, AutoencoderKLWan)
            and bool(models)
            and all(isinstance(m, WanTransformer3DModel) and m.config.in_channels == vae.config.z_dim for m in models)
        )

    @property
    def boundary(self) -> float | None:
        """The sigma at which Wan 2.2 changes from one transformer to the other; None for a single transformer."""
        return self.pipe.config.get("boundary_ratio")

    def training_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        needed = self.denoisers[: 1 if self.boundary is None else 2]
        missing = [n for n in needed if getattr(self.pipe, n, None) is None]
        if missing:
            raise ValueError(
                f"This {type(self.pipe).__name__} (boundary_ratio {self.boundary}) has no {missing[0]}, and training draws "
                "noise of all levels: load the pipeline with all its transformers."
            )
        return super().training_scheduler()

    @property
    def resolution_step(self) -> int:
        return self.pipe.vae_scale_factor_spatial * self.pipe.transformer.config.patch_size[-1]

    @torch.no_grad()
    def encode_images(self, crops: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return the normalized modes of the latents, (1, c, 1, h, w), and zeros: the authors train on the mode."""
        vae, encoded = self.pipe.vae, []
        mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
        with upcast(vae):
            for pixels in crops:
                mode = vae.encode(pixels[None, :, None].to(vae.device)).latent_dist.mode().cpu()
                encoded.append(((mode - mean) / std, torch.zeros(mode.shape)))
        return encoded

    def encode_prompts(self, prompts: Sequence[str], zero_pads: Sequence[int]) -> Conditioning:
        """Return UMT5's last states, followed by zeros up to 512 positions, which the transformer does not mask."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        cleaned = [prompt_clean(p) for p in prompts]
        inputs = encoder_inputs(self.pipe.tokenizer, self.pipe.text_encoder, cleaned, self.text_length, zero_pads)
        states = self.pipe.text_encoder(**inputs).last_hidden_state * inputs["attention_mask"][..., None]
        return {"context": pad(states, (0, 0, 0, self.text_length - states.shape[1]))}

    def predict(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        """Predict the velocity; each of Wan 2.2's two transformers takes the samples on its side of the boundary."""
        latents, sigmas = self.noisy_latents(batch)
        prediction = torch.zeros_like(latents)
        high = torch.ones_like(sigmas, dtype=torch.bool) if self.boundary is None else sigmas >= self.boundary
        for name, chosen in zip(self.denoisers, (high, ~high)):
            if chosen.any():
                model = getattr(self.pipe, name)
                part = model(
                    latents[chosen].to(model.dtype),
                    sigmas[chosen] * self.scheduler.config.num_train_timesteps,
                    conditioning["context"][chosen].to(model.dtype),
                ).sample
                prediction = prediction.index_put((chosen,), part.float())
        return prediction

    def generate(self, prompt: str, resolution: int, generator: torch.Generator) -> Image.Image:
        """Generate a video of one frame at the training resolution."""
        size = {"height": resolution, "width": resolution, "num_frames": 1}
        return self.pipe(prompt, generator=generator, output_type="pil", **size).frames[0][0]
