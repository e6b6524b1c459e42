"""What is drawn from the photos: every draw is a function of (seed, sample number) alone.

So a run that goes on from a checkpoint, on one process or on four, sees the samples it would have seen.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..data.images import Photo
from ..families.base import Batch

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

MAX_ZEROS = 15  # tokens of zero embedding before a prompt (the authors' augmentation for SANA)


@dataclass(frozen=True)
class Crop:
    """A square cut from a photo, with what SDXL's time ids tell of it."""

    photo: int
    pixels: Tensor  # (3, resolution, resolution) in [-1, 1]
    mask: Tensor | None  # (1, resolution, resolution) in [0, 1], 1 where the subject is
    original_size: tuple[int, int]  # height, width of the photo
    corner: tuple[int, int]  # top, left in the resized photo


def make_crops(
    photos: Sequence[Photo], resolution: int, crops_per_image: int, seed: int, random_flip: bool = False
) -> list[Crop]:
    """One crop of a square photo, `crops_per_image` random ones of any other, after resizing its short side.

    With `random_flip` each crop has its mirror image beside it.

    Raises:
        ValueError: for a mask that leaves nothing of a photo.
    """
    crops: list[Crop] = []
    for number, photo in enumerate(photos):
        scale = resolution / min(photo.image.size)
        width, height = (max(resolution, int(side * scale)) for side in photo.image.size)
        generator = torch.Generator().manual_seed(_mix(seed, number))
        usable = []
        for mirrored in (False, True) if random_flip else (False,):
            pixels = _to_tensor(photo.image, (width, height), mirrored) * 2 - 1
            mask = None if photo.mask is None else _to_tensor(photo.mask, (width, height), mirrored)
            for _ in range(1 if width == height else crops_per_image):
                top = int(torch.randint(height - resolution + 1, (), generator=generator))
                left = int(torch.randint(width - resolution + 1, (), generator=generator))
                cut = (slice(None), slice(top, top + resolution), slice(left, left + resolution))
                if mask is None or mask[cut].any():  # a crop beside the subject teaches nothing of it
                    size = (photo.image.height, photo.image.width)
                    usable.append(Crop(number, pixels[cut], None if mask is None else mask[cut], size, (top, left)))
        if not usable:
            raise ValueError(f"The mask of photo {number + 1} leaves nothing of it: it must be white where the subject is.")
        crops += usable
    return crops


def _to_tensor(image: Image.Image, size: tuple[int, int], mirrored: bool) -> Tensor:
    resized = image.resize(size, Image.Resampling.BICUBIC)
    resized = ImageOps.mirror(resized) if mirrored else resized
    return VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(resized))[0]


def _mix(*numbers: int) -> int:
    """One seed from several numbers; far apart even for neighbours (splitmix64's multiplier)."""
    state = 0
    for n in numbers:
        state = ((state ^ n) * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) % 2**64
        state ^= state >> 31
    return state % 2**63


class TrainingSamples:
    """The training set with its latents cached: sample number k is the same in every run of a seed.

    Args:
        crops: from `make_crops`.
        posteriors: the latents' mean and standard deviation, (1, c, h, w) each, of every crop.
        templates: prompts with "{}" for the placeholder.
        captions: each photo's own prompt, or None where templates are used.
        placeholder: what stands in the prompts' "{}".
        zero_pad: draw numbers of zero tokens before the prompts: floor(x) of exponential x of mean 2, at most 15.
    """

    def __init__(
        self,
        crops: list[Crop],
        posteriors: list[tuple[Tensor, Tensor]],
        templates: Sequence[str],
        captions: Sequence[str | None],
        placeholder: str,
        num_timesteps: int,
        seed: int,
        zero_pad: bool = False,
    ):
        self.crops, self.posteriors, self.seed, self.num_timesteps = crops, posteriors, seed, num_timesteps
        self.templates, self.captions, self.placeholder, self.zero_pad = templates, captions, placeholder, zero_pad
        self.of_photo = [[i for i, c in enumerate(crops) if c.photo == n] for n in sorted({c.photo for c in crops})]

    def digest(self) -> str:
        """Tells one training set from another."""
        parts = [c.pixels.numpy().tobytes() + (b"" if c.mask is None else c.mask.numpy().tobytes()) for c in self.crops]
        return hashlib.sha256(b"".join([*parts, repr(self.captions).encode()])).hexdigest()

    def batch(self, first: int, size: int, device: torch.device) -> Batch:
        """TrainingSamples number `first` to `first + size - 1`. Each round of photos shows every photo once."""
        drawn = [self._sample(k) for k in range(first, first + size)]
        crops, latents, noise, timesteps, prompts, zero_pads = zip(*drawn)
        return Batch(
            torch.cat(latents).to(device),
            torch.cat(noise).to(device),
            self._weights(crops, latents[0].shape[-2:], device),
            torch.tensor(timesteps, device=device),
            list(prompts),
            [c.original_size for c in crops],
            [c.corner for c in crops],
            tuple(crops[0].pixels.shape[-2:]),
            list(zero_pads),
        )

    def _weights(self, crops: Sequence[Crop], size: torch.Size, device: torch.device) -> Tensor | None:
        if all(c.mask is None for c in crops):
            return None
        masks = [torch.ones(1, *size) if c.mask is None else adaptive_avg_pool2d(c.mask, size) for c in crops]
        return torch.stack([m / m.mean() for m in masks]).to(device)

    def _sample(self, k: int) -> tuple[Crop, Tensor, Tensor, int, str, int]:
        round_, place = divmod(k, len(self.of_photo))
        order = torch.randperm(len(self.of_photo), generator=torch.Generator().manual_seed(_mix(self.seed, round_, 1)))
        generator = torch.Generator().manual_seed(_mix(self.seed, k, 2))

        def pick(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        photo = int(order[place])
        index = self.of_photo[photo][pick(len(self.of_photo[photo]))]
        mean, std = self.posteriors[index]
        text = self.captions[photo] or self.templates[pick(len(self.templates))]
        timestep = pick(self.num_timesteps)
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        zeros = min(int(torch.empty(()).exponential_(1 / 2, generator=generator)), MAX_ZEROS) if self.zero_pad else 0
        return self.crops[index], latents, noise, timestep, text.replace("{}", self.placeholder), zeros
