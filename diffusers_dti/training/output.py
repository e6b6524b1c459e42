"""The folder of a run while it is written to."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from safetensors import SafetensorError

from ..atomic import tidy

logger = logging.get_logger(__name__)

LOCK = ".lock"


@contextmanager
def writing(output_dir: str | Path | None) -> Iterator[None]:
    """Keep other runs out of a folder, and end by SIGTERM or SIGHUP as by Ctrl-C: with a checkpoint.

    Args:
        output_dir: the folder, which is created if needed; None if the run has none.

    Raises:
        OSError: if another run writes there, or the folder cannot be written to.
    """
    with ExitStack() as stack:
        if output_dir is not None:
            folder = Path(output_dir)
            stack.enter_context(_locked(folder))
            tidy(folder)
        stack.enter_context(_interrupts())
        yield


def save_or_warn(save: Callable[[str | Path], None], folder: str | Path | None) -> None:
    """Save what was learned, if there is a folder. If that fails, it stays in the pipeline and the trainer, and is not lost."""
    try:
        if folder is not None:
            save(folder)
    except (OSError, SafetensorError) as error:
        logger.warning(
            f"What was learned could not be saved in {folder}: {error} It is loaded in the pipeline: save it elsewhere with "
            "`trainer.save_pretrained`."
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise OSError(f"Another run writes to {folder}: choose another `output_dir`, or wait for it to end.") from error
    except OSError as error:
        raise OSError(f"{folder} cannot be written to: choose another `output_dir`. {error}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not on Windows, where it stays until it is released
            (folder / LOCK).unlink()
        lock.release()


_held_back = threading.local()  # the signal that came in a block of `uninterrupted`, if this thread is in one


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C, SIGTERM and SIGHUP back until the block has ended. A second one does not wait."""
    _held_back.signal = None
    try:
        yield
    finally:
        number = _held_back.__dict__.pop("signal", None)
    if number is not None:
        _interrupt(number)


@contextmanager
def _interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt for signals that would end the process, unless somebody handles them already."""
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    earlier = {number: signal.getsignal(number) for number in numbers}
    ours = [number for number in numbers if earlier[number] in (signal.SIG_DFL, signal.default_int_handler)]
    try:
        for number in ours:
            signal.signal(number, _interrupt)
        yield
    finally:
        for number in ours:
            signal.signal(number, earlier[number])


def _interrupt(number: int, frame: Any = None) -> None:
    if getattr(_held_back, "signal", number) is None:
        _held_back.signal = number
        return
    raise KeyboardInterrupt(signal.Signals(number).name)
