"""Square crops of the photos, cut once before training."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from torch import Tensor

from ..data.images import Photo
from .seeds import seeded_generator


@dataclass(frozen=True)
class Crop:
    """A square cut from a photo, and where it was cut, which SDXL's time ids tell the model."""

    photo: int
    pixels: Tensor  # (3, resolution, resolution) in [-1, 1]
    mask: Tensor | None  # (1, resolution, resolution) in [0, 1], 1 where the subject is
    original_size: tuple[int, int]  # height, width of the photo
    corner: tuple[int, int]  # top, left in the resized photo


def check_resolution(resolution: int, step: int) -> None:
    """Check that a pipeline can encode crops of a resolution, which must be a multiple of `step`, both in pixels.

    Raises:
        ValueError: if it is not, naming the next smaller multiple.
    """
    if resolution % step:
        fitting = max(resolution // step, 1) * step
        raise ValueError(
            f"This pipeline needs a resolution that is a multiple of {step}, got {resolution}: {fitting} would do."
        )


def make_crops(
    photos: Sequence[Photo], resolution: int, crops_per_image: int, seed: int, random_flip: bool = False
) -> list[Crop]:
    """Resize each photo by its short side, and cut squares from it.

    Args:
        photos: the photos, with masks or without.
        resolution: the side of the crops in pixels.
        crops_per_image: the number of random crops of each photo that is not square; a square one has a single crop.
        seed: the seed of the random corners.
        random_flip: also cut as many crops from the mirrored photo.

    Returns:
        The crops in the order of their photos, without those that show nothing of the subject.

    Raises:
        ValueError: if a mask leaves nothing of a photo.
    """
    crops: list[Crop] = []
    for number, given in enumerate(photos):
        photo = given.resized(resolution)
        generator = seeded_generator(seed, number)
        usable = _crop_photo(number, photo, resolution, crops_per_image, generator, mirrored=False)
        if random_flip:
            usable += _crop_photo(number, photo, resolution, crops_per_image, generator, mirrored=True)
        if not usable:
            raise ValueError(f"The mask of photo {number + 1} leaves nothing of it: it must be white where the subject is.")
        crops += usable
    return crops


def _crop_photo(
    number: int, photo: Photo, resolution: int, crops_per_image: int, generator: torch.Generator, mirrored: bool
) -> list[Crop]:
    """Return the crops of one resized photo that show some of the subject."""
    width, height = photo.image.size
    original_width, original_height = photo.original_size or photo.image.size
    pixels = _to_tensor(photo.image, mirrored) * 2 - 1
    mask = None if photo.mask is None else _to_tensor(photo.mask, mirrored)
    crops = []
    for _ in range(1 if width == height else crops_per_image):
        top = int(torch.randint(height - resolution + 1, (), generator=generator))
        left = int(torch.randint(width - resolution + 1, (), generator=generator))
        cut = (slice(None), slice(top, top + resolution), slice(left, left + resolution))
        if mask is None or mask[cut].any():  # a crop next to the subject teaches nothing about it
            mask_cut = None if mask is None else mask[cut]
            crops.append(Crop(number, pixels[cut], mask_cut, (original_height, original_width), (top, left)))
    return crops


def _to_tensor(image: Image.Image, mirrored: bool) -> Tensor:
    image = ImageOps.mirror(image) if mirrored else image
    return VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(image))[0]
