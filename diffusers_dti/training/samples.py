"""The samples of a training run: every draw is a function of (seed, sample number) alone.

So a resumed run sees the samples that it would have seen, on one process or on four.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.utils import logging
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..data.images import Photo
from ..families.base import Batch, Family
from ..pipeline.text_encoders import TextEncoder, find_text_encoders
from .config import ResolvedConfig
from .crops import Crop, make_crops
from .distributed import processes
from .seeds import seeded_generator

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
class Sample:
    """One training sample."""

    crop: Crop
    latents: Tensor  # (1, c, h, w), or (1, c, 1, h, w)
    noise: Tensor  # the shape of `latents`
    timestep: int
    prompt: str
    zero_pad: int  # tokens of zero embedding before the prompt


class TrainingSamples:
    """The training set of a concept with its latents cached: sample number k is the same in every run of a seed.

    Args:
        crops: from `make_crops`.
        posteriors: the mean and standard deviation of each crop's latents, (1, c, h, w) each.
        templates: prompts with "{}" for the placeholder.
        captions: each photo's own prompt with "{}", or None to use the templates.
        placeholder: the concept's placeholder.
        num_timesteps: the number of noise levels to draw from.
        seed: the seed of all draws.
        stratified: cover the noise levels evenly by any few samples in a row, instead of drawing each level by itself.
        zero_pad: draw the number of zero tokens before each prompt: floor(x) of an exponential x of mean 2, at most 15.
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
        stratified: bool = False,
        zero_pad: bool = False,
    ):
        self.crops, self.posteriors, self.seed, self.num_timesteps = crops, posteriors, seed, num_timesteps
        self.templates, self.captions, self.placeholder, self.zero_pad = templates, captions, placeholder, zero_pad
        self.stratified = stratified
        self.crops_of_photo: dict[int, list[int]] = {}
        for index, crop in enumerate(crops):
            self.crops_of_photo.setdefault(crop.photo, []).append(index)

    def digest(self) -> str:
        """Return a digest that identifies the photos, masks and captions."""
        parts = []
        for crop in self.crops:
            parts.append(crop.pixels.numpy().tobytes())
            if crop.mask is not None:
                parts.append(crop.mask.numpy().tobytes())
        parts.append(repr(self.captions).encode())
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def batch(self, first: int, size: int, device: torch.device) -> Batch:
        """Return the samples number `first` to `first + size - 1`. Each round of photos shows every photo once."""
        return _collate([self._sample(k) for k in range(first, first + size)], device)

    def heldout_batches(self, count: int, size: int, device: torch.device) -> Iterator[Batch]:
        """Yield `count` samples that are always the same and that training never sees, in batches of up to `size`.

        They differ from training's in crop, noise and noise level; the photos are the same. Their noise levels are evenly
        spread, and no zero tokens precede their prompts.
        """
        samples = []
        for i in range(count):
            drawn = self._draw(i % len(self.crops_of_photo), seeded_generator(self.seed, i, 3))
            samples.append(replace(drawn, timestep=int((i + 0.5) * self.num_timesteps / count), zero_pad=0))
        for first in range(0, count, size):
            yield _collate(samples[first : first + size], device)

    def _sample(self, k: int) -> Sample:
        photos = len(self.crops_of_photo)
        round_, place = divmod(k, photos)
        order = torch.randperm(photos, generator=seeded_generator(self.seed, round_, 1))
        sample = self._draw(int(order[place]), seeded_generator(self.seed, k, 2))
        if self.stratified:
            return replace(sample, timestep=int(self.num_timesteps * _spread(self.seed, k)))
        return sample

    def _draw(self, photo: int, generator: torch.Generator) -> Sample:
        def pick(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        crops = self.crops_of_photo[photo]
        index = crops[pick(len(crops))]
        mean, std = self.posteriors[index]
        text = self.captions[photo] or self.templates[pick(len(self.templates))]
        timestep = pick(self.num_timesteps)
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        zeros = 0
        if self.zero_pad:
            zeros = min(int(torch.empty(()).exponential_(1 / 2, generator=generator)), MAX_ZEROS)
        return Sample(self.crops[index], latents, noise, timestep, text.replace("{}", self.placeholder), zeros)


def _collate(samples: Sequence[Sample], device: torch.device) -> Batch:
    """Put samples together on a device, without waiting for it."""
    height, width = samples[0].crop.pixels.shape[-2:]
    weights = _weights(samples)
    return Batch(
        latents=torch.cat([s.latents for s in samples]).to(device, non_blocking=True),
        noise=torch.cat([s.noise for s in samples]).to(device, non_blocking=True),
        weights=None if weights is None else weights.to(device, non_blocking=True),
        timesteps=torch.tensor([s.timestep for s in samples]).to(device, non_blocking=True),
        prompts=[s.prompt for s in samples],
        original_sizes=[s.crop.original_size for s in samples],
        crop_corners=[s.crop.corner for s in samples],
        resolution=(height, width),
        zero_pads=[s.zero_pad for s in samples],
    )


def _spread(seed: int, k: int) -> float:
    """Return number k of a sequence in [0, 1): any n of its numbers in a row are about 1/n apart (the golden ratio's)."""
    offset = float(torch.rand((), dtype=torch.float64, generator=seeded_generator(seed, 4)))
    return (offset + k * (5**0.5 - 1) / 2) % 1


def _weights(samples: Sequence[Sample]) -> Tensor | None:
    """Return the masks in the size of the latents, (n, 1, h, w) of mean 1 each, or None if no sample has one."""
    if all(s.crop.mask is None for s in samples):
        return None
    height, width = samples[0].latents.shape[-2:]
    weights = []
    for sample in samples:
        mask = sample.crop.mask
        mask = torch.ones(1, height, width) if mask is None else adaptive_avg_pool2d(mask, (height, width))
        weights.append(mask / mask.mean())
    return torch.stack(weights)


def prepare_samples(
    family: Family,
    config: ResolvedConfig,
    encoders: Mapping[str, TextEncoder],
    placeholder: str,
    photos: Sequence[Photo],
) -> TrainingSamples:
    """Crop and encode the photos of a concept that is loaded.

    Raises:
        ValueError: if a prompt is so long that the placeholder would be cut off, or a mask leaves nothing of a photo.
    """
    templates = config.templates or (STYLE_TEMPLATES if config.learnable_property == "style" else OBJECT_TEMPLATES)
    captions = [photo.caption for photo in photos]
    prompts = [*templates, *(config.context_prompts or ()), *(caption for caption in captions if caption)]
    margin = MAX_ZEROS if config.zero_pad else 0
    for encoder in encoders.values():
        length = min(family.text_length, encoder.tokenizer.model_max_length) - margin
        _check_prompts(encoder, placeholder, prompts, length)
    crops = make_crops(photos, config.resolution, config.crops_per_image, config.seed, config.random_flip)
    return TrainingSamples(
        crops,
        encode_crops(family, crops),
        templates,
        captions,
        placeholder,
        family.scheduler.config.num_train_timesteps,
        config.seed,
        config.timestep_sampling == "stratified",
        bool(config.zero_pad),
    )


def prepare_all_samples(
    family: Family, config: ResolvedConfig, photos: Mapping[str, Sequence[Photo]]
) -> dict[str, TrainingSamples]:
    """Crop and encode the photos of concepts that are loaded, by placeholder, as `prepare_samples` does."""
    encoders = find_text_encoders(family.pipe)
    return {word: prepare_samples(family, config, encoders, word, own) for word, own in photos.items()}


def encode_crops(family: Family, crops: Sequence[Crop]) -> list[tuple[Tensor, Tensor]]:
    """Encode crops as `Family.encode_images` does, with a bar."""
    main = processes().is_main_process
    return family.encode_images(
        logging.tqdm([crop.pixels for crop in crops], desc="Encoding photos", leave=False, disable=not main)
    )


def _check_prompts(encoder: TextEncoder, placeholder: str, prompts: Sequence[str], length: int) -> None:
    """Check that all tokens of a placeholder fit into the tokenizer's window in each prompt: else they would learn nothing."""
    own = set(encoder.token_ids(placeholder))
    for prompt in prompts:
        ids = encoder.tokenizer(prompt.replace("{}", placeholder), truncation=True, max_length=length).input_ids
        if not own <= set(ids):
            raise ValueError(
                f"In {prompt!r} the placeholder comes after {length} tokens, where the prompt is cut off: shorten it, or put "
                "the placeholder closer to the beginning."
            )
