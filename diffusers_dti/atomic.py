"""Write files and folders whole or not at all.

Everything is written under a hidden temporary name in the same folder, synced to the disk, and renamed at the end. An
exception, a killed process or a power cut leaves the earlier file or folder in place, with one exception: an earlier folder has
to be renamed first, and keeps its hidden name if the process is killed right then. `tidy` puts it back, and removes what else
was left.
"""

import contextlib
import os
import re
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
            _sync(path)
        for path, target in zip(temporary, targets, strict=True):
            os.replace(path, target)
        for folder in {target.parent for target in targets}:
            _sync(folder)
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
    temporary, earlier = _temporary_name(target), _temporary_name(target, EARLIER)
    try:
        temporary.mkdir()
        mode = _new_file_mode(temporary)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():
                file.chmod(mode)
                _sync(file)
        _sync(temporary)
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
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(earlier, ignore_errors=True)


def tidy(folder: str | Path) -> None:
    """Remove what killed processes have left in a folder, and put back folders that they had moved aside.

    Args:
        folder: the folder, in which nobody else writes now.
    """
    for path in Path(folder).iterdir():
        match = _LEFT.fullmatch(path.name)
        if match is None:
            continue
        target = path.with_name(match["name"])
        if match["kind"] == EARLIER and not target.exists():
            path.rename(target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


PARTIAL, EARLIER = "partial", "earlier"
_LEFT = re.compile(rf"\.(?P<name>.+)\.[0-9a-f]{{12}}\.(?P<kind>{PARTIAL}|{EARLIER})(\.\w+)?")


def _temporary_name(target: Path, kind: str = PARTIAL) -> Path:
    """Return an unused hidden name next to a target, with its suffix, because libraries choose a format by it."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.{kind}{target.suffix}")


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    with contextlib.suppress(OSError):  # not every system can open a folder, nor every file system sync
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _new_file_mode(folder: Path) -> int:
    """Return the mode of new files in a folder."""
    # A file is created to see it. `os.umask` can only tell the umask by setting it, for the other threads too: what they
    # create in between would be world-writable.
    probe = _temporary_name(folder / "mode")  # which `tidy` removes if the process is killed here
    probe.touch(exist_ok=False)
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
