"""Load photos, with captions and masks, from a folder, files, images, or a `datasets.Dataset`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from diffusers.utils import logging
from PIL import Image, ImageOps

from .text_files import read_text

logger = logging.get_logger(__name__)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic"}
MAX_ELONGATION = 10  # long side : short side; training enlarges by the short side, and a strip would take gigabytes
CAPTION_COLUMNS = ("text", "caption", "prompt")

ImageInput = str | Path | Image.Image
"""An image, or the path of an image file."""


@runtime_checkable
class ImageDataset(Protocol):
    """What is used of a `datasets.Dataset`."""

    @property
    def column_names(self) -> Sequence[str]: ...

    def __iter__(self) -> Iterator[Any]: ...


ImageSource = ImageInput | Sequence[ImageInput] | Iterator[ImageInput] | ImageDataset
"""What photos can be loaded from. A path may be a folder's."""


@dataclass(frozen=True)
class Photo:
    """A photo of the subject.

    Args:
        image: RGB, upright.
        caption: text with "{}" for the placeholder; None to use templates.
        mask: L, of the image's size, white where the subject is; None for the whole photo.
    """

    image: Image.Image
    caption: str | None = None
    mask: Image.Image | None = None


def load_photos(
    images: ImageSource,
    captions: Sequence[str | None] | None = None,
    masks: Sequence[ImageInput | None] | None = None,
) -> list[Photo]:
    """Load photos with their captions and masks.

    Args:
        images: a folder, a file, an image, a list or iterator of files and images, or a `datasets.Dataset`. In a folder, the
            caption of a photo is a `.txt` file of the same name, in UTF-8 or UTF-16; in a data set, a column named "text",
            "caption" or "prompt". The transparent part of an image is masked out.
        captions: a caption for each photo with "{}" for the placeholder, or None for templates. They replace captions of the
            folder or data set.
        masks: an image for each photo, white where the subject is, or None. They replace transparency.

    Raises:
        TypeError: if something is not a photo, such as an array.
        ValueError: if there are no photos, if one is a long strip, or if captions or masks do not fit them.
        OSError: if a file is not an image.
    """
    found = _find_images(images)
    if not found:
        raise ValueError("No images were given: 3 to 6 photos of the subject are needed.")
    _check_length("captions", captions, len(found))
    _check_length("masks", masks, len(found))
    photos = []
    for number, (source, caption) in enumerate(found):
        image = _open(source)
        _check_elongation(f"Photo {number + 1}" if isinstance(source, Image.Image) else str(source), image)
        mask = _transparency_mask(image) if masks is None else _open_mask(masks[number], image.size)
        if captions is not None:
            caption = captions[number]
        if not _is_caption(caption):
            raise ValueError(f'The caption of photo {number + 1}, {caption!r:.80}, needs a "{{}}" where the placeholder goes.')
        photos.append(Photo(_on_white(image), caption, mask))
    return photos


def _find_images(images: ImageSource) -> list[tuple[ImageInput, str | None]]:
    """Return the images, or the paths of their files, each with its caption."""
    if isinstance(images, str | Path):
        return list(images_in_folder(Path(images))) if Path(images).is_dir() else [(images, None)]
    if isinstance(images, Image.Image):
        return [(images, None)]
    if isinstance(images, ImageDataset):
        return _images_in_dataset(images)
    given: Any = images
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise _not_a_photo(given)
    return [(image, None) for image in given]


def images_in_folder(folder: Path) -> list[tuple[Path, str | None]]:
    """Return the image files of a folder, ordered by name, each with its caption.

    Raises:
        ValueError: if there are no image files, or a caption has an unknown encoding.
    """
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise ValueError(f"{folder} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}): give a folder of 3 to 6 photos.")
    captioned: list[tuple[Path, str | None]] = []
    used = set(images)
    for image in images:
        text = image.with_suffix(".txt")
        used.add(text)
        captioned.append((image, read_text(text).strip() if text.is_file() else None))
    others = [p.name for p in files if p not in used]
    if others:
        logger.warning(f"Skipped in {folder}, because they are not images: {', '.join(others)}.")
    return captioned


def _images_in_dataset(dataset: ImageDataset) -> list[tuple[ImageInput, str | None]]:
    columns = dataset.column_names
    if "image" not in columns:
        raise ValueError(f'The data set needs a column "image"; it has {", ".join(columns)}.')
    caption = next((name for name in CAPTION_COLUMNS if name in columns), None)
    return [(row["image"], row[caption] if caption else None) for row in dataset]


def _check_length(name: str, values: Any, count: int) -> None:
    if values is not None and (isinstance(values, str | Mapping) or not isinstance(values, Sized) or len(values) != count):
        raise ValueError(f"{name} must be a list with an entry (or None) for each of the {count} photos.")


def _is_caption(text: object) -> bool:
    return text is None or (isinstance(text, str) and "{}" in text)


def _not_a_photo(given: object) -> TypeError:
    return TypeError(
        f"A photo is a path or a PIL image, not {type(given).__name__}: `PIL.Image.fromarray` makes an image of an array."
    )


def _open(source: Any) -> Image.Image:
    """Return an image upright, in mode RGB or RGBA."""
    if not isinstance(source, str | Path | Image.Image):
        raise _not_a_photo(source)
    try:
        if not isinstance(source, Image.Image) and not Path(source).is_file():  # opening a pipe would wait for ever
            raise OSError("there is no regular file of that name")
        image = source if isinstance(source, Image.Image) else Image.open(source)
        image.load()
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # damaged bytes lead to errors of many kinds
        raise OSError(f"{source} is not an image that can be opened, replace or remove it: {error}") from error
    if image.mode.startswith(("I", "F")):
        image = _in_8_bits(image)
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Convert a picture of 16 or 32 bits by its range. Pillow would cut it off at 255."""
    values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
    # The other modes do not say what white is.
    whites = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    white = next((white for white in whites if values.max() <= white), values.max())
    return Image.fromarray((values.clip(0, white) * (255 / white) + 0.5).astype(np.uint8))


def _check_elongation(name: str, image: Image.Image) -> None:
    if max(image.size) > MAX_ELONGATION * min(image.size):
        width, height = image.size
        raise ValueError(
            f"{name} is {width} x {height} pixels: cut it, so that its long side is at most {MAX_ELONGATION} times its short "
            "side."
        )


def _open_mask(source: ImageInput | None, size: tuple[int, int]) -> Image.Image | None:
    return None if source is None else _open(source).convert("L").resize(size)


def _transparency_mask(image: Image.Image) -> Image.Image | None:
    """Return the opacity of an image, or None if all of it is opaque."""
    if image.mode != "RGBA":
        return None
    opacity = image.getchannel("A")
    return None if opacity.getextrema()[0] == 255 else opacity


def _on_white(image: Image.Image) -> Image.Image:
    """Put an image on white: transparent pixels can have any color."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
