"""One progress bar for all images of a command, with the time left over all of them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from diffusers.utils import logging

from ..pipeline.protocols import Pipeline


class Bar(Protocol):
    """A bar of diffusers, which is tqdm's, or an empty one after `diffusers.utils.logging.disable_progress_bar()`."""

    def update(self, n: int = 1) -> Any: ...

    # What the empty bar lacks.
    def __getattr__(self, name: str) -> Any: ...


def progress_bar(total: int, description: str, given: Bar | None = None) -> AbstractContextManager[Bar]:
    """Return a bar, to be closed after the block.

    Args:
        total: the number of images.
        description: what is done to them.
        given: the bar of a longer work that this is a part of: it is returned in place of a new one, and stays open.
    """
    return nullcontext(given) if given is not None else logging.tqdm(total=total, desc=description)


def pass_over(bar: Bar, count: int) -> None:
    """Advance a bar by images that are there already. They take no time, and so say nothing about the time left."""
    if bar.disable or not count:  # the empty bar has a function there
        return
    for name in ("initial", "n", "last_print_n"):
        setattr(bar, name, getattr(bar, name) + count)
    bar.refresh()


@contextmanager
def own_bar_hidden(pipe: Pipeline) -> Iterator[None]:
    """Hide the pipeline's own bar, which counts the steps of one image, within the block."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
