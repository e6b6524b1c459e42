"""What a run reports while it runs: the progress bar, the log file, validation images, a tracker."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from PIL import Image

from ..atomic import atomic_file
from ..parsing import parse_json
from . import validation
from .config import ResolvedConfig
from .distributed import processes

logger = logging.get_logger(__name__)

LOG_NAME = "train_log.jsonl"
STRIP_NAME = "validation.png"


class TrainingLog:
    """The record of one run, from its first step or from the checkpoint that it resumes from.

    Args:
        config: the settings of the run.
        name: what the progress bar shows.
        step: the number of steps done before.
        settings: what the tracker is told about the run.

    Attributes:
        history: a dict for each entry: step, loss, angle to the initializer in degrees, norm, sometimes the held-out loss. If
            several concepts are trained at once, these are means, and each concept has its own values as well, such as
            "loss/<dog>".
        images: the validation images, by step.
    """

    def __init__(self, config: ResolvedConfig, name: str, step: int, settings: Mapping[str, Any]):
        main = processes().is_main_process  # the other processes train the same and report nothing
        self.folder = Path(config.output_dir) if main and config.output_dir is not None else None
        self.history: list[dict[str, float]] = []
        self.images: dict[int, list[Image.Image]] = {}
        self.accelerator: Any = None
        if main and config.report_to is not None:
            from accelerate import Accelerator

            self.accelerator = Accelerator(log_with=config.report_to, project_dir=config.output_dir)
            plain = {k: v if isinstance(v, str | int | float) else str(v) for k, v in settings.items()}
            self.accelerator.init_trackers("diffusers-dti", plain)
        if self.folder is not None:
            self._start_file(self.folder / LOG_NAME, step)
        self._heldout: float | None = None  # the last one, for the bar
        self.bar = logging.tqdm(total=config.max_train_steps, initial=step, desc=name, disable=not main)

    def _start_file(self, log: Path, step: int) -> None:
        """Keep the entries logged before the checkpoint being resumed; otherwise start an empty log."""
        lines = log.read_bytes().splitlines() if step and log.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError):  # the last line of a run that was killed
                entry = parse_json(line)
                if _is_entry(entry) and entry["step"] <= step:
                    self.history.append({key: math.nan if value is None else value for key, value in entry.items()})
        with atomic_file(log) as temporary:
            temporary.write_text("".join(map(_line, self.history)))

    def write_metrics(self, step: int, metrics: Mapping[str, Mapping[str, float]], skipped: int) -> None:
        """Write an entry.

        Args:
            step: the number of steps done.
            metrics: each concept's metrics, by placeholder: the mean loss since the last entry, angle, norm, and the
                held-out loss if it was measured.
            skipped: the number of row updates that were skipped so far.
        """
        entry: dict[str, float] = {"step": step}
        for key in next(iter(metrics.values())):
            entry[key] = sum(own[key] for own in metrics.values()) / len(metrics)
        if len(metrics) > 1:
            for placeholder, own in metrics.items():
                for key, value in own.items():
                    entry[f"{key}/{placeholder}"] = value
        if skipped:
            entry["skipped"] = skipped
            logger.warning(f"{skipped} row updates skipped so far: their gradients were not finite.")
        self.history.append(entry)
        shown = {"loss": f"{entry['loss']:.4f}", "angle": f"{entry['angle']:.1f}°"}
        self._heldout = entry.get("heldout_loss", self._heldout)
        if self._heldout is not None:
            shown["held_out"] = f"{self._heldout:.4f}"
        self.bar.set_postfix(shown)
        if self.folder is not None:
            with _kept_going(LOG_NAME), (self.folder / LOG_NAME).open("a") as file:
                file.write(_line(entry))
        if self.accelerator is not None:
            self.accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=step)

    def add_images(self, step: int, images: list[Image.Image]) -> None:
        """Keep a step's validation images, and write the strip of all steps."""
        self.images[step] = images
        if self.folder is not None:
            with _kept_going(STRIP_NAME), atomic_file(self.folder / STRIP_NAME) as temporary:
                validation.strip(self.images).save(temporary)

    def close(self) -> None:
        """Close the bar and the tracker."""
        self.bar.close()
        if self.accelerator is None:
            return
        try:
            # Not `end_training`, which would close the other processes' connection as well.
            for tracker in self.accelerator.trackers:
                tracker.finish()
        except Exception as error:  # a tracker that is offline must not cost the result
            logger.warning(f"The tracker could not be closed: {error}")


@contextlib.contextmanager
def _kept_going(name: str) -> Iterator[None]:
    """Let a run go on if a file cannot be written."""
    try:
        yield
    except OSError as error:
        logger.warning(f"{name} could not be written, but training goes on: {error}")


def _is_entry(entry: Any) -> bool:
    """Return whether a line of a log is an entry: numbers by name, or None for NaN."""
    if not isinstance(entry, dict) or not {"step", "loss", "angle", "norm"} <= entry.keys():
        return False
    numbers = [value for key, value in entry.items() if key == "step" or value is not None]
    return all(type(number) in (int, float) for number in numbers)


def _line(entry: Mapping[str, float]) -> str:
    """Return an entry as a line of JSON, which has no NaN."""
    return json.dumps({key: value if math.isfinite(value) else None for key, value in entry.items()}) + "\n"
