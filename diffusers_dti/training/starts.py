"""Several starts: each is trained for a few steps on the same samples, and the one of the lowest held-out loss is taken.

Training ends in the basin that it begins in, and the loss tells basins apart early.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from diffusers.utils import logging

from ..concept.inversion import DirectionalInversion
from ..data.images import Photo
from ..families.base import Family
from ..pipeline.text_encoders import find_text_encoders
from . import checkpoint
from .config import ResolvedConfig
from .distributed import processes
from .initializer import initial_concept
from .propose import choose_initializers
from .samples import TrainingSamples
from .step import Stepper
from .trainable import TrainableConcept

logger = logging.get_logger(__name__)

TRIAL_STEPS = 25


def choose_starts(
    family: Family, config: ResolvedConfig, photos: Mapping[str, Sequence[Photo]]
) -> tuple[ResolvedConfig, dict[str, list[DirectionalInversion]]]:
    """Return the settings of a run with its initializers, and the concepts that each placeholder may start from.

    Args:
        family: the family, bound to the pipeline.
        config: the settings, in which an initializer may be "auto".
        photos: the photos by placeholder.
    """
    config = choose_initializers(family, config, photos)
    return config, {word: possible_starts(family, config, word) for word in photos}


def possible_starts(family: Family, config: ResolvedConfig, placeholder: str) -> list[DirectionalInversion]:
    """Return the concepts that training may start from, up to `config.num_starts`, without those that equal an earlier one.

    These are the initializers as they are inside a prompt, and then each of them alone. A run that is resumed has the start
    that it had.

    Args:
        family: the family, bound to the pipeline.
        config: the settings.
        placeholder: the concept's placeholder.

    Raises:
        ValueError: if an encoder does not know an initializer, or `num_vectors` is too small for it.
    """
    given = config.initializers_for(placeholder)
    before = checkpoint.read_settings(config.output_dir, config.resume_from_checkpoint)
    chosen = {key: before.get(f"{placeholder} {key}") for key in ("initializer_token", "initializer_context")}
    starts: list[DirectionalInversion] = []
    contexts = (True, False) if config.initializer_context else (False,)
    for in_context in contexts:
        for token in given:
            own = replace(config, initializer_token=token, initializer_context=in_context)
            start = initial_concept(family, own, placeholder)
            if before:
                training = start.metadata["training"]
                if all(training[key] == value for key, value in chosen.items()):
                    return [start]
            elif _is_new(start, starts):
                starts.append(start)
    if before:  # another run's: what it started from is refused where the checkpoint is read
        return [initial_concept(family, replace(config, initializer_token=given[0]), placeholder)]
    return starts[: max(config.num_starts, len(given))]


def _is_new(start: DirectionalInversion, earlier: Sequence[DirectionalInversion]) -> bool:
    """Return whether a start can be tried beside the earlier ones: it has other rows, and as many."""
    for other in earlier:
        if start.num_vectors != other.num_vectors:
            return False
        if all(torch.equal(rows, other.embeddings[component]) for component, rows in start.embeddings.items()):
            return False
    return True


def make_concepts(
    family: Family,
    config: ResolvedConfig,
    starts: Mapping[str, Sequence[DirectionalInversion]],
    samples: Mapping[str, TrainingSamples],
) -> list[TrainableConcept]:
    """Choose where each of several concepts starts, which are loaded.

    Args:
        family: the family, bound to the pipeline, whose models are frozen and at work.
        config: the settings.
        starts: what each concept may start from, by placeholder, from `possible_starts`.
        samples: the samples of each concept, by placeholder.
    """
    encoders, concepts = find_text_encoders(family.pipe), []
    for placeholder, own in starts.items():
        start = choose_start(family, config, own, samples[placeholder])
        concepts.append(TrainableConcept.start(start, samples[placeholder], encoders, config.raw, config.train_magnitude))
    return concepts


def choose_start(
    family: Family, config: ResolvedConfig, starts: Sequence[DirectionalInversion], samples: TrainingSamples
) -> DirectionalInversion:
    """Train each start for a few steps, and return the one whose held-out loss is then the lowest.

    Training begins anew with it, so that it is the same run as if only this start had been given.

    Args:
        family: the family, bound to the pipeline, with the concept loaded.
        config: the settings.
        starts: the starts, from `possible_starts`.
        samples: the samples of the concept.
    """
    # Not in one batch: on a GPU that a batch keeps busy this would take as much time, and several times the memory.
    if len(starts) == 1:
        return starts[0]
    encoders = find_text_encoders(family.pipe)
    losses, steps, main = [], min(TRIAL_STEPS, config.max_train_steps), processes().is_main_process
    with logging.tqdm(total=len(starts) * steps, desc="Trying starts", leave=False, disable=not main) as bar:
        for start in starts:
            concept = TrainableConcept.start(start, samples, encoders, config.raw, config.train_magnitude)
            stepper = Stepper(family, config, [concept], None)
            with concept.swapped_in(encoders):
                step = 0
                while step < steps:
                    if stepper.take(step) is not None:
                        step += 1
                        bar.update()
                losses.append(stepper.heldout_loss(concept).item())
    described = []
    for start, loss in zip(starts, losses):
        training = start.metadata["training"]
        where = "" if training["initializer_context"] else " alone"
        described.append(f"{training['initializer_token']}{where} {loss:.4f}")
    best = min(range(len(starts)), key=losses.__getitem__)
    if main:
        # A warning, since diffusers shows no less by default, and the choice decides the result.
        logger.warning(f"Held-out losses after {TRIAL_STEPS} steps: {', '.join(described)}. Starting from number {best + 1}.")
    return starts[best]
