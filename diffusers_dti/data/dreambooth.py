"""DreamBooth's data set, 30 subjects of 4 to 6 photos, from its public home."""

import json
import shutil
import tempfile
import zlib
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.request import urlopen
from zipfile import BadZipFile, ZipFile

from diffusers.utils import logging

from .images import IMAGE_SUFFIXES

ARCHIVE = "https://github.com/google/dreambooth/archive/refs/heads/main.zip"  # about 110 MB
CLASSES = "prompts_and_classes.txt"
TIMEOUT = 30  # seconds without a byte


def download(folder: str | Path) -> Path:
    """The data set as `folder`, a folder of photos for each subject, and beside it `folder`.json for `read_subjects`.

    What is there already stays as it is: of a whole folder only the JSON is written, with both nothing is done.

    Raises:
        OSError: if the data set cannot be fetched, or the folder that is there is not the data set.
    """
    folder = Path(folder)
    subjects = folder.with_name(f"{folder.name}.json")
    there = folder.exists() and any(folder.iterdir())
    if there and subjects.exists():
        return subjects
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        temporary = Path(name)
        if not there:
            _fetch(temporary, folder)
            (temporary / "dataset").replace(folder)
        if not subjects.exists():  # the authors' own may be, with its better initializations
            (temporary / subjects.name).write_text(json.dumps(_subjects(folder), indent=2) + "\n")
            (temporary / subjects.name).replace(subjects)
    return subjects


def _fetch(temporary: Path, folder: Path) -> None:
    """The archive's data set as `temporary`/dataset."""
    archive, dataset = temporary / "archive.zip", temporary / "dataset"
    try:
        with urlopen(ARCHIVE, timeout=TIMEOUT) as response, archive.open("wb") as file:
            total = int(response.headers.get("Content-Length") or 0)  # 0 where the server does not tell
            with logging.tqdm(total=total or None, desc="DreamBooth's photos", unit="B", unit_scale=True) as bar:
                while block := response.read(2**16):
                    file.write(block)
                    bar.update(len(block))
            if file.tell() < total:  # urllib takes a connection that is cut for the end
                raise OSError(f"the connection was cut after {file.tell()} of {total} bytes")
        with ZipFile(archive) as packed:
            paths = [PurePosixPath(info.filename.replace("\\", "/")) for info in packed.infolist()]
            if outside := [path for path in paths if path.is_absolute() or ".." in path.parts]:
                raise OSError(f"the archive has a path that leaves its folder, {outside[0]}")
            for info, path in zip(packed.infolist(), paths):
                if path.parts[1:2] != ("dataset",) or info.is_dir():
                    continue
                target = dataset.joinpath(*path.parts[2:])
                target.parent.mkdir(parents=True, exist_ok=True)
                with packed.open(info) as source, target.open("wb") as unpacked:
                    shutil.copyfileobj(source, unpacked)
        if not (dataset / CLASSES).is_file():
            raise OSError(f"the archive has no dataset/{CLASSES}")
    except (OSError, HTTPException, BadZipFile, zlib.error, EOFError) as error:
        raise OSError(
            f"DreamBooth's data set could not be fetched from {ARCHIVE}: {error}. Without a network here, download that "
            f"archive elsewhere, unpack its folder `dataset` as {folder}, and run this again: it goes on from there."
        ) from error


def _subjects(folder: Path) -> dict[str, dict[str, str]]:
    """What `folder`.json holds: the subjects that the data set's list names and the folder has photos of."""
    cure = f"Remove {folder} to have the data set fetched, or unpack the folder `dataset` of {ARCHIVE} in its place."
    try:
        text = (folder / CLASSES).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise OSError(f"{folder} is not DreamBooth's data set, it has no {CLASSES}. {cure}") from error
    table = text.partition("subject_name,class\n")[2].partition("\n\n")[0]
    subjects = {
        name: {"path": f"{folder.name}/{name}", "class": word, "initialization": word}
        for name, _, word in (line.strip().partition(",") for line in table.splitlines())
        if any(file.suffix.lower() in IMAGE_SUFFIXES for file in (folder / name).glob("*"))
    }
    if not subjects:
        raise OSError(f"{folder} has no photos of the subjects that its {CLASSES} names. {cure}")
    return subjects
