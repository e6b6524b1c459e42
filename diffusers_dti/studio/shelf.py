"""The concepts at hand: those that were learned here, and those that were kept under a name or uploaded."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..atomic import atomic_folder
from ..concept.inversion import DirectionalInversion
from .job import all_jobs


class Shelf:
    """The kept concepts, a folder each, and the jobs' own.

    Args:
        root: the folder of the kept concepts.
        jobs: the folder of the jobs.
    """

    def __init__(self, root: Path, jobs: Path):
        self.root, self.jobs = root, jobs

    def choices(self) -> list[tuple[str, str]]:
        """Return what to show for each concept and where it is, kept ones first, then learned ones, the newest first."""
        kept = [path.parent for path in sorted(self.root.glob("*/learned_embeds.safetensors"))]
        found = [(folder.name, str(folder)) for folder in kept if not folder.name.startswith(".")]
        for job in reversed(all_jobs(self.jobs)):
            if job.status != "running" and (folder := job.concept_folder) is not None:
                found.append((f"{job.settings['placeholder_token']} ({job.name})", str(folder)))
        return found

    def keep(self, concept: DirectionalInversion, name: str) -> Path:
        """Keep a concept under a name.

        Raises:
            ValueError: if the name is not one of a folder, or taken.
        """
        if not re.fullmatch(r"[\w][\w. -]*", name):
            raise ValueError(
                f"{name!r} cannot name a concept here: use letters, digits, spaces, dots, hyphens and underscores."
            )
        if (self.root / name).exists():
            raise ValueError(f"A concept named {name} is kept already: choose another name.")
        with atomic_folder(self.root / name) as temporary:
            concept.save_pretrained(temporary)
        return self.root / name

    def upload(self, files: Sequence[str]) -> Path:
        """Keep a concept that was uploaded, in the format of any program, under the name of its first file.

        Args:
            files: its files: one, or several of the same save.

        Raises:
            ValueError: if they are not a concept, or its name is taken.
            OSError: if a file cannot be read.
        """
        with tempfile.TemporaryDirectory(prefix="dti-") as folder:
            for file in files:
                shutil.copyfile(file, Path(folder) / Path(file).name)
            first = min(Path(folder).iterdir(), key=lambda path: len(path.name))
            concept = DirectionalInversion.from_pretrained(first)
        name = concept.placeholder_token if first.stem.startswith("learned_embeds") else first.stem
        return self.keep(concept, re.sub(r"[^\w-]+", "", name) or "concept")
