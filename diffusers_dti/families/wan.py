"""Wan 2.1 and 2.2, text to video: UMT5, one or two transformers, and flow matching. A photo is a video of one frame."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from ..pipeline.protocols import Pipeline
from .base import Batch, Conditioning, uncompiled_component
from .flow import FlowFamily
from .unpadded import encoder_inputs


class Wan(FlowFamily):
    """Wan from text, also to edit videos. Models that take the channels of an image along with the latents do not match."""

    name = "Wan"
    denoisers = ("transformer", "transformer_2")
    text_length = 512
    # The authors' settings (their launcher).
    defaults: ClassVar[Mapping[str, Any]] = {**FlowFamily.defaults, "resolution": 512, "zero_pad": False}

    @classmethod
    def matches(cls, pipe: Pipeline) -> bool:
        vae = uncompiled_component(pipe, "vae")
        if pipe.components.get("text_encoder") is None or not isinstance(vae, AutoencoderKLWan):
            return False
        models = [uncompiled_component(pipe, name) for name in cls.denoisers]
        present = [m for m in models if m is not None]
        fitting = [m for m in present if isinstance(m, WanTransformer3DModel) and m.config.in_channels == vae.config.z_dim]
        return bool(present) and len(fitting) == len(present)

    @property
    def boundary(self) -> float | None:
        """The sigma at which Wan 2.2 switches from one transformer to the other; None for a single transformer."""
        return self.pipe.config.get("boundary_ratio")

    def training_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """Return the same as other flow matching families, if the pipeline has the transformers for all noise levels."""
        needed = self.denoisers[: 1 if self.boundary is None else 2]
        missing = [n for n in needed if getattr(self.pipe, n, None) is None]
        if missing:
            raise ValueError(
                f"This {type(self.pipe).__name__} (boundary_ratio {self.boundary}) has no {missing[0]}, and training uses "
                "noise of all levels: load the pipeline with all its transformers."
            )
        return super().training_scheduler()

    @property
    def resolution_step(self) -> int:
        return self.pipe.vae_scale_factor_spatial * self.pipe.transformer.config.patch_size[-1]

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalized mode of the latents, (1, c, 1, h, w), and zeros: the authors train on the mode."""
        vae = self.pipe.vae
        mode = vae.encode(pixels[:, :, None]).latent_dist.mode().cpu()
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        return (mode - mean) / std, torch.zeros_like(mode)

    def clean_prompt(self, prompt: str) -> str:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return prompt_clean(prompt)

    def encode_prompts(self, prompts: Sequence[str], zero_pads: Sequence[int]) -> Conditioning:
        """Return UMT5's last states, (n, 512, 4096): zeros follow the real ones, and the transformer does not mask them."""
        cleaned = [self.clean_prompt(p) for p in prompts]
        inputs = encoder_inputs(self, self.pipe.tokenizer, self.pipe.text_encoder, cleaned, self.text_length, zero_pads)
        states = self.pipe.text_encoder(**inputs).last_hidden_state * inputs["attention_mask"][..., None]
        return {"context": pad(states, (0, 0, 0, self.text_length - states.shape[1]))}

    def predict(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        """Predict the velocity. Each of Wan 2.2's two transformers takes the samples on its side of the boundary."""
        latents, sigmas = self.noisy_latents(batch)
        if self.boundary is None:  # no mask, which would have to come from the device
            return self._predict_by("transformer", latents, sigmas, conditioning["context"])
        prediction, high = torch.zeros_like(latents), sigmas >= self.boundary
        for name, chosen in zip(self.denoisers, (high, ~high)):
            if chosen.any():
                part = self._predict_by(name, latents[chosen], sigmas[chosen], conditioning["context"][chosen])
                prediction = prediction.index_put((chosen,), part)
        return prediction

    def _predict_by(self, name: str, latents: Tensor, sigmas: Tensor, context: Tensor) -> Tensor:
        """Return one transformer's prediction, float32."""
        model, dtype, steps = getattr(self.pipe, name), self.dtypes[name], self.scheduler.config.num_train_timesteps
        return model(latents.to(dtype), sigmas * steps, context.to(dtype)).sample.float()

    def generate(self, prompt: str, resolution: int, generator: torch.Generator) -> Image.Image:
        """Generate a video of one frame at the training resolution."""
        size = {"height": resolution, "width": resolution, "num_frames": 1}
        return self.pipe(prompt, generator=generator, output_type="pil", **size).frames[0][0]
