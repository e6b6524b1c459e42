"""What differs from one architecture to the next: a module each, all with the same functions.

`NAME`, `DEFAULTS` (of the settings), `DENOISERS` (components), `TEXT_LENGTH` (tokens that prompts are cut off at);
`matches(pipe)`, `training_scheduler(pipe)`, `resolution_step(pipe)`, `encode_images(pipe, crops)`,
`encode_prompts(pipe, prompts, zero_pads)`, `loss(pipe, scheduler, batch, conditioning)` and, for validation,
`draw(pipe, prompt, resolution, generator)`.
"""

from types import ModuleType
from typing import Any

from . import sana, sd, sdxl, wan

FAMILIES: tuple[ModuleType, ...] = (sdxl, sd, sana, wan)


def find(pipe: Any) -> ModuleType:
    """The family of a pipeline.

    Raises:
        ValueError: where no family fits, listing those there are.
    """
    for family in FAMILIES:
        if family.matches(pipe):
            return family
    names = ", ".join(f.NAME for f in FAMILIES)
    raise ValueError(
        f"Training is supported for {names}, with all their components; {type(pipe).__name__} is none of them (loading may "
        "still work)."
    )
