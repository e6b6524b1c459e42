"""The checkpoints, clock and log of a pretraining stage."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from diffusers_dti.atomic import atomic_file


class Stage:
    """The checkpoints, clock and log of a training loop, which resumes from the newest checkpoint.

    Args:
        work: the folder for checkpoints and logs.
        name: the stage's name in files.
        parts: everything with a state dict that a checkpoint has to keep, by name.
    """

    def __init__(self, work: Path, name: str, parts: dict[str, Any]) -> None:
        self.file, self.log = work / f"{name}.pt", work / f"{name}.log"
        self.parts, self.step, self.start = parts, 0, time.time()
        if self.file.exists():
            saved = torch.load(self.file, weights_only=True)
            self.step = saved.pop("step")
            for key, value in saved.items():
                self.parts[key].load_state_dict(value)

    def tick(self, every: int, steps: int, **figures: float) -> None:
        """Count a step. After every `every` steps and after the last one, write a log entry and a checkpoint."""
        self.step += 1
        if self.step % every == 0 or self.step == steps:
            line = {"step": self.step, "seconds": round(time.time() - self.start), **figures}
            with self.log.open("a") as f:
                f.write(json.dumps(line) + "\n")
            states = {name: part.state_dict() for name, part in self.parts.items()}
            with atomic_file(self.file) as temporary:
                torch.save({"step": self.step} | states, temporary)
