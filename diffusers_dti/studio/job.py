"""A training job: a folder that says what to learn, and in which everything about it is found again.

Nothing about a job is kept in memory, so that a page that is loaded again, and a server that is started again, go on with it.
The folder has

- `job.json`, what to learn, and `photos/`, both written once;
- `status.json`, written by the runner;
- `progress.json` and `samples/`, written by the worker;
- `run/`, the trainer's `output_dir`: its log, its checkpoints and the learned concept;
- `worker.log`, what the worker printed.
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from ..atomic import atomic_file, atomic_folder
from ..concept.inversion import DirectionalInversion
from ..parsing import parse_json
from ..training.checkpoint import find_checkpoint
from ..training.config import DTIConfig
from ..training.log import LOG_NAME
from .photos import copy_uploads, read_photos

Status = Literal["waiting", "running", "done", "stopped", "failed"]
WORD = "word"  # what names the images of the initializer's word, in place of a step


@dataclass(frozen=True)
class Job:
    """A job.

    Args:
        folder: its folder.
    """

    folder: Path

    @property
    def name(self) -> str:
        """The folder's name, by which jobs are in the order of their creation."""
        return self.folder.name

    @property
    def photos(self) -> Path:
        """The folder of the photos, with masks and captions."""
        return self.folder / "photos"

    @property
    def run(self) -> Path:
        """The folder that the trainer writes to."""
        return self.folder / "run"

    @property
    def log(self) -> Path:
        """The file of what the worker prints."""
        return self.folder / "worker.log"

    # ------------------------------------------------------------------------------------------------ what is to be learned
    @classmethod
    def create(cls, root: Path, uploads: Sequence[str | Path], model: str, settings: Mapping[str, Any]) -> "Job":
        """Write a new job, which waits for its turn.

        Args:
            root: the folder of all jobs.
            uploads: the files of the photos, with masks and captions.
            model: Hub id or folder of the pipeline.
            settings: fields of `DTIConfig`.

        Raises:
            ValueError: if photos or settings cannot be used.
            OSError: if a file is not an image.
        """
        if not model.strip():
            raise ValueError("Choose a model: the Hub id or the folder of a pipeline.")
        config = DTIConfig(**settings)
        word = re.sub(r"\W+", "", str(config.placeholder_token)) or "concept"
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{word}"
        while (root / name).exists():
            name += "_"
        with atomic_folder(root / name) as temporary:
            job = cls(temporary)
            job.photos.mkdir()
            copy_uploads(uploads, job.photos)
            read_photos(job.photos, config.resolution, config.placeholder_token)
            (temporary / "job.json").write_text(json.dumps({"model": model.strip(), "settings": dict(settings)}))
            (temporary / "status.json").write_text(json.dumps({"status": "waiting", "error": ""}))
        return cls(root / name)

    @property
    def model(self) -> str:
        """Hub id or folder of the pipeline."""
        return str(self._read("job.json")["model"])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run that were chosen, by field of `DTIConfig`."""
        return dict(self._read("job.json")["settings"])

    @property
    def prompts(self) -> list[str]:
        """The validation prompts, with "{}" for the placeholder."""
        return list(self.settings.get("validation_prompt") or [])

    # --------------------------------------------------------------------------------------------------------- how it goes
    @property
    def status(self) -> Status:
        """What is known of the job."""
        status: Status = self._read("status.json")["status"]
        if status not in get_args(Status):
            raise ValueError(f"{self.folder / 'status.json'} is damaged: it says {status!r:.40}.")
        return status

    @property
    def error(self) -> str:
        """Why the job failed, or "" if it did not."""
        return str(self._read("status.json").get("error", ""))

    def set_status(self, status: Status, error: str = "") -> None:
        """Write down what is known of the job now."""
        self._write("status.json", {"status": status, "error": error})

    @property
    def progress(self) -> dict[str, Any]:
        """What the worker does: "phase", and once it takes steps "step", "steps", "seconds_left" and the "initializer"."""
        return self._read("progress.json") if (self.folder / "progress.json").exists() else {}

    def set_progress(self, **progress: Any) -> None:
        """Write down what the worker does now."""
        self._write("progress.json", progress)

    @property
    def history(self) -> list[dict[str, float]]:
        """The entries of the trainer's log."""
        file = self.run / LOG_NAME
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []  # the last line may not be whole yet
        return [parse_json(line) for line in lines]

    @property
    def notices(self) -> str:
        """What the library had to say: the last lines that the worker printed, without its progress bars."""
        if not self.log.exists():
            return ""
        lines = self.log.read_text(errors="replace").splitlines()  # of a bar that moves, each state ends by a carriage return
        return "\n".join([line for line in lines if line.strip() and "%|" not in line][-20:])

    # ------------------------------------------------------------------------------------------------------- what it yields
    def add_sample(self, step: int | str, number: int, image: Image.Image) -> None:
        """Keep a validation image of a prompt, by its number, at a step, or of the word alone (`WORD`)."""
        (self.folder / "samples").mkdir(exist_ok=True)
        with atomic_file(self._sample(step, number)) as temporary:
            image.save(temporary)

    def samples(self, number: int) -> dict[int | str, Path]:
        """Return the images of a prompt: first of the initializer's word, then by step."""
        word, others = self._sample(WORD, number), {}
        for path in self.folder.glob(f"samples/*_{number}.png"):
            step = path.name.partition("_")[0]
            if step.isdecimal():
                others[int(step)] = path
        found: dict[int | str, Path] = {WORD: word} if word.exists() else {}
        return found | dict(sorted(others.items()))

    def _sample(self, step: int | str, number: int) -> Path:
        return self.folder / "samples" / f"{step}_{number}.png"

    @property
    def concept_folder(self) -> Path | None:
        """Where the learned concept is: the run's folder, or its newest checkpoint if it has not ended; None before that."""
        if any(self.run.glob("learned_embeds*.safetensors")):
            return self.run
        return find_checkpoint(self.run, "latest")

    @property
    def kept_step(self) -> int:
        """The step of the newest checkpoint, 0 if there is none."""
        folder = find_checkpoint(self.run, "latest")
        return int(folder.name.removeprefix("checkpoint-")) if folder else 0

    def concept(self) -> DirectionalInversion:
        """Return what was learned so far.

        Raises:
            ValueError: if the run has no checkpoint yet.
        """
        folder = self.concept_folder
        if folder is None:
            raise ValueError("Nothing has been learned yet: there is a first checkpoint after 10 steps.")
        return DirectionalInversion.from_pretrained(folder)

    # ----------------------------------------------------------------------------------------------------------- its files
    def _read(self, name: str) -> Any:
        return parse_json((self.folder / name).read_bytes())

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        with atomic_file(self.folder / name) as temporary:
            temporary.write_text(json.dumps(value))


def all_jobs(root: Path) -> list[Job]:
    """Return the jobs in a folder, the oldest first."""
    return [Job(path.parent) for path in sorted(root.glob("*/job.json")) if not path.parent.name.startswith(".")]
