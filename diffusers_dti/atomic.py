"""Files and folders written whole or not at all."""

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
        paths: the files; their folders are created.

    Yields:
        A path for each, beside it, to write to within the block. If the block fails, the files stay as they were.

    Example:

        ```py
        >>> from diffusers_dti.atomic import atomic_files

        >>> with atomic_files(["out/a.txt", "out/b.txt"]) as (a, b):
        ...     written = a.write_text("one"), b.write_text("two")
        ```
    """
    targets = [Path(path) for path in paths]
    temporary: list[Path] = []
    modes = []
    try:
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.append(_beside(target))
            # The kernel applies the umask; asking for it with `os.umask` would change it for other threads meanwhile.
            temporary[-1].touch(exist_ok=False)
            modes.append(stat.S_IMODE(temporary[-1].stat().st_mode))
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

    Yields:
        A folder beside it to write to within the block. If the block fails, the earlier folder stays.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    temporary.mkdir()
    try:
        probe = temporary / "probe"
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{target.suffix}")
