"""One change of a text encoder at a time, also from several threads, and one training run.

The locks are not on the encoders, since models are copied and pickled, which locks cannot be. A dict's `setdefault` is atomic:
no lock guards the locks, which an interrupt at a bad moment would leave locked for ever.
"""

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from .protocols import Pipeline
from .text_encoders import find_text_encoders

_locks: "dict[int, threading.RLock]" = {}  # by the id of the model
_in_training: set[int] = set()  # ids of models


@contextmanager
def hold_directional_inversions(pipe: Pipeline) -> Iterator[None]:
    """Keep other threads from loading and unloading concepts within the block, as `pipe.hold_directional_inversions` does.

    Args:
        pipe: a diffusers pipeline. Pipelines that share its text encoders are held as well.

    Raises:
        ValueError: if the pipeline has no text encoder with a tokenizer of its own.

    Example:

        ```py
        >>> import diffusers_dti

        >>> dog = diffusers_dti.load_directional_inversion(pipe, "user/dti-dog")
        >>> with diffusers_dti.hold_directional_inversions(pipe):
        ...     embeds = pipe.encode_prompt("a <dog> on the beach")
        ```
    """
    with changing(encoder.model for encoder in find_text_encoders(pipe).values()):
        yield


@contextmanager
def changing(models: Iterable[nn.Module]) -> Iterator[None]:
    """Wait until nobody else changes the models, and keep others out within the block.

    Args:
        models: text encoders.
    """
    held = ExitStack()
    try:
        try:
            for model in sorted(models, key=id):  # always in the same order: two threads cannot wait for each other
                held.enter_context(_lock_of(model))
            yield
        finally:
            held.close()
    finally:
        held.close()  # if Ctrl-C came just before


def _lock_of(model: nn.Module) -> "threading.RLock":
    made = threading.RLock()
    lock = _locks.setdefault(id(model), made)
    if lock is made:
        weakref.finalize(model, _locks.pop, id(model), None)
    return lock


@contextmanager
def training(models: Iterable[nn.Module]) -> Iterator[None]:
    """Mark models as in training within the block.

    Args:
        models: text encoders.

    Raises:
        RuntimeError: if one of them is in training already.
    """
    models, marked = list(models), ExitStack()
    ids = [id(model) for model in models]
    try:
        try:
            with changing(models):
                if not _in_training.isdisjoint(ids):
                    raise RuntimeError("A text encoder of this pipeline is being trained already: wait for that run to end.")
                for number in ids:
                    marked.callback(_in_training.discard, number)
                _in_training.update(ids)
            yield
        finally:
            marked.close()
    finally:
        marked.close()  # if Ctrl-C came just before


def check_not_in_training(models: Iterable[nn.Module]) -> None:
    """Check that tokens may be renumbered.

    Raises:
        RuntimeError: if a model is in training, which goes by the numbers of its tokens.
    """
    if any(id(model) in _in_training for model in models):
        raise RuntimeError(
            "A text encoder of this pipeline is being trained: unload or replace concepts when that run has ended."
        )
