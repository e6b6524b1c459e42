"""The supported architectures: one base class, and one class for each."""

from ..pipeline.protocols import Pipeline
from .base import Batch, Conditioning, Family
from .sana import Sana
from .stable_diffusion import StableDiffusion, StableDiffusionXL
from .wan import Wan
from .z_image import ZImage

__all__ = ["FAMILIES", "Batch", "Conditioning", "Family", "find_family"]

FAMILIES: list[type[Family]] = [StableDiffusionXL, StableDiffusion, Sana, Wan, ZImage]


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
