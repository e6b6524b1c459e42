"""Sheets of labeled images, and the one check that matplotlib is installed."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 4  # pixels between tiles
MIN_FONT_SIZE = 14  # pixels; larger tiles have larger text
CHARACTER_WIDTH = 0.55  # of an average character, as a share of the font size
LINE_HEIGHT = 1.35  # as a share of the font size
LABEL_CHARACTERS = 26  # in a line of a label
NOTE_CHARACTERS = 16  # in a line of a note


def figure_class() -> "type[Figure]":
    """Return `matplotlib.figure.Figure`.

    Plots are made with this class and not with `pyplot`, which would keep every figure and might open a window.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "diffusers-dti[plot]"') from error
    return Figure


@dataclass(frozen=True)
class SheetRow:
    """A row of a sheet.

    Args:
        images: the images, or paths of image files, which are opened one at a time; None leaves a cell empty.
        label: text to the left of the images.
        note: text to the right of the images. Its line breaks are kept.
    """

    images: Sequence[Image.Image | Path | None]
    label: str = ""
    note: str = ""


def paint_sheet(rows: Sequence[SheetRow], titles: Sequence[str] = (), tile_width: int = 192) -> Image.Image:
    """Paint rows of images with their labels and notes.

    Long titles and labels are wrapped, and labels are cut off at the height of their row.

    Args:
        rows: the rows, from top to bottom.
        titles: a title for each column, above the first row.
        tile_width: width of every image on the sheet, in pixels. The first image decides their height.

    Returns:
        The sheet, RGB on white.

    Raises:
        ValueError: if there is no image.
    """
    tile_height = _tile_height(rows, tile_width)
    size = max(MIN_FONT_SIZE, tile_height // 16)
    font, line = ImageFont.load_default(size), round(LINE_HEIGHT * size)
    wrapped_titles = [_wrap(title, int(tile_width / (CHARACTER_WIDTH * size))) for title in titles]
    left = _text_width(LABEL_CHARACTERS, size) if any(row.label for row in rows) else 0
    right = _text_width(NOTE_CHARACTERS, size) if any(row.note for row in rows) else 0
    top = max((len(lines) for lines in wrapped_titles), default=0) * line + GAP
    columns = max(len(titles), *(len(row.images) for row in rows))
    width = left + columns * (tile_width + GAP) + right
    sheet = Image.new("RGB", (width, top + len(rows) * (tile_height + GAP)), "white")
    canvas = ImageDraw.Draw(sheet)

    def write(x: int, y: int, lines: Sequence[str]) -> None:
        for number, text in enumerate(lines):
            canvas.text((x, y + number * line), text, "black", font)

    for column, lines in enumerate(wrapped_titles):
        write(left + column * (tile_width + GAP), 0, lines)
    for number, row in enumerate(rows):
        y = top + number * (tile_height + GAP)
        write(GAP, y + GAP, _wrap(row.label, LABEL_CHARACTERS)[: max(tile_height // line, 1)])
        for column, image in enumerate(row.images):
            if image is not None:
                sheet.paste(_tile(image, (tile_width, tile_height)), (left + column * (tile_width + GAP), y))
        write(width - right + GAP, y + GAP, row.note.splitlines())
    return sheet


def _tile_height(rows: Sequence[SheetRow], tile_width: int) -> int:
    for row in rows:
        for image in row.images:
            if image is not None:
                width, height = _size(image)
                return max(round(tile_width * height / width), 1)
    raise ValueError("A sheet needs at least one image.")


def _size(image: Image.Image | Path) -> tuple[int, int]:
    if isinstance(image, Image.Image):
        return image.size
    with Image.open(image) as opened:
        return opened.size


def _tile(image: Image.Image | Path, size: tuple[int, int]) -> Image.Image:
    if isinstance(image, Path):
        with Image.open(image) as opened:
            return _tile(opened, size)
    # The pixels of small images stay visible.
    how = Image.Resampling.NEAREST if image.width < size[0] else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, how)


def _wrap(text: str, characters: int) -> list[str]:
    lines = []
    for line in text.splitlines():
        lines += textwrap.wrap(line, max(characters, 1))
    return lines


def _text_width(characters: int, size: int) -> int:
    return round(CHARACTER_WIDTH * characters * size)
