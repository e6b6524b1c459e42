"""Write files and folders whole or not at all.

Everything is written under a hidden temporary name in the same folder, and renamed at the end. An exception or a killed process
leaves the earlier file or folder in place, with one exception: an earlier folder has to be renamed first, and keeps its hidden
name if the process is killed right then. Nothing is synced to the disk first, so this does not protect against a power cut.
"""

import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_files(paths: Iterable[str | Path]) -> Iterator[list[Path]]:
    """Write several files, all of them before any takes its place.

    Args:
        paths: the files. Their folders are created if needed.

    Yields:
        A path for each file, to write to within the block, in the same folder and with the same suffix. If the block fails or
        leaves a path unwritten, the files stay as they were.

    Example:

        ```py
        >>> from diffusers_dti.atomic import atomic_files

        >>> with atomic_files(["out/a.txt", "out/b.txt"]) as (a, b):
        ...     written = a.write_text("one"), b.write_text("two")
        ```
    """
    targets = [Path(path) for path in paths]
    temporary = [_temporary_name(target) for target in targets]
    modes = []
    try:
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            modes.append(_new_file_mode(target.parent))
        yield list(temporary)
        for path, mode in zip(temporary, modes, strict=True):
            path.chmod(mode)  # some libraries write private files
        for path, target in zip(temporary, targets, strict=True):
            os.replace(path, target)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Write one file; see `atomic_files`."""
    with atomic_files([path]) as (temporary,):
        yield temporary


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Write a folder, which replaces an earlier one as a whole.

    Args:
        path: the folder. Its parent is created if needed. If it is a link to a folder, that folder is replaced.

    Yields:
        An empty folder next to it, to write to within the block. If the block fails, the earlier folder stays as it was.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, earlier = _temporary_name(target), _temporary_name(target)
    try:
        temporary.mkdir()
        mode = _new_file_mode(temporary)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():
                file.chmod(mode)
        # A folder cannot be renamed over another one. The earlier one is moved aside, not deleted first: deleting takes
        # long, and whoever looks or interrupts meanwhile would find half of it.
        if target.exists():
            target.rename(earlier)
        try:
            temporary.rename(target)
        except BaseException:
            if earlier.exists():
                earlier.rename(target)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(earlier, ignore_errors=True)


def _temporary_name(target: Path) -> Path:
    """Return an unused hidden name next to a target, with its suffix, because libraries choose a format by it."""
    return target.with_name(f".{uuid.uuid4().hex[:12]}{target.suffix}")


def _new_file_mode(folder: Path) -> int:
    """Return the mode of new files in a folder."""
    # A file is created to see it. `os.umask` can only tell the umask by setting it, for the other threads too: what they
    # create in between would be world-writable.
    probe = folder / f".{uuid.uuid4().hex[:12]}"
    probe.touch(exist_ok=False)
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
