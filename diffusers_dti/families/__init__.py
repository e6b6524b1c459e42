"""What differs from one architecture to the next: a module each, all with the same functions.

`matches(pipe)`, `DEFAULTS`, `training_scheduler(pipe)`, `encode_images(pipe, crops)`, `encode_prompts(pipe, prompts)` and
`loss(pipe, scheduler, batch, conditioning)`.
"""

from types import ModuleType
from typing import Any

from . import sd, sdxl

FAMILIES: tuple[ModuleType, ...] = (sdxl, sd)


def find(pipe: Any) -> ModuleType:
    """The family of a pipeline.

    Raises:
        ValueError: where no family fits, listing those there are.
    """
    for family in FAMILIES:
        if family.matches(pipe):
            return family
    names = ", ".join(f.NAME for f in FAMILIES)
    raise ValueError(f"Training is supported for {names}; {type(pipe).__name__} is none of them (loading may still work).")
