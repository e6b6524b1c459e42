"""What differs from one architecture to the next: one base class, one class each."""

from typing import Any

from .base import Batch, Conditioning, Family
from .sana import Sana
from .stable_diffusion import StableDiffusion, StableDiffusionXL
from .wan import Wan

__all__ = ["FAMILIES", "Batch", "Conditioning", "Family", "find_family"]

FAMILIES: list[type[Family]] = [StableDiffusionXL, StableDiffusion, Sana, Wan]


def find_family(pipe: Any) -> Family:
    """Find the family of a pipeline and bind it.

    Raises:
        ValueError: if no family fits, listing those there are.
    """
    for family in FAMILIES:
        if family.matches(pipe):
            return family(pipe)
    names = ", ".join(family.name for family in FAMILIES)
    raise ValueError(
        f"Training supports {names}, with all their components; {type(pipe).__name__} is not one of them. "
        "Loading may still work."
    )
