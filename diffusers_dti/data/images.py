"""Load photos, with captions and masks, from a folder, files, images, or a `datasets.Dataset`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from diffusers.utils import logging
from PIL import Image

from .image_files import HEIF, check_elongation, not_a_photo, open_image
from .text_files import read_text

logger = logging.get_logger(__name__)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", *HEIF}
MASK_ENDING = "-masklabel.png"  # of the mask beside a photo, as in OneTrainer
CONDITION_ENDING = "-condlabel.png"  # of OneTrainer's images for models that are conditioned on one, of no use here
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
        original_size: width and height before `resized`, in pixels; None if the image has that size.
    """

    image: Image.Image
    caption: str | None = None
    mask: Image.Image | None = None
    original_size: tuple[int, int] | None = None

    def resized(self, resolution: int) -> "Photo":
        """Return the photo with a short side of `resolution` pixels. Resizing it again changes nothing."""
        image, mask = self.image, self.mask
        size = image.width * resolution // min(image.size), image.height * resolution // min(image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
        mask = mask and mask.resize(size, Image.Resampling.BICUBIC)
        return Photo(image, self.caption, mask, self.original_size or self.image.size)


def load_photos(
    images: ImageSource,
    captions: Sequence[str | None] | None = None,
    masks: Sequence[ImageInput | None] | None = None,
    resolution: int | None = None,
    placeholder: str | None = None,
) -> list[Photo]:
    """Load photos with their captions and masks.

    Args:
        images: a folder, a file, an image, a list or iterator of files and images, or a `datasets.Dataset`. In a folder, the
            caption of a photo is a `.txt` file of the same name, in UTF-8 or UTF-16; in a data set, a column named "text",
            "caption" or "prompt". The mask of the file dog.jpg is dog-masklabel.png beside it, if there is one; otherwise the
            transparent part of an image is masked out.
        captions: a caption for each photo with "{}" for the placeholder, or None or "" for templates. They replace captions of
            the folder or data set.
        masks: an image for each photo, white where the subject is, or None. They replace masks beside it and transparency.
        resolution: resize each photo to this short side in pixels as soon as it is read, so that only one at a time is in
            memory in full size; None for the full sizes.
        placeholder: a word that captions may have in place of "{}".

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
        image = open_image(source)
        check_elongation(f"Photo {number + 1}" if isinstance(source, Image.Image) else str(source), image)
        drawn = _mask_beside(source) if masks is None else masks[number]
        mask = _transparency_mask(image) if masks is None and drawn is None else _open_mask(drawn, image.size)
        caption = _read_caption(number, caption if captions is None else captions[number], placeholder)
        photo = Photo(_on_white(image), caption, mask)
        photos.append(photo if resolution is None else photo.resized(resolution))
    return photos


def _find_images(images: ImageSource) -> list[tuple[ImageInput, str | None]]:
    """Return the images, or the paths of their files, each with its caption."""
    if isinstance(images, str | Path):
        if not Path(images).exists():
            raise OSError(f"{images} does not exist: give a folder of 3 to 6 photos, or a list of files.")
        return list(images_in_folder(Path(images))) if Path(images).is_dir() else [(images, None)]
    if isinstance(images, Image.Image):
        return [(images, None)]
    if isinstance(images, ImageDataset):
        return _images_in_dataset(images)
    given: Any = images
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise not_a_photo(given)
    return [(image, None) for image in given]


def images_in_folder(folder: Path) -> list[tuple[Path, str | None]]:
    """Return the image files of a folder, ordered by name, each with its caption.

    Raises:
        ValueError: if there are no image files, or a caption has an unknown encoding.
    """
    shown = (p for p in folder.iterdir() if not p.name.startswith(".") and not p.name.endswith(CONDITION_ENDING))
    files = sorted(p for p in shown if p.is_file())
    images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.endswith(MASK_ENDING)]
    if not images:
        raise ValueError(f"{folder} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}): give a folder of 3 to 6 photos.")
    captioned: list[tuple[Path, str | None]] = []
    used: set[Path | None] = set(images)
    for image in images:
        text = image.with_suffix(".txt")
        used |= {text, _mask_beside(image)}
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


def _read_caption(number: int, caption: object, placeholder: str | None) -> str | None:
    """Return a caption with "{}" in place of the placeholder, or None if it is empty."""
    if caption is None:
        return None
    if isinstance(caption, str):
        text = caption.replace(placeholder, "{}") if placeholder else caption
        if "{}" in text or not text.strip():
            return text if text.strip() else None
    marks = f'a "{{}}" or {placeholder}' if placeholder else 'a "{}"'
    raise ValueError(f"The caption of photo {number + 1}, {caption!r:.80}, needs {marks} where the placeholder goes.")


def _mask_beside(source: ImageInput) -> Path | None:
    """Return the mask file next to a photo, or None if it has no mask or is not a file itself."""
    if isinstance(source, Image.Image):
        return None
    mask = Path(source).with_name(Path(source).stem + MASK_ENDING)
    return mask if mask.is_file() else None


def _open_mask(source: ImageInput | None, size: tuple[int, int]) -> Image.Image | None:
    return None if source is None else open_image(source).convert("L").resize(size)


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
