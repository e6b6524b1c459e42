"""The supported architectures: one base class, and one class for each."""

from ..pipeline.protocols import Pipeline
from .base import Batch, Conditioning, Family
from .flux import Flux
from .flux2_klein import Flux2Klein
from .lumina2 import Lumina2
from .pixart import PixArt
from .qwen_image import QwenImage
from .sana import Sana
from .stable_diffusion import StableDiffusion, StableDiffusionXL
from .stable_diffusion_3 import StableDiffusion3
from .wan import Wan
from .z_image import ZImage

__all__ = ["FAMILIES", "Batch", "Conditioning", "Family", "find_family"]

FAMILIES: list[type[Family]] = [
    StableDiffusionXL, StableDiffusion, Sana, Wan, ZImage, Lumina2, StableDiffusion3, Flux, Flux2Klein, QwenImage, PixArt,
]  # fmt: skip


def find_family(pipe: Pipeline) -> Family:
    """Find the family of a pipeline and bind it to the pipeline.

    Raises:
        TypeError: if it is not a pipeline.
        ValueError: if no family fits, listing the families, or if the pipeline's scheduler cannot be trained with.
    """
    if not hasattr(pipe, "components"):
        raise TypeError(f"A pipeline is needed, got {pipe!r:.80}: open it with `DiffusionPipeline.from_pretrained`.")
    for family in FAMILIES:
        if family.matches(pipe):
            return family(pipe)
    names = ", ".join(family.name for family in FAMILIES)
    raise ValueError(
        f"Training supports {names}, with all their components; {type(pipe).__name__} is not one of them. "
        "Loading may still work."
    )
