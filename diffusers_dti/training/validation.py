"""Validation images during training: the same prompts and seeds every so many steps, kept as a strip; and curves."""

import copy
from collections.abc import Sequence
from inspect import signature
from pathlib import Path

import torch
from diffusers import ModularPipeline
from PIL import Image
from torch import nn

from ..families.base import Family
from ..figures import SheetRow, figure_class, paint_sheet
from ..pipeline.offload import moved
from ..pipeline.text_encoders import find_text_encoders


def as_list(prompts: str | Sequence[str]) -> list[str]:
    """Return one prompt or several as a list."""
    return [prompts] if isinstance(prompts, str) else list(prompts)


def generate(family: Family, prompts: Sequence[str], resolution: int, seed: int) -> list[Image.Image]:
    """Generate an image of each prompt from its own seed. Progress bar, scheduler and random state stay as they are."""
    pipe = family.pipe
    before, scheduler = getattr(pipe, "_progress_bar_config", {}), pipe.scheduler
    sides = {e.tokenizer: e.tokenizer.padding_side for e in find_text_encoders(pipe).values()}  # SANA's call sets it
    pipe.set_progress_bar_config(**{**before, "disable": True})
    pipe.scheduler = copy.deepcopy(scheduler)
    images, models = [], [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    try:
        with moved(models, family.device):
            for i, prompt in enumerate(prompts):
                images.append(family.generate(prompt, resolution, torch.Generator("cpu").manual_seed(seed + i)))
    finally:
        pipe._progress_bar_config, pipe.scheduler = before, scheduler
        for tokenizer, side in sides.items():
            tokenizer.padding_side = side
    return images


def check(family: Family) -> None:
    """Check that a family's pipeline can generate validation images.

    Raises:
        ValueError: if the pipeline's call needs more than a prompt.
    """
    pipe = family.pipe
    parameters = signature(pipe.__call__).parameters
    more = [n for n in ("image", "control_image", "video") if n in parameters and type(pipe).__name__ not in family.editors]
    if more or isinstance(pipe, ModularPipeline):
        raise ValueError(
            f"{type(pipe).__name__} generates from more than a prompt ({', '.join(more) or 'its blocks'}): leave out "
            "`validation_prompt`, or train a text-to-image pipeline of the same components, which then has the concept as well."
        )


def strip(images: dict[int, list[Image.Image]]) -> Image.Image:
    """Paint the validation images of a run: a column for each step, a row for each prompt.

    Args:
        images: one image for each prompt, by step.
    """
    first = next(iter(images.values()))
    scale = -(-96 // first[0].width)  # tiny images are enlarged by a whole number, so that the steps can be read
    rows = [SheetRow(row) for row in zip(*images.values(), strict=True)]
    return paint_sheet(rows, [f"step {step}" for step in images], scale * first[0].width)


def plot(history: list[dict[str, float]], path: str | Path) -> None:
    """Plot loss, angle to the initializer and norm over the steps. Needs matplotlib (`diffusers-dti[plot]`).

    Args:
        history: the log entries, each with "step", "loss", "angle" (degrees) and "norm", some with "heldout_loss".
        path: the file for the plot.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure = figure_class()(figsize=(9, 2.8), layout="constrained")
    titles = {"loss": "loss", "angle": "angle to the initializer (°)", "norm": "norm of the embedding"}
    for axes, (key, title) in zip(figure.subplots(1, 3), titles.items()):
        axes.plot([entry["step"] for entry in history], [entry[key] for entry in history], label="training")
        heldout = [(entry["step"], entry["heldout_loss"]) for entry in history if "heldout_loss" in entry]
        if key == "loss" and heldout:
            axes.plot(*zip(*heldout), label="held out")
            axes.legend()
        axes.set(title=title, xlabel="step")
        if key != "loss":
            axes.set_ylim(bottom=0)
    figure.savefig(path)
