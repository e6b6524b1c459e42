"""What training needs to know of an architecture: the base class, and the batch that it is given."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import SchedulerMixin
from PIL import Image
from torch import Tensor, nn

Conditioning = dict[str, Tensor]
"""What a denoiser is told of the prompts: the text encoders' states, masks and pooled states, by name."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs, for n samples."""

    latents: Tensor  # (n, c, h, w) float32, or (n, c, frames, h, w)
    noise: Tensor  # the shape of `latents`
    weights: Tensor | None  # (n, 1, h, w), mean 1 in each sample: how much each place counts in the loss
    timesteps: Tensor  # (n,) int64, indices into the training scheduler's noise levels
    prompts: list[str]
    original_sizes: list[tuple[int, int]]  # height, width of each photo
    crop_corners: list[tuple[int, int]]  # top, left of each crop in the resized photo
    resolution: tuple[int, int]  # height, width of the crops
    zero_pads: list[int]  # tokens of zero embedding before each prompt


class Family(ABC):
    """An architecture, bound to one pipeline of it.

    To add one, subclass this in a file of its own, list the class in `families.FAMILIES`, and add a row of the same name to
    `concept.registry.MODEL_FAMILIES`. Override the class attributes and the abstract methods.

    Args:
        pipe: a pipeline that `matches` accepts.

    Attributes:
        name: what messages, files and model cards call the family.
        denoisers: components that predict, such as ("unet",).
        text_length: number of tokens that prompts are cut off at.
        defaults: the family's settings in `DTIConfig`, where the user gives none.
        scheduler: the forward process in training.

    Raises:
        ValueError: if the pipeline's scheduler describes no forward process that the family can be trained with.
    """

    name: ClassVar[str]
    denoisers: ClassVar[tuple[str, ...]]
    text_length: ClassVar[int]
    defaults: ClassVar[Mapping[str, Any]]

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.scheduler = self.training_scheduler()

    @classmethod
    @abstractmethod
    def matches(cls, pipe: Any) -> bool:
        """Whether a pipeline belongs to this family and has all the components that training needs."""

    @abstractmethod
    def training_scheduler(self) -> SchedulerMixin:
        """Return the forward process that the pipeline's scheduler describes, regardless of its sampler."""

    @property
    @abstractmethod
    def resolution_step(self) -> int:
        """The number of pixels that the resolution must be a multiple of."""

    @abstractmethod
    def encode_images(self, crops: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Encode crops, (3, h, w) in [-1, 1], to the mean and standard deviation of their scaled latents.

        Returns:
            For each crop two tensors of a batch of one, (1, c, h, w) or (1, c, 1, h, w), float32 on the CPU.
        """

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str], zero_pads: Sequence[int]) -> Conditioning:
        """Encode n prompts the way the pipeline does; gradients reach the rows that are swapped in.

        Args:
            prompts: n prompts with their placeholders.
            zero_pads: for each prompt, the number of tokens of zero embedding before its first word.
        """

    @abstractmethod
    def predict(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        """Return the denoiser's prediction for the batch's noisy latents, in the shape of the latents."""

    @abstractmethod
    def target(self, batch: Batch) -> Tensor:
        """Return what the denoiser should have predicted."""

    def loss(self, batch: Batch, conditioning: Conditioning) -> Tensor:
        """Return the squared error of the prediction, weighted where photos have masks: a scalar in float32."""
        squared = (self.predict(batch, conditioning).float() - self.target(batch).float()).square()
        if batch.weights is None:
            return squared.mean()
        n, height, width = len(squared), *squared.shape[-2:]  # latents may have frames
        return (batch.weights.view(n, *[1] * (squared.ndim - 3), height, width) * squared).mean()

    @abstractmethod
    def generate(self, prompt: str, resolution: int, generator: torch.Generator) -> Image.Image:
        """Generate an image of a prompt, for validation."""

    def present_denoisers(self) -> dict[str, nn.Module]:
        """Return the denoisers that the pipeline has, by component."""
        return {n: self.pipe.components[n] for n in self.denoisers if self.pipe.components.get(n) is not None}


@contextmanager
def upcast(module: nn.Module) -> Iterator[None]:
    """Run a half precision module in float32 within the block: SDXL's VAE overflows in float16."""
    parameters = [(p, p.dtype) for p in module.parameters() if p.is_floating_point()]
    buffers = [
        (m, name, b.dtype) for m in module.modules() for name, b in m.named_buffers(recurse=False) if b.is_floating_point()
    ]
    nn.Module.to(module, torch.float32)  # diffusers' own `to` warns about what is intended here
    try:
        yield
    finally:
        for p, dtype in parameters:
            p.data = p.data.to(dtype)
        for m, name, dtype in buffers:  # `to` replaced them by new tensors
            m._buffers[name] = m._buffers[name].to(dtype)
