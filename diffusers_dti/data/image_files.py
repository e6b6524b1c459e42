"""Open one image of any kind as 8-bit RGB, with its transparency if it has some."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

MAX_ELONGATION = 10  # long side : short side; training enlarges by the short side, and a strip would take gigabytes
HEIF = (".heic", ".heif")  # the format of iPhones, which Pillow cannot read by itself


def not_a_photo(given: object) -> TypeError:
    return TypeError(
        f"A photo is a path or a PIL image, not {type(given).__name__}: `PIL.Image.fromarray` makes an image of an array."
    )


def open_image(source: Any) -> Image.Image:
    """Return an image upright, in mode RGB or RGBA."""
    if not isinstance(source, str | Path | Image.Image):
        raise not_a_photo(source)
    try:
        image = source if isinstance(source, Image.Image) else _open_file(Path(source))
        image.load()
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # damaged bytes lead to errors of many kinds
        raise OSError(f"{source} is not an image that can be opened, replace or remove it: {error}") from error
    if image.mode.startswith(("I", "F")):
        image = _in_8_bits(image)
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _open_file(path: Path) -> Image.Image:
    if not path.is_file():  # opening a pipe would wait for ever
        raise OSError("there is no regular file of that name")
    suffix = path.suffix.lower()
    if suffix in HEIF and suffix not in Image.registered_extensions():
        try:
            from pillow_heif import register_heif_opener
        except ImportError as error:
            raise OSError('HEIC needs the package pillow-heif: `pip install "diffusers-dti[heif]"`') from error
        register_heif_opener()
    return Image.open(path)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Convert a picture of 16 or 32 bits by its range. Pillow would cut it off at 255."""
    values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
    # The other modes do not say what white is.
    whites = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    white = next((white for white in whites if values.max() <= white), values.max())
    return Image.fromarray((values.clip(0, white) * (255 / white) + 0.5).astype(np.uint8))


def check_elongation(name: str, image: Image.Image) -> None:
    if max(image.size) > MAX_ELONGATION * min(image.size):
        width, height = image.size
        raise ValueError(
            f"{name} is {width} x {height} pixels: cut it, so that its long side is at most {MAX_ELONGATION} times its short "
            "side."
        )
