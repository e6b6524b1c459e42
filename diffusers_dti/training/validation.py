"""Pictures on the way: the same prompts and seeds every so many steps, kept as a strip, and curves of the figures."""

import copy
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import ModularPipeline
from PIL import Image, ImageDraw, ImageFont

from ..families.base import Family
from ..pipeline.text_encoders import find_text_encoders

GAP = 4  # pixels between pictures


def generate(family: Family, prompts: Sequence[str], resolution: int, seed: int) -> list[Image.Image]:
    """A picture of each prompt from its own seed; progress bar, scheduler and random state stay as they are."""
    pipe = family.pipe
    before, scheduler = getattr(pipe, "_progress_bar_config", {}), pipe.scheduler
    sides = {e.tokenizer: e.tokenizer.padding_side for e in find_text_encoders(pipe).values()}  # SANA's call sets it
    pipe.set_progress_bar_config(**{**before, "disable": True})
    pipe.scheduler = copy.deepcopy(scheduler)
    try:
        return [
            family.generate(prompt, resolution, torch.Generator("cpu").manual_seed(seed + i))
            for i, prompt in enumerate(prompts)
        ]
    finally:
        pipe._progress_bar_config, pipe.scheduler = before, scheduler
        for tokenizer, side in sides.items():
            tokenizer.padding_side = side


def check(pipe: Any) -> None:
    """Whether pictures on the way can be drawn.

    Raises:
        ValueError: for pipelines whose call needs more than a prompt.
    """
    parameters = signature(pipe.__call__).parameters
    more = [n for n in ("image", "control_image", "video") if n in parameters]
    if more or isinstance(pipe, ModularPipeline):
        raise ValueError(
            f"{type(pipe).__name__} draws from more than a prompt ({', '.join(more) or 'its blocks'}): leave "
            "`validation_prompt` out, or train a text-to-image pipeline of the same components, which shares what is learned."
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
