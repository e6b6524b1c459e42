"""One change of a text encoder at a time, also from several threads, and one training run.

The locks are not on the encoders, since models are copied and pickled, which locks cannot be.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

_guard = threading.Lock()
_locks: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()
_in_training: "WeakSet[nn.Module]" = WeakSet()


@contextmanager
def changing(models: Iterable[nn.Module]) -> Iterator[None]:
    """Wait until nobody else changes the models, and keep others out within the block.

    Args:
        models: text encoders.
    """
    with ExitStack() as stack:
        for model in sorted(models, key=id):  # always in the same order: two threads cannot wait for each other
            with _guard:
                lock = _locks.setdefault(model, threading.RLock())
            stack.enter_context(lock)
        yield


@contextmanager
def training(models: Iterable[nn.Module]) -> Iterator[None]:
    """Mark models as in training within the block.

    Args:
        models: text encoders.

    Raises:
        RuntimeError: if one of them is in training already.
    """
    own = list(models)
    with _guard:
        if any(model in _in_training for model in own):
            raise RuntimeError("A text encoder of this pipeline is being trained already: wait for that run to end.")
        _in_training.update(own)
    try:
        yield
    finally:
        with _guard:
            for model in own:
                _in_training.discard(model)


def check_not_in_training(models: Iterable[nn.Module]) -> None:
    """Check that tokens may be renumbered.

    Raises:
        RuntimeError: if a model is in training, which goes by the numbers of its tokens.
    """
    with _guard:
        if any(model in _in_training for model in models):
            raise RuntimeError("A text encoder of this pipeline is being trained: unload concepts when that run has ended.")
