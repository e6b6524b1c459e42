"""Download DreamBooth's data set, 30 subjects with 4 to 6 photos each, from its public repository."""

import hashlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.request import urlopen
from zipfile import BadZipFile, ZipFile, ZipInfo

from diffusers.utils import logging

from ..atomic import atomic_file, atomic_folder
from .images import IMAGE_SUFFIXES

COMMIT = "4f887af7970a06fc0cd3adaa1d0b368547d6a1d0"  # of March 6, 2023, the last one so far
TREE = "020eca0ee27124b7d2f6bcfc05d6a6c45b8a50a4"  # what `git rev-parse COMMIT:dataset` says; archives have no fixed bytes
SIZE = 111_685_720  # of the files in `dataset`, in bytes; an archive has about as many
ARCHIVE = f"https://github.com/google/dreambooth/archive/{COMMIT}.zip"
CLASSES = "prompts_and_classes.txt"
TIMEOUT = 30  # seconds without a byte


def download(folder: str | Path) -> Path:
    """Download the data set, and write the list of its subjects for `read_subjects`.

    Nothing that exists is changed: if the folder has files, only the list is written, and if both exist, nothing is done.

    Args:
        folder: becomes the data set, with a folder of photos for each subject.

    Returns:
        The path of the list, `folder`.json.

    Raises:
        OSError: if the data set cannot be downloaded, or the existing folder is not the data set.
    """
    folder = Path(folder)
    subjects = folder.with_name(f"{folder.name}.json")
    if not folder.exists() or not any(folder.iterdir()):
        with atomic_folder(folder) as temporary:
            _fetch(temporary, folder)
    if not subjects.exists():  # an existing list may be the authors', which has better initializers
        text = json.dumps(_list_subjects(folder), indent=2) + "\n"
        with atomic_file(subjects) as temporary:
            temporary.write_text(text)
    return subjects


def _fetch(temporary: Path, folder: Path) -> None:
    """Download and unpack the data set into `temporary`, which later becomes `folder`."""
    try:
        with tempfile.TemporaryFile(dir=temporary.parent) as archive:
            _download_archive(archive)
            _unpack(archive, temporary)
        if git_hash(temporary).hex() != TREE:
            raise OSError(f"the archive's folder `dataset` is not the one of commit {COMMIT}")
    except (OSError, HTTPException, BadZipFile, zlib.error, EOFError) as error:
        raise OSError(
            f"DreamBooth's data set could not be downloaded from {ARCHIVE}: {error}. Without a network, download that archive "
            f"elsewhere, unpack its folder `dataset` as {folder}, and run this again: it continues from there."
        ) from error


def _download_archive(file: IO[bytes]) -> None:
    with urlopen(ARCHIVE, timeout=TIMEOUT) as response:
        total = int(response.headers.get("Content-Length") or 0)  # 0 if the server does not say
        with logging.tqdm(total=total or None, desc="DreamBooth's photos", unit="B", unit_scale=True) as bar:
            while block := response.read(2**16):
                file.write(block)
                bar.update(len(block))
                if file.tell() > 2 * SIZE:
                    raise OSError(f"more than {2 * SIZE} bytes were sent")
    if file.tell() < total:  # urllib takes the end of a connection for the end of the file
        raise OSError(f"the connection was cut after {file.tell()} of {total} bytes")


def _unpack(archive: IO[bytes], folder: Path) -> None:
    """Unpack the archive's folder `dataset` as `folder`."""
    with ZipFile(archive) as packed:
        members = []
        for info, path in _checked_members(packed):
            if path.parts[1:2] == ("dataset",) and not info.is_dir():
                members.append((info, path))
        total = sum(info.file_size for info, _ in members)
        if total > SIZE:
            raise OSError(f"it would unpack to {total} bytes, and the data set has {SIZE}")
        for info, path in members:
            target = folder.joinpath(*path.parts[2:])
            target.parent.mkdir(parents=True, exist_ok=True)
            with packed.open(info) as source, target.open("wb") as unpacked:
                shutil.copyfileobj(source, unpacked)


def _checked_members(packed: ZipFile) -> Iterator[tuple[ZipInfo, PurePosixPath]]:
    for info in packed.infolist():
        path = PurePosixPath(info.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise OSError(f"the archive has a path that leaves its folder, {path}")
        yield info, path


def git_hash(path: Path) -> bytes:
    """Return git's hash of a file, or of a folder of plain files."""
    if path.is_file():
        kind, content = "blob", path.read_bytes()
    else:
        kind, content = "tree", b""
        # git sorts as if the names of folders ended with a slash.
        for entry in sorted(path.iterdir(), key=lambda entry: entry.name + "/" * entry.is_dir()):
            content += f"{40000 if entry.is_dir() else 100644} {entry.name}\0".encode() + git_hash(entry)
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).digest()


def _list_subjects(folder: Path) -> dict[str, dict[str, str]]:
    """Return the subjects that the data set's own list names and the folder has photos of, in the format of our list."""
    hint = f"Remove {folder} to download the data set, or unpack the folder `dataset` of {ARCHIVE} in its place."
    try:
        text = (folder / CLASSES).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise OSError(f"{folder} is not DreamBooth's data set, it has no {CLASSES}. {hint}") from error
    table = text.partition("subject_name,class\n")[2].partition("\n\n")[0]
    subjects = {}
    for line in table.splitlines():
        name, _, class_noun = line.strip().partition(",")
        if any(file.suffix.lower() in IMAGE_SUFFIXES for file in (folder / name).glob("*")):
            subjects[name] = {"path": f"{folder.name}/{name}", "class": class_noun, "initialization": class_noun}
    if not subjects:
        raise OSError(f"{folder} has no photos of the subjects that its {CLASSES} names. {hint}")
    return subjects
