"""Photos in, whatever they come in: a folder, files, pictures, a `datasets.Dataset`; with captions and masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from PIL import Image, ImageOps

logger = logging.get_logger(__name__)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic"}
CAPTION_COLUMNS = ("text", "caption", "prompt")

ImageInput = str | Path | Image.Image


@dataclass(frozen=True)
class Photo:
    """A photo of the subject."""

    image: Image.Image  # RGB, upright
    caption: str | None = None  # with "{}" for the placeholder
    mask: Image.Image | None = None  # L, white where the subject is


def load_photos(
    images: ImageInput | Sequence[ImageInput] | Any,
    captions: Sequence[str | None] | None = None,
    masks: Sequence[ImageInput | None] | None = None,
) -> list[Photo]:
    """Photos from a folder, a file, a picture, a list of files and pictures, or a `datasets.Dataset`.

    Args:
        images: where from. In a folder a `.txt` file beside a photo is its caption; in a data set, a column named "text",
            "caption" or "prompt". A picture's transparent part is masked out.
        captions: a caption for each photo with "{}" for the placeholder, or None for templates. They replace those found.
        masks: a picture for each photo, white where the subject is, or None. They replace transparency.

    Raises:
        ValueError: for no photos at all, or captions and masks that do not fit them. OSError: for a file that is no picture.
    """
    found: Sequence[tuple[ImageInput, str | None]]
    if hasattr(images, "column_names"):
        found = _from_dataset(images)
    elif isinstance(images, str | Path) and Path(images).is_dir():
        found = pictures_in(Path(images))
    else:
        found = [(image, None) for image in ([images] if isinstance(images, str | Path | Image.Image) else images)]
    if not found:
        raise ValueError("No pictures were given: 3 to 6 photos of the subject are needed.")
    for name, values in (("captions", captions), ("masks", masks)):
        if values is not None and (isinstance(values, str) or len(values) != len(found)):
            raise ValueError(f"{name} must be a list with an entry (or None) for each of the {len(found)} photos.")
    photos = []
    for number, (source, caption) in enumerate(found):
        image = _open(source)
        mask = image.getchannel("A") if image.has_transparency_data and image.mode == "RGBA" else None
        if masks is not None:
            mask = None if masks[number] is None else _open(masks[number]).convert("L").resize(image.size)
        elif mask is not None and mask.getextrema()[0] == 255:
            mask = None
        if captions is not None:
            caption = captions[number]
        if caption is not None and "{}" not in caption:
            raise ValueError(f'The caption of photo {number + 1}, {caption!r}, needs a "{{}}" where the placeholder goes.')
        photos.append(Photo(_opaque(image), caption, mask))
    return photos


def pictures_in(folder: Path) -> list[tuple[Path, str | None]]:
    """The folder's pictures in the order of their names, each with its caption.

    Raises:
        ValueError: where there are none.
    """
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    pictures = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    if not pictures:
        raise ValueError(f"{folder} has no pictures ({', '.join(sorted(IMAGE_SUFFIXES))}): give a folder of 3 to 6 photos.")
    sidecars = {p: p.with_suffix(".txt") for p in pictures}
    if others := [p.name for p in files if p not in sidecars and p not in sidecars.values()]:
        logger.warning(f"Skipped in {folder}, being no pictures: {', '.join(others)}.")
    return [(p, text.read_text().strip() if text.is_file() else None) for p, text in sidecars.items()]


def _from_dataset(dataset: Any) -> list[tuple[ImageInput, str | None]]:
    if "image" not in dataset.column_names:
        raise ValueError(f'The data set needs a column "image"; it has {", ".join(dataset.column_names)}.')
    column = next((c for c in CAPTION_COLUMNS if c in dataset.column_names), None)
    return [(row["image"], row[column] if column else None) for row in dataset]


def _open(source: ImageInput) -> Image.Image:
    """Upright, in mode RGB or RGBA."""
    image = source
    if not isinstance(source, Image.Image):
        try:
            image = Image.open(source)
            image.load()
        except OSError as error:
            raise OSError(f"{source} is not a picture that can be opened, replace it or take it out: {error}") from error
    image = ImageOps.exif_transpose(image)
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _opaque(image: Image.Image) -> Image.Image:
    """On white: what is transparent may hold any colour."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
