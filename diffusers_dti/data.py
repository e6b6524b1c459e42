"""Photos, captions and what is drawn from them: every draw is a function of (seed, sample number) alone.

So a run that goes on from a checkpoint, on one process or on four, sees the samples it would have seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

OBJECT_TEMPLATES: tuple[str, ...] = (
    "a photo of a {}",
    "a photo of the {}",
    "a photo of my {}",
    "a photo of this {}",
    "a picture of a {}",
    "a picture of the {}",
    "a close photo of a {}",
    "a close photo of my {}",
    "a clear photo of the {}",
    "a sharp picture of a {}",
    "a cropped photo of a {}",
    "a good photo of the {}",
    "a nice picture of my {}",
    "a simple photo of a {}",
    "a rendering of a {}",
    "a snapshot of the {}",
)
STYLE_TEMPLATES: tuple[str, ...] = (
    "a painting in the style of {}",
    "a picture in the style of {}",
    "a drawing in the style of {}",
    "a rendering in the style of {}",
    "a scene painted in the style of {}",
    "an artwork in the style of {}",
    "a close view in the style of {}",
    "a detailed work in the style of {}",
)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}

ImageInput = str | Path | Image.Image


@dataclass(frozen=True)
class Crop:
    """A square cut from a photo, with what SDXL's time ids tell of it."""

    photo: int
    pixels: Tensor  # (3, resolution, resolution) in [-1, 1]
    original_size: tuple[int, int]  # height, width of the photo
    corner: tuple[int, int]  # top, left in the resized photo


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs; n samples."""

    latents: Tensor  # (n, c, h, w) float32
    noise: Tensor  # as latents
    timesteps: Tensor  # (n,) int64
    prompts: list[str]
    original_sizes: list[tuple[int, int]]
    crop_corners: list[tuple[int, int]]
    resolution: tuple[int, int]


def load_images(images: ImageInput | Sequence[ImageInput]) -> list[Image.Image]:
    """Photos as upright RGB pictures, from a folder, a file, a picture, or a list of files and pictures.

    Raises:
        ValueError: for an empty folder or list. OSError: for a file that is no picture.
    """
    if isinstance(images, str | Path):
        path = Path(images)
        if path.is_dir():
            images = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not images:
                raise ValueError(
                    f"{path} has no pictures ({', '.join(sorted(IMAGE_SUFFIXES))}): give a folder of 3 to 6 photos."
                )
        else:
            images = [path]
    elif isinstance(images, Image.Image):
        images = [images]
    if not images:
        raise ValueError("No pictures were given: 3 to 6 photos of the subject are needed.")
    return [_open(image) for image in images]


def _open(image: ImageInput) -> Image.Image:
    if not isinstance(image, Image.Image):
        try:
            with Image.open(image) as file:
                image = file.copy() if not file.getexif() else ImageOps.exif_transpose(file)
        except (UnidentifiedImageError, FileNotFoundError) as error:
            raise OSError(f"{image} is not a picture that can be opened: {error}") from error
    return ImageOps.exif_transpose(image).convert("RGB")


def make_crops(photos: Sequence[Image.Image], resolution: int, crops_per_image: int, seed: int) -> list[Crop]:
    """One crop of a square photo, `crops_per_image` random ones of any other, after resizing its short side."""
    processor = VaeImageProcessor()
    crops = []
    for number, photo in enumerate(photos):
        scale = resolution / min(photo.size)
        width, height = (max(resolution, int(side * scale)) for side in photo.size)
        resized = photo.resize((width, height), Image.Resampling.BICUBIC)
        pixels = processor.numpy_to_pt(processor.pil_to_numpy(resized))[0] * 2 - 1
        generator = torch.Generator().manual_seed(_mix(seed, number))
        for _ in range(1 if width == height else crops_per_image):
            top = int(torch.randint(height - resolution + 1, (), generator=generator))
            left = int(torch.randint(width - resolution + 1, (), generator=generator))
            cut = pixels[:, top : top + resolution, left : left + resolution]
            crops.append(Crop(number, cut, (photo.height, photo.width), (top, left)))
    return crops


def _mix(*numbers: int) -> int:
    """One seed from several numbers; far apart even for neighbours (splitmix64's multiplier)."""
    state = 0
    for n in numbers:
        state = ((state ^ n) * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) % 2**64
        state ^= state >> 31
    return state % 2**63


class Samples:
    """The training set with its latents cached: sample number k is the same in every run of a seed.

    Args:
        crops: from `make_crops`.
        posteriors: the latents' mean and standard deviation, (1, c, h, w) each, of every crop.
        templates: prompts with "{}" for the placeholder; with `captions`, one for each photo instead.
        placeholder: what stands in the prompts' "{}".
    """

    def __init__(
        self,
        crops: list[Crop],
        posteriors: list[tuple[Tensor, Tensor]],
        templates: Sequence[str],
        captions: Sequence[str] | None,
        placeholder: str,
        num_timesteps: int,
        seed: int,
    ):
        self.crops, self.posteriors, self.seed, self.num_timesteps = crops, posteriors, seed, num_timesteps
        self.templates, self.captions, self.placeholder = templates, captions, placeholder
        self.of_photo = [[i for i, c in enumerate(crops) if c.photo == n] for n in sorted({c.photo for c in crops})]

    def batch(self, first: int, size: int, device: torch.device) -> Batch:
        """Samples number `first` to `first + size - 1`. Each round of photos shows every photo once."""
        drawn = [self._sample(k) for k in range(first, first + size)]
        crops, latents, noise, timesteps, prompts = zip(*drawn)
        return Batch(
            torch.cat(latents).to(device),
            torch.cat(noise).to(device),
            torch.tensor(timesteps, device=device),
            list(prompts),
            [c.original_size for c in crops],
            [c.corner for c in crops],
            tuple(crops[0].pixels.shape[-2:]),
        )

    def _sample(self, k: int) -> tuple[Crop, Tensor, Tensor, int, str]:
        round_, place = divmod(k, len(self.of_photo))
        order = torch.randperm(len(self.of_photo), generator=torch.Generator().manual_seed(_mix(self.seed, round_, 1)))
        generator = torch.Generator().manual_seed(_mix(self.seed, k, 2))

        def pick(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        photo = int(order[place])
        index = self.of_photo[photo][pick(len(self.of_photo[photo]))]
        mean, std = self.posteriors[index]
        text = self.captions[photo] if self.captions else self.templates[pick(len(self.templates))]
        timestep = pick(self.num_timesteps)
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        return self.crops[index], latents, noise, timestep, text.replace("{}", self.placeholder)
