"""What a run tells while it runs: the bar, the log, pictures on the way, trackers."""

import contextlib
import json
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from PIL import Image

from . import validation
from .config import DTIConfig
from .distributed import processes

logger = logging.get_logger(__name__)

LOG_NAME = "train_log.jsonl"
STRIP_NAME = "validation.png"


class TrainingLog:
    """The record of one run, from its first step or from the checkpoint that it goes on from.

    `history` has a dict for each reading: step, loss, angle to the initializer (degrees) and norm; where several concepts are
    learned at once, each one's own beside the means, as "loss/<dog>".
    """

    def __init__(self, config: DTIConfig, name: str, step: int, settings: dict[str, Any]):
        main = processes().is_main_process  # others learn the same and are silent
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
            self._start_log(self.folder / LOG_NAME, step)
        self.bar = logging.tqdm(total=config.max_train_steps, initial=step, desc=name, disable=not main)

    def _start_log(self, log: Path, step: int) -> None:
        """Keep what the run that is gone on from logged up to its step; of a run from the start, nothing."""
        log.parent.mkdir(parents=True, exist_ok=True)
        for line in log.read_text().splitlines() if step and log.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a run that was killed
                reading = json.loads(line)
                if reading["step"] <= step:
                    self.history.append(reading)
        temporary = log.with_name(f".{log.name}")
        temporary.write_text("".join(json.dumps(x) + "\n" for x in self.history))
        temporary.replace(log)

    def write_metrics(self, step: int, losses: dict[str, float], others: dict[str, dict[str, float]], skipped: int) -> None:
        """Take a reading: the mean loss of each concept since the last one, and what else there is of each."""
        each = {word: {"loss": loss, **others[word]} for word, loss in losses.items()}
        reading = {"step": step} | {k: sum(x[k] for x in each.values()) / len(each) for k in next(iter(each.values()))}
        if len(each) > 1:
            reading |= {f"{k}/{word}": v for word, x in each.items() for k, v in x.items()}
        if skipped:
            reading["skipped"] = skipped
            logger.warning(f"{skipped} row updates left out so far: their gradients were not finite.")
        self.history.append(reading)
        self.bar.set_postfix(loss=f"{reading['loss']:.4f}", angle=f"{reading['angle']:.1f}°")
        if self.folder is not None:
            with (self.folder / LOG_NAME).open("a") as file:
                file.write(json.dumps(reading) + "\n")
        if self.accelerator is not None:
            self.accelerator.log({k: v for k, v in reading.items() if k != "step"}, step=step)

    def add_images(self, step: int, pictures: list[Image.Image]) -> None:
        """Keep a step's validation pictures, and draw the strip over steps anew."""
        self.images[step] = pictures
        if self.folder is not None:
            validation.strip(self.images).save(self.folder / STRIP_NAME)

    def close(self) -> None:
        self.bar.close()
        if self.accelerator is not None:
            try:
                for tracker in self.accelerator.trackers:  # `end_training` would end the other processes' connection too
                    tracker.finish()
            except Exception as error:  # a tracker that is offline must not cost the result
                logger.warning(f"The tracker could not be closed: {error}")
