"""Validation images during training: the same prompts and seeds every so many steps, kept as a strip; and curves."""

import copy
from collections.abc import Sequence
from inspect import signature
from pathlib import Path

import torch
from diffusers import ModularPipeline
from PIL import Image, ImageDraw, ImageFont

from ..families.base import Family
from ..pipeline.protocols import Pipeline
from ..pipeline.text_encoders import find_text_encoders

GAP = 4  # pixels between pictures


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
    images = []
    try:
        for i, prompt in enumerate(prompts):
            images.append(family.generate(prompt, resolution, torch.Generator("cpu").manual_seed(seed + i)))
    finally:
        pipe._progress_bar_config, pipe.scheduler = before, scheduler
        for tokenizer, side in sides.items():
            tokenizer.padding_side = side
    return images


def check(pipe: Pipeline) -> None:
    """Check that a pipeline can generate validation images.

    Raises:
        ValueError: if the pipeline's call needs more than a prompt.
    """
    parameters = signature(pipe.__call__).parameters
    more = [n for n in ("image", "control_image", "video") if n in parameters]
    if more or isinstance(pipe, ModularPipeline):
        raise ValueError(
            f"{type(pipe).__name__} generates from more than a prompt ({', '.join(more) or 'its blocks'}): leave out "
            "`validation_prompt`, or train a text-to-image pipeline of the same components, which then has the concept as well."
        )


def strip(pictures: dict[int, list[Image.Image]]) -> Image.Image:
    """One column for each step, one row for each prompt."""
    first = next(iter(pictures.values()))
    scale = -(-96 // first[0].width)  # tiny pictures are enlarged, so that the steps can be read
    width, height = (side * scale + GAP for side in first[0].size)
    font, header = ImageFont.load_default(max(12, height // 16)), max(16, height // 12)
    sheet = Image.new("RGB", (len(pictures) * width, header + len(first) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (step, images) in enumerate(pictures.items()):
        draw.text((column * width + 2, 1), f"step {step}", "black", font)
        for row, image in enumerate(images):
            enlarged = image.resize((width - GAP, height - GAP), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (column * width, header + row * height))
    return sheet


def plot(history: list[dict[str, float]], path: str | Path) -> None:
    """Loss, angle to the initializer and norm over the steps, as a picture. Needs matplotlib (`diffusers-dti[plot]`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Curves are drawn by matplotlib: pip install diffusers-dti[plot]") from error
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    names = {"loss": "loss", "angle": "angle to the initializer (°)", "norm": "norm of the embedding"}
    for axes, (key, name) in zip(figure.subplots(1, 3), names.items()):
        axes.plot([x["step"] for x in history], [x[key] for x in history])
        axes.set(title=name, xlabel="step")
        if key != "loss":
            axes.set_ylim(bottom=0)
    figure.savefig(path)
