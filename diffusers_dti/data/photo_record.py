"""The record of the photos that a concept was trained on, which lets an evaluation be sure that photos are held out.

It is a file beside the concept. In the metadata it would be published with the concept, and tell those who have a photo that it
was used.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ..atomic import atomic_file
from ..parsing import parse_json

RECORD = "photos.json"


def write_record(folder: Path, photos: Sequence[Path]) -> None:
    """Write which photos the concept in a folder was trained on: digests of their files.

    Args:
        folder: the folder, with the concept.
        photos: the files.

    Raises:
        OSError: if the file cannot be written.
    """
    record = {"concept": _concept_digest(folder), "photos": [_digest([photo]) for photo in photos]}
    with atomic_file(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")


def check_held_out(folder: Path, photos: Sequence[Path]) -> None:
    """Check that the concept in a folder was not trained on photos.

    Args:
        folder: the folder, with the concept.
        photos: the files.

    Raises:
        ValueError: if it was trained on one of them, or has no record. That of an earlier concept in the folder does not count.
    """
    try:
        record = parse_json((folder / RECORD).read_bytes())
        known = record["photos"] if record["concept"] == _concept_digest(folder) else None
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
        known = None
    if not isinstance(known, list):
        raise ValueError(
            f"{folder} does not tell which photos its concept was trained on ({RECORD}): train it again with `dti train`, in "
            "another --output_dir."
        )
    for photo in photos:
        if _digest([photo]) in known:
            raise ValueError(
                f'{folder} was trained on {photo.name}, which is under "held_out" now: train it again, in another --output_dir.'
            )


def _concept_digest(folder: Path) -> str:
    return _digest(sorted(folder.glob("learned_embeds*.safetensors")))


def _digest(files: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
