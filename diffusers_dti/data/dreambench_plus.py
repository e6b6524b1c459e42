"""Read DreamBench++ as it is published: 150 subjects and styles, an image and nine prompts each.

    captions/live_subject/animal/00.txt    the subject in the first line, a prompt in each of the others
    images/live_subject/animal/00.jpg

It is the `data.zip` of https://huggingface.co/datasets/yuangpeng/dreambench_plus.
"""

import re
from pathlib import Path
from typing import Any

from diffusers.utils import logging

from .text_files import read_text

logger = logging.get_logger(__name__)


def is_dreambench_plus(folder: Path) -> bool:
    """Return whether a folder has the layout of DreamBench++."""
    return (folder / "captions").is_dir() and (folder / "images").is_dir()


def find_subjects(folder: Path) -> dict[str, Path]:
    """Return the caption file of each subject, by the name that the benchmark's own code gives it.

    Args:
        folder: the unpacked data set.

    Raises:
        ValueError: if there are no caption files, or one is empty or in an unknown encoding.
    """
    captions = folder / "captions"
    found = {}
    for file in sorted(captions.rglob("*.txt")):
        words = _lines(file)[0].lower().split()
        found["_".join([*file.relative_to(captions).with_suffix("").parts, *words])] = file
    if not found:
        raise ValueError(f"{captions} has no .txt files, which name the subjects: unpack the data set again.")
    return found


def read_entry(folder: Path, file: Path) -> dict[str, Any]:
    """Return a subject with the fields that it would have in a JSON file.

    Args:
        folder: the unpacked data set.
        file: the subject's caption file.

    Raises:
        ValueError: if no prompt names the subject.
    """
    subject, *captions = _lines(file)
    word = re.compile(rf"(?<!\w){re.escape(subject)}(?!\w)", re.IGNORECASE)
    prompts = [word.sub("{}", caption) for caption in captions if word.search(caption)]
    if not prompts:
        raise ValueError(f"{file} has no prompts with {subject!r:.80}, the subject in its first line.")
    if len(prompts) < len(captions):  # their images would not show what was learned
        logger.warning(
            f"Only {len(prompts)} of {len(captions)} prompts of {file} name {subject!r:.80}; the others are left out."
        )
    place = file.relative_to(folder / "captions")
    return {
        "path": str(folder / "images" / place.with_suffix(".jpg")),
        "class": subject,
        "learnable_property": "style" if place.parts[0] == "style" else "object",
        "prompts": prompts,
    }


def _lines(file: Path) -> list[str]:
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file} is empty: its first line should name the subject.")
    return lines
