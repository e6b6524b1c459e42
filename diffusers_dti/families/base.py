"""The base class of architectures: what training needs to know about one, and the batch that it gets."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import SchedulerMixin
from PIL import Image
from torch import Tensor, nn

from ..pipeline.offload import moved, offload_disabled
from ..pipeline.protocols import Pipeline, Tokenizer

Conditioning = dict[str, Tensor]
"""What a denoiser gets to know about the prompts: the text encoders' states, masks and pooled states, by name.

"context" is the states of the tokens, (n, tokens, d). Several encoders' states are side by side, in the encoders' order.
"""


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs, for n samples.

    Args:
        latents: (n, c, h, w) float32, or (n, c, frames, h, w).
        noise: in the shape of `latents`.
        weights: (n, 1, h, w), how much each place counts in the loss, with mean 1 in each sample; None if all count alike.
        timesteps: (n,) int64, indices into the training scheduler's noise levels.
        prompts: a prompt for each sample.
        original_sizes: height and width of each photo in pixels.
        crop_corners: top and left of each crop in the resized photo, in pixels.
        resolution: height and width of the crops in pixels.
        zero_pads: the number of tokens of zero embedding before each prompt.
    """

    latents: Tensor
    noise: Tensor
    weights: Tensor | None
    timesteps: Tensor
    prompts: list[str]
    original_sizes: list[tuple[int, int]]
    crop_corners: list[tuple[int, int]]
    resolution: tuple[int, int]
    zero_pads: list[int]


class Family(ABC):
    """An architecture, bound to one of its pipelines.

    To add one, subclass this in a file of its own, list the class in `families.FAMILIES`, and add a row of the same name to
    `concept.registry.MODEL_FAMILIES`. Override the class attributes and the abstract methods.

    Args:
        pipe: a pipeline that `matches` accepts.

    Attributes:
        name: the family's name in messages, files and model cards.
        denoisers: the components that predict, such as ("unet",).
        text_length: the number of tokens that prompts are truncated to.
        defaults: the family's values for settings of `DTIConfig` that the user leaves at None.
        token_states: whether "context" has one state for each token of the tokenizers, in their order, so that the context loss
            can compare them.
        editors: the names of the family's pipelines that take images too, and generate from a prompt alone without them.
        scheduler: the forward process in training.

    Raises:
        ValueError: if the pipeline's scheduler does not describe a forward process that the family can be trained with.
    """

    name: ClassVar[str]
    denoisers: ClassVar[tuple[str, ...]]
    text_length: int
    defaults: ClassVar[Mapping[str, Any]]
    token_states: ClassVar[bool] = True
    editors: ClassVar[tuple[str, ...]] = ()

    def __init__(self, pipe: Pipeline):
        self.pipe = pipe
        self.scheduler = self.training_scheduler()

    @classmethod
    @abstractmethod
    def matches(cls, pipe: Pipeline) -> bool:
        """Return whether a pipeline belongs to this family and has all the components that training needs."""

    @abstractmethod
    def training_scheduler(self) -> SchedulerMixin:
        """Return the forward process that the pipeline's scheduler describes, regardless of its sampler.

        Raises:
            ValueError: if the family cannot be trained with it.
        """

    @property
    @abstractmethod
    def resolution_step(self) -> int:
        """The number of pixels that the resolution must be a multiple of."""

    @torch.no_grad()
    def encode_images(self, crops: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Encode crops, (3, h, w) in [-1, 1], one by one in float32, as `encode_image` does."""
        vae, encoded = self.pipe.vae, []
        with moved([vae], self.device), upcast(vae):
            for pixels in crops:
                mean, std = self.encode_image(pixels[None].to(self.device))
                encoded.append((mean.cpu(), std.cpu()))
        return encoded

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of a crop's latents, scaled as the denoiser takes them.

        Args:
            pixels: (1, 3, h, w) in [-1, 1], on the VAE's device.

        Returns:
            Two tensors, (1, c, h, w) or (1, c, 1, h, w) float32.
        """

    def clean_prompt(self, prompt: str) -> str:
        """Return a prompt as the pipeline gives it to its tokenizers; by default unchanged."""
        return prompt

    def token_ids(self, tokenizer: Tokenizer, prompt: str, length: int, padding: bool | str = False) -> Tensor:
        """Return the ids of a prompt's tokens, truncated to `length`, (tokens,) int64."""
        tokens = tokenizer(prompt, padding=padding, truncation=True, max_length=length, return_tensors="pt")
        ids: Tensor = tokens.input_ids[0]
        return ids

    def padded_ids(self, tokenizer: Tokenizer, prompts: Sequence[str], length: int | None = None) -> Tensor:
        """Return the ids of n prompts at a fixed length, by default the tokenizer's own, (n, length)."""
        length = length or tokenizer.model_max_length
        return torch.stack([self.token_ids(tokenizer, prompt, length, "max_length") for prompt in prompts])

    @contextmanager
    def tokenized_once(self) -> Iterator[None]:
        """Tokenize each prompt once within the block, in which no tokenizer may change.

        Training draws the same few prompts again and again. Their ids are not kept longer than a run, since they change with
        the concepts that are loaded.
        """
        vars(self)["token_ids"] = functools.cache(self.token_ids)
        try:
            yield
        finally:
            vars(self).pop("token_ids", None)  # unless a run within this one has

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str], zero_pads: Sequence[int]) -> Conditioning:
        """Encode n prompts as the pipeline does. Gradients reach the rows that training has swapped in.

        Args:
            prompts: n prompts, which contain placeholders.
            zero_pads: for each prompt, the number of tokens of zero embedding before its first word.
        """

    @abstractmethod
    def predict(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        """Return the denoiser's prediction for the batch's noisy latents, in the shape of the latents."""

    @abstractmethod
    def target(self, batch: Batch) -> Tensor:
        """Return what the denoiser should have predicted."""

    def loss(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        """Return the mean squared error of the prediction, a scalar in float32. Masks of photos weight it."""
        return self._squared_errors(batch, conditioning).mean()

    def sample_losses(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        """Return the loss of each sample by itself, (n,) float32."""
        return self._squared_errors(batch, conditioning).flatten(1).mean(1)

    def _squared_errors(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        """Return the weighted squared error of each entry, in the shape of the latents, float32."""
        squared = (self.predict(batch, conditioning).float() - self.target(batch).float()).square()
        if batch.weights is None:
            return squared
        n, height, width = len(squared), *squared.shape[-2:]  # latents may have frames
        return batch.weights.view(n, *[1] * (squared.ndim - 3), height, width) * squared

    @abstractmethod
    def generate(self, prompt: str, resolution: int, generator: torch.Generator) -> Image.Image:
        """Generate an image for validation.

        Args:
            prompt: the prompt.
            resolution: the side of the training crops, in pixels.
            generator: the source of noise.
        """

    def present_denoisers(self) -> dict[str, Any]:
        """Return the denoisers that the pipeline has, by component."""
        components = self.pipe.components
        return {n: components[n] for n in self.denoisers if components.get(n) is not None}

    def forget(self) -> None:
        """Forget what was read once, since the pipeline may have changed."""
        for cls in type(self).__mro__:
            for name, attribute in vars(cls).items():
                if isinstance(attribute, functools.cached_property):
                    vars(self).pop(name, None)

    @functools.cached_property
    def device(self) -> torch.device:
        """The device that the pipeline computes on. It is read once, because diffusers walks through all modules for it."""
        return self.pipe._execution_device

    @functools.cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype that each denoiser computes in, read once as well."""
        return {name: denoiser.dtype for name, denoiser in self.present_denoisers().items()}


def uncompiled_component(pipe: Pipeline, name: str) -> nn.Module | None:
    """Return a component of a pipeline, without the wrapper of `torch.compile`; None if the pipeline lacks it."""
    module = pipe.components.get(name)
    return getattr(module, "_orig_mod", module)


@contextmanager
def upcast(module: nn.Module) -> Iterator[None]:
    """Convert a half precision module to float32 within the block: SDXL's VAE overflows in float16."""
    parameters = [(p, p.dtype) for p in module.parameters() if p.is_floating_point()]
    buffers = []
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_floating_point():
                buffers.append((owner, name, buffer.dtype))
    with offload_disabled(module):
        nn.Module.to(module, torch.float32)  # diffusers' own `to` would warn
    try:
        yield
    finally:
        with offload_disabled(module):
            for p, dtype in parameters:
                p.data = p.data.to(dtype)
            for owner, name, dtype in buffers:  # `to` has replaced the buffers themselves, not their data
                owner._buffers[name] = getattr(owner, name).to(dtype)
