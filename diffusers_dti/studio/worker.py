"""Learn the concept of one job, in a process of its own: `python -m diffusers_dti.studio.worker FOLDER`.

A process can be stopped at any step, frees the device's memory when it ends, and does not take the page along if it crashes.
It ends when its standard input does: by the runner, or because the server is gone. It then leaves a checkpoint.
"""

import signal
import sys
import threading
import time
from _thread import interrupt_main
from pathlib import Path

import torch
from diffusers.utils import logging
from filelock import FileLock

from ..concept.concept import Concept
from ..training import validation
from ..training.trainer import DTITrainer
from .job import WORD, Job
from .models import Opening

logger = logging.get_logger(__name__)

CHECKPOINTING_STEPS = 10  # the most that a power cut costs
STOPPED = 130  # the exit status of a run that was stopped, as that of a shell's command
ERROR = "error: "  # the line of the log that says why a run failed begins like this


class Reporter:
    """Write down how a run goes, after each of its steps.

    Args:
        job: the job.
    """

    def __init__(self, job: Job):
        self.job = job
        self._first: tuple[int, float] | None = None  # a step of this process, and when it was done
        self._written = 0.0

    def __call__(self, trainer: DTITrainer, step: int) -> None:
        """Report a step."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
            self._draw_word(trainer)
        steps = trainer.config.max_train_steps
        if step == steps or now - self._written > 0.5:
            done = step - self._first[0]
            left = (now - self._first[1]) / done * (steps - step) if done else None
            self.job.set_progress(phase="Learning", step=step, steps=steps, seconds_left=left, initializer=_word(trainer))
            self._written = now
        for number, image in enumerate(trainer.validation_images.get(step, [])):
            self.job.add_sample(step, number, image)

    def _draw_word(self, trainer: DTITrainer) -> None:
        """Draw what the prompts show with the initializer's word in place of the placeholder, from the same seeds."""
        config = trainer.config
        if WORD in self.job.samples(0) or not self.job.prompts:
            return
        prompts = [prompt.replace("{}", _word(trainer)) for prompt in self.job.prompts]
        with torch.no_grad():
            images = validation.generate(trainer.family, prompts, config.resolution, config.seed)
        for number, image in enumerate(images):
            self.job.add_sample(WORD, number, image)


def _word(trainer: DTITrainer) -> str:
    """Return the word that the run started from, also if the run has proposed it."""
    initializer = trainer.config.initializers_for(str(trainer.config.placeholder_token))[0]
    return initializer.placeholder_token if isinstance(initializer, Concept) else initializer


def learn(job: Job, opening: Opening) -> None:
    """Learn a job's concept, from its newest checkpoint if it has one.

    Args:
        job: the job.
        opening: how models are opened.
    """
    if any(job.run.glob("learned_embeds*.safetensors")):  # the server was gone before it could know
        return
    job.set_progress(phase="Opening the model")
    trainer = DTITrainer(
        opening.open(job.model),
        **job.settings,
        output_dir=job.run,
        checkpointing_steps=CHECKPOINTING_STEPS,
        checkpoints_total_limit=2,
        resume_from_checkpoint="latest",
    )
    auto = trainer.config.initializers_for(str(trainer.config.placeholder_token)) == ["auto"]
    job.set_progress(phase="Looking for the initializer" if auto else "Reading the photos")
    trainer.fit(job.photos, callback_on_step_end=Reporter(job))


def _stop_at_the_end_of_input() -> None:
    sys.stdin.read()
    interrupt_main()


def main() -> int:
    """Learn the concept of the job whose folder is the first argument; dtype and device may follow.

    Returns:
        The exit status.
    """
    folder, dtype, device = sys.argv[1:]
    job = Job(Path(folder))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background processes ignore
    threading.Thread(target=_stop_at_the_end_of_input, daemon=True).start()
    try:
        with FileLock(job.folder / ".worker.lock"):  # the worker of a server that was killed may still write a checkpoint
            learn(job, Opening(dtype or None, device or None))
    except KeyboardInterrupt:
        return STOPPED
    except Exception as error:
        logger.error("The run failed.", exc_info=True)
        print(f"{ERROR}{error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
