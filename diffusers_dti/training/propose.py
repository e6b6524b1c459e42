"""Propose an initializer: the noun of the model's vocabulary with which the denoiser predicts the photos best."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from ..data.images import Photo
from ..families.base import Batch, Family
from ..pipeline.text_encoders import TextEncoder, find_text_encoders
from ..pipeline.word_rows import LONE_SPACES, token_ids_of
from . import checkpoint
from .config import ResolvedConfig
from .crops import Crop, make_crops
from .distributed import broadcast, processes
from .frozen import at_work, frozen
from .samples import TrainingSamples, encode_crops
from .seeds import seeded_generator
from .token_settings import AUTO, Initializers

logger = logging.get_logger(__name__)

NOUNS = Path(__file__).with_name("nouns.txt")
PROMPT = "a photo of a {}"
MAX_WORDS = 500  # a larger vocabulary is searched for NOUNS only
STREAM = 6  # separates the draws from those of the samples

# The noise levels of the draws, as sixteenths of all, in an order in which the first 2 and the first 8 are spread out as well.
LEVELS = (4, 11, 1, 14, 6, 9, 3, 12, 0, 15, 2, 13, 5, 10, 7, 8)
ROUNDS = (2, 8, 16)  # the number of draws after which the best quarter of the candidates stays in
FINALISTS = 8  # the least number that stays in


def choose_initializers(family: Family, config: ResolvedConfig, photos: Mapping[str, Sequence[Photo]]) -> ResolvedConfig:
    """Return the settings with a word in place of each "auto", or as many words as there are starts to try.

    A resumed run keeps the word of its checkpoint.

    Args:
        family: the family, bound to the pipeline.
        config: the settings of the run.
        photos: the photos of each concept, by placeholder.

    Raises:
        ValueError: if the vocabulary has no candidates, or a mask leaves nothing of a photo.
        OSError: if the checkpoint to resume from does not exist.
    """
    if not any(config.initializers_for(placeholder) == [AUTO] for placeholder in photos):
        return config
    before, chosen = checkpoint.read_settings(config.output_dir, config.resume_from_checkpoint), dict[str, Initializers]()
    for placeholder, own in photos.items():
        words = config.initializers_for(placeholder)
        if words == [AUTO]:
            word = before.get(f"{placeholder} initializer_token")
            words = [word] if word else [*_best_words(family, config, placeholder, own)]
        chosen[placeholder] = words[0] if len(words) == 1 else words
    several = isinstance(config.initializer_token, Mapping) or len(chosen) > 1
    return replace(config, initializer_token=chosen if several else next(iter(chosen.values())))


def propose_initializers(
    family: Family, config: ResolvedConfig, photos: Sequence[Photo], candidates: Iterable[str] | None = None
) -> list[tuple[str, float]]:
    """Rank words by the denoiser's loss on photos, with each word in the place of the placeholder. Nothing is trained.

    The draws of photo, noise and noise level are the same for every word. All words get 2 of them, the best quarter 8, and the
    best quarter of these 16.

    Args:
        family: the family, bound to the pipeline.
        config: the settings of the run.
        photos: the photos, whose masks weight the loss. Their captions are not used.
        candidates: the words, by default those of `candidate_words`.

    Returns:
        The words of the last round with their mean losses, the best first.

    Raises:
        ValueError: if there are no candidates, or a mask leaves nothing of a photo.
    """
    words = list(candidate_words(find_text_encoders(family.pipe)) if candidates is None else candidates)
    if not words:
        raise ValueError(
            'The text encoders\' vocabulary has no words for initializer_token="auto": give a word for what the photos show.'
        )
    totals, done = torch.zeros(len(words), dtype=torch.float64), 0
    with frozen(family):
        draws = _make_draws(family, config, photos)
        for count in ROUNDS:
            with at_work(family):
                totals += _summed_losses(family, config, draws[done:count], words)
            best = totals.argsort(stable=True)  # NaN comes last
            if count < len(draws):
                best = best[: max(FINALISTS, len(words) // 4)]
            words, totals, done = [words[i] for i in best], totals[best], count
    return list(zip(words, (totals / done).tolist()))


def candidate_words(encoders: Mapping[str, TextEncoder]) -> list[str]:
    """Return the words that are one token in a prompt of every encoder: all of a small vocabulary, the nouns of a large one."""
    known = set.intersection(*(_words_of(encoder) for encoder in encoders.values()))
    if len(known) > MAX_WORDS:
        known &= set(NOUNS.read_text(encoding="utf-8").split())
    words = []
    for word in sorted(known):  # in the vocabulary, and yet tokenizers may cut it
        if all(len(token_ids_of(encoder, word)) == 1 for encoder in encoders.values()):
            words.append(word)
    return words


def _words_of(encoder: TextEncoder) -> set[str]:
    """Return the words of at least three small letters for which the vocabulary has a token, such as "dog</w>" or "▁dog"."""
    pattern = re.compile(rf"([a-z]{{3,}})</w>|[{''.join(LONE_SPACES)}]([a-z]{{3,}})")
    matches = (pattern.fullmatch(token) for token in encoder.tokenizer.get_vocab())
    return {match[1] or match[2] for match in matches if match}


def _best_words(family: Family, config: ResolvedConfig, placeholder: str, photos: Sequence[Photo]) -> list[str]:
    """Return the best words, the same in all processes, and report the best one with its runners-up."""
    ranked = propose_initializers(family, config, photos)
    if processes().is_main_process:
        (word, loss), *others = ranked
        behind = ", ".join(f"{other} {value:.5f}" for other, value in others[:4]) or "none"
        # A warning, since diffusers shows no less by default, and the choice decides the result.
        logger.warning(f"{placeholder} starts from {word!r}, with a loss of {loss:.5f}. The next best words: {behind}.")
    words = [word for word, _ in ranked[: config.num_starts]]
    broadcast(words)  # rounding on another device may swap words that are close
    return words


# The photos are encoded again for the training, after the placeholder is loaded: one encoding of each photo costs less than
# code that shares it.
def _make_draws(family: Family, config: ResolvedConfig, photos: Sequence[Photo]) -> list[Batch]:
    """Return a batch of one sample for each draw, with every photo equally often."""
    crops: list[Crop] = []
    for crop in make_crops(photos, config.resolution, config.crops_per_image, config.seed):
        if not crops or crop.photo != crops[-1].photo:
            crops.append(crop)
    posteriors = encode_crops(family, crops)
    num_timesteps = family.scheduler.config.num_train_timesteps
    seed = seeded_generator(config.seed, STREAM).initial_seed()
    samples = TrainingSamples(crops, posteriors, [PROMPT], [None] * len(photos), "", num_timesteps, seed)
    draws = []
    for number, level in enumerate(LEVELS):
        draw = samples.batch(number, 1, family.device)
        timestep = int((level + 0.5) / len(LEVELS) * num_timesteps)
        draws.append(replace(draw, timesteps=torch.full_like(draw.timesteps, timestep)))
    return draws


@torch.no_grad()
def _summed_losses(family: Family, config: ResolvedConfig, draws: Sequence[Batch], words: Sequence[str]) -> Tensor:
    """Return the sum of each word's losses over draws, (n,) float64 on the CPU."""
    # Training keeps the activations of all layers for the backward pass. Without it, twice its batch needs less memory.
    size = 2 * config.train_batch_size
    device_type, bf16 = family.device.type, config.mixed_precision == "bf16"
    sums = []
    starts, main = range(0, len(words), size), processes().is_main_process
    for start in logging.tqdm(starts, desc=f"Ranking {len(words)} initializers", leave=False, disable=not main):
        prompts = [PROMPT.format(word) for word in words[start : start + size]]
        with torch.autocast(device_type, dtype=torch.bfloat16, enabled=bf16):
            conditioning = family.encode_prompts(prompts, [0] * len(prompts))
            losses = [family.sample_losses(_repeat(draw, prompts), conditioning) for draw in draws]
        sums.append(torch.stack(losses).cpu().double().sum(0))
    return torch.cat(sums)


def _repeat(draw: Batch, prompts: list[str]) -> Batch:
    """Return a draw's only sample with each of several prompts."""
    n = len(prompts)
    tensors: dict[str, Any] = {}
    for name in ("latents", "noise", "weights", "timesteps"):
        value = getattr(draw, name)
        tensors[name] = None if value is None else value.expand(n, *value.shape[1:])
    lists: dict[str, Any] = {"original_sizes": draw.original_sizes * n, "crop_corners": draw.crop_corners * n}
    return replace(draw, prompts=prompts, zero_pads=[0] * n, **tensors, **lists)
