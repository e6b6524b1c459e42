"""Pictures of prompts on disk: drawn once, each from its own seed, and laid out on a contact sheet."""

import hashlib
import json
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

RESERVED_ARGUMENTS = (
    "self",
    "prompt",
    "generator",
    "output_type",
    "return_dict",
    "num_images_per_prompt",
    "num_videos_per_prompt",
)
KEY = "dti"  # of the PNG text that says what a picture was drawn from
TILE, GAP, LABEL, LINE = 192, 6, 200, 19  # pixels of the contact sheet


@dataclass(frozen=True)
class PlannedImage:
    """A picture to draw."""

    path: Path
    prompt: str
    seed: int

    @classmethod
    def named(cls, folder: Path, number: int, words: str, prompt: str, seed: int) -> "PlannedImage":
        """As `folder`/<seed>/<number>_<words>.png."""
        name = re.sub(r"[^A-Za-z0-9]+", "_", words).strip("_")[:80]
        return cls(folder / str(seed) / f"{number:02}_{name}.png", prompt, seed)


def generate(
    pipe: Any, pictures: Sequence[PlannedImage], origin: Mapping[str, Any], batch_size: int, call: Mapping[str, Any]
) -> None:
    """Draw the pictures that are not there yet, in batches; each is on disk as soon as its batch is done.

    Args:
        pipe: the pipeline, with all concepts loaded.
        pictures: what to draw; a video pipeline draws one frame.
        origin: what pictures depend on besides, as JSON values: a picture from another prompt, origin or call is drawn anew.
        batch_size: pictures drawn at once. Each starts from its own seed, so it plays no part for what is drawn.
        call: arguments of the pipeline's call.

    Raises:
        ValueError: for arguments that the call does not have, or that are not free.
    """
    parameters = signature(pipe.__call__).parameters
    free = [
        n for n, p in parameters.items() if n not in RESERVED_ARGUMENTS and p.kind is not p.VAR_KEYWORD
    ]  # which swallow misspellings
    if wrong := [name for name in call if name not in free]:
        raise ValueError(f"{type(pipe).__name__} cannot be called with {', '.join(wrong)}; there are {', '.join(free)}.")
    if "num_frames" in parameters:
        call = {"num_frames": 1, **call}
    # the origin by its digest: it may name folders of this machine
    common = {"origin": hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest(), "call": call}
    keys = {p: json.dumps({"prompt": p.prompt, "seed": p.seed, **common}, sort_keys=True) for p in pictures}
    missing = [p for p, key in keys.items() if read_provenance(p.path) != key]
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        with logging.tqdm(total=len(keys), initial=len(keys) - len(missing), desc="Drawing") as bar:
            for first in range(0, len(missing), batch_size):
                batch = missing[first : first + batch_size]
                generators = [torch.Generator("cpu").manual_seed(p.seed) for p in batch]
                out = pipe([p.prompt for p in batch], generator=generators, output_type="pil", **call)
                images = [frames[0] for frames in out.frames] if "frames" in out else out.images
                for picture, image in zip(batch, images, strict=True):
                    _save(image, picture.path, keys[picture])
                bar.update(len(batch))
    finally:
        pipe._progress_bar_config = before


def read_provenance(path: Path) -> str | None:
    """What a picture says it was drawn from; None where there is none."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get(KEY)


def _save(image: Image.Image, path: Path, key: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngImagePlugin.PngInfo()
    text.add_text(KEY, key)
    temporary = path.with_name(f".{path.name}")
    image.save(temporary, format="PNG", pnginfo=text)
    os.replace(temporary, path)


def contact_sheet(pictures: Iterable[PlannedImage]) -> Image.Image:
    """A row for each prompt, a column for each seed."""
    rows: dict[str, dict[str, Path]] = {}
    for picture in pictures:
        rows.setdefault(picture.prompt, {})[f"seed {picture.seed}"] = picture.path
    return grid(rows)


def grid(rows: Mapping[str, Mapping[str, Path]]) -> Image.Image:
    """Pictures on disk in labelled rows, by the names of their columns; the first decides the tiles' shape."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    with Image.open(next(path for row in rows.values() for path in row.values())) as first:
        height = max(round(TILE * first.height / first.width), 1)
    font, header = ImageFont.load_default(14), 24
    sheet = Image.new("RGB", (LABEL + len(columns) * (TILE + GAP), header + len(rows) * (height + GAP)), "white")
    canvas = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        canvas.text((LABEL + column * (TILE + GAP), 4), name, "black", font)
    for number, (label, row) in enumerate(rows.items()):
        top = header + number * (height + GAP)
        lines = [part for line in label.splitlines() for part in textwrap.wrap(line, 26)]
        canvas.multiline_text((6, top + 6), "\n".join(lines[: max(height // LINE, 1)]), "black", font)
        for name, path in row.items():
            with Image.open(path) as image:
                # small pictures are enlarged with their pixels kept
                how = Image.Resampling.NEAREST if image.width < TILE else Image.Resampling.LANCZOS
                tile = image.convert("RGB").resize((TILE, height), how)
            sheet.paste(tile, (LABEL + columns.index(name) * (TILE + GAP), top))
    return sheet
