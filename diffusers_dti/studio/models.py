"""The one pipeline that the page keeps open, which makes way for a training run."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..pipeline.opening import open_pipeline
from ..pipeline.protocols import Pipeline
from ..training.distributed import processes


@dataclass(frozen=True)
class Opening:
    """How models are opened.

    Args:
        dtype: the name of their dtype, by default bfloat16 on a GPU and float32 on the CPU.
        device: the name of their device, by default the first GPU if there is one.
    """

    dtype: str | None = None
    device: str | None = None

    def open(self, model: str, text_only: bool = False) -> Pipeline:
        """Open a model.

        Raises:
            ValueError: if none is named.
            OSError: if there is no such model.
        """
        if not model.strip():
            raise ValueError("Choose a model: the Hub id or the folder of a pipeline.")
        device = torch.device(self.device) if self.device else processes().device
        return open_pipeline(model.strip(), device, self.dtype, text_only=text_only)


class Models:
    """At most one open pipeline, used by one call at a time.

    Args:
        opening: how models are opened.
    """

    def __init__(self, opening: Opening):
        self._opening = opening
        self._lock = threading.Lock()
        self._open: tuple[str, bool, Pipeline] | None = None
        self._is_training = False

    @contextmanager
    def opened(self, model: str, text_only: bool = False) -> Iterator[Pipeline]:
        """Use a model within the block.

        Args:
            model: Hub id or folder.
            text_only: whether tokenizers and text encoders are enough.

        Raises:
            ValueError: if a concept is being learned, or no model is named.
            OSError: if there is no such model.
        """
        with self._lock:
            if self._is_training:
                raise ValueError("A concept is being learned, which takes the memory: wait for its end, or stop it.")
            if self._open is None or self._open[0] != model or (self._open[1] and not text_only):
                self._close()
                self._open = (model, text_only, self._opening.open(model, text_only))
            yield self._open[2]

    @contextmanager
    def put_away(self) -> Iterator[None]:
        """Leave the memory to a training run within the block."""
        with self._lock:
            self._close()
            self._is_training = True
        try:
            yield
        finally:
            self._is_training = False

    def _close(self) -> None:
        self._open = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
