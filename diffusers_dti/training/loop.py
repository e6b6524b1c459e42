"""The training loop: steps, and what is due between them: log entries, validation images, checkpoints."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors import SafetensorError
from torch import Tensor

from ..concept.inversion import DirectionalInversion
from ..families.base import Family
from ..pipeline.text_encoders import find_text_encoders
from . import checkpoint, validation
from .adapter import Adapter
from .config import ResolvedConfig
from .distributed import average, processes
from .log import TrainingLog
from .output import uninterrupted
from .step import Stepper
from .trainable import TrainableConcept

logger = logging.get_logger(__name__)

LOST_STEPS = 20  # steps in a row without a finite gradient, after which a run ends
LOG_EVERY = 10  # steps between two readings of loss and angle: each one waits for the device


class Loop:
    """One run over concepts that are loaded in the pipeline, from its start or from a checkpoint.

    Args:
        family: the family, bound to the pipeline.
        config: the settings.
        concepts: the concepts to train.
        adapter: the adapter to train with them.
        callback: a function to call after each step, with the number of steps done.

    Attributes:
        step: the number of steps done.
        inversions: the learned concepts, by placeholder; filled at the end, also if the run is interrupted.
        log: the history and the validation images.

    Raises:
        ValueError: if the checkpoint to resume from is another run's.
        OSError: if there is no such checkpoint.
        FloatingPointError: in `run`, if gradients are not finite for too long.
    """

    def __init__(
        self,
        family: Family,
        config: ResolvedConfig,
        concepts: Sequence[TrainableConcept],
        adapter: Adapter | None,
        callback: Callable[[int], object] | None,
    ):
        self.pipe, self.family, self.config, self.callback = family.pipe, family, config, callback
        self.concepts, self.adapter = concepts, adapter
        self.words = [concept.placeholder_token for concept in concepts]
        self.stepper = Stepper(family, config, concepts, adapter)
        self.is_main_process = processes().is_main_process
        self.output_dir = None if config.output_dir is None else Path(config.output_dir)
        self.settings = self._checkpoint_settings()
        self.step = 0
        if config.resume_from_checkpoint and self.output_dir is not None:
            folder = checkpoint.find_checkpoint(self.output_dir, config.resume_from_checkpoint)
            if folder is None:
                logger.warning(
                    f'{self.output_dir} has no checkpoint yet (resume_from_checkpoint="latest"): training starts from the '
                    "beginning."
                )
            else:
                self.step = checkpoint.load(folder, concepts, self.stepper.optimizers, adapter, self.settings)
                if self.step > config.max_train_steps:
                    raise ValueError(
                        f"{folder} is at step {self.step}, and `max_train_steps` is {config.max_train_steps}: raise that, or "
                        "resume from an earlier checkpoint."
                    )
                logger.info(f"Resuming from {folder}.")
        if self.step == 0 and self.output_dir is not None and self.is_main_process:
            checkpoint.warn_if_replaced(self.output_dir, self.words)
        self.prompts = self._validation_prompts()
        self.inversions: dict[str, DirectionalInversion] = {}
        self.log = TrainingLog(config, ", ".join(self.words), self.step, concepts[0].initial.metadata["training"])
        self._losses = torch.zeros(len(concepts), device=family.device)  # summed since the last log entry
        self._steps_summed = 0
        self._first_step = self._checked_step = self.step
        self._skipped = self._skipped_by_all_and_worst()[1]
        self._lost_in_a_row = 0

    def _validation_prompts(self) -> list[str]:
        """Return the prompts of the validation images, and warn about those without a concept."""
        prompts = []
        for prompt in validation.as_list(self.config.validation_prompt or []):
            if self.is_main_process and not any(word in prompt for word in ("{}", *self.words)):
                names = " or ".join(self.words)
                logger.warning(
                    f'The validation_prompt {prompt!r} has neither "{{}}" nor {names}: its images will not show the concept.'
                )
            for word in self.words if "{}" in prompt else self.words[:1]:
                prompts.append(prompt.replace("{}", word))
        return prompts

    def _checkpoint_settings(self) -> dict[str, Any]:
        """Return what must be the same when the run is resumed."""
        c = self.config
        settings: dict[str, Any] = {"tokens": self.words}  # in their order
        settings["samples a step (batch size x accumulation x processes)"] = c.samples_per_step
        for word, concept in zip(self.words, self.concepts):
            own = concept.initial.metadata["training"] | concept.fingerprint()
            for key, value in own.items():
                if key == "max_train_steps":
                    if c.lr_scheduler == "constant":
                        continue  # the run may be made longer
                    key = "max_train_steps (the rate falls towards the last one)"
                elif key in ("train_batch_size", "gradient_accumulation_steps") and not c.dco_beta:
                    continue  # all but DCO's loss is a mean over the samples of a step, however they are split
                settings[f"{word} {key}"] = value
        return settings

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.config.max_train_steps

    def run(self) -> None:
        """Train from the current step to the last one."""
        with self.running():
            while not self.done:
                with uninterrupted():  # a run that stopped amid a step could not be continued exactly
                    losses = self.stepper.take(self.step)
                    self.count(losses)
                self.finish_step(losses)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Take steps within the block, which keeps what was learned at its end, or so far if it is interrupted."""
        with ExitStack() as stack:
            if self.adapter is not None:
                stack.callback(self.adapter.train, False)
                stack.callback(self.adapter.keep)
            stack.callback(self.log.close)
            stack.enter_context(self.family.tokenized_once())
            for concept in self.concepts:
                stack.enter_context(concept.swapped_in(find_text_encoders(self.pipe)))
            try:
                yield
                for word, concept in zip(self.words, self.concepts):
                    self.inversions[word] = concept.current()
            except FloatingPointError:  # there is nothing to keep
                raise
            except BaseException:
                with uninterrupted():  # a launcher whose other process has failed sends its signal amid this
                    self._keep_interrupted()
                raise

    def count(self, losses: Tensor | None) -> None:
        """Count a step that was taken, with the losses of the concepts. None is not counted: the same samples come again."""
        if losses is not None:
            self.step += 1
            self._losses, self._steps_summed = self._losses + losses, self._steps_summed + 1

    def finish_step(self, losses: Tensor | None) -> None:
        """Do what is due after a step that was counted."""
        if losses is None:
            return
        self.log.bar.update()
        if self._due(LOG_EVERY) or self._due(self.config.heldout_loss_steps):
            self._log()
        self._validate()
        if self.config.checkpointing_steps and self.step % self.config.checkpointing_steps == 0:
            self._save()
        if self.callback is not None:
            self.callback(self.step)

    def _due(self, steps: int) -> bool:
        """Return whether something that happens every `steps` steps and at the end is due now; 0 means never."""
        return steps > 0 and (self.step % steps == 0 or self.step == self.config.max_train_steps)

    def _keep_interrupted(self) -> None:
        """Keep what was trained so far, and write a checkpoint of it."""
        for word, concept in zip(self.words, self.concepts):
            with contextlib.suppress(ValueError):  # raw rows may have become infinite, which must not hide the error
                self.inversions[word] = concept.current()
        if len(self.inversions) == len(self.words) and self.output_dir is not None and self.step:
            self._save()
            logger.warning(f'Stopped at step {self.step}. To continue, set resume_from_checkpoint to "latest".')

    def _log(self) -> None:
        """Write a log entry with the mean losses since the last one."""
        losses = average(self._losses / self._steps_summed).tolist()
        self._losses, self._steps_summed = torch.zeros_like(self._losses), 0
        skipped = self._skipped_by_all_and_worst()
        metrics = {}
        for word, loss, concept in zip(self.words, losses, self.concepts):
            metrics[word] = {"loss": loss, **concept.metrics()}
            if self._due(self.config.heldout_loss_steps):
                metrics[word]["heldout_loss"] = self.stepper.heldout_loss(concept).item()
        self.log.write_metrics(self.step, metrics, skipped[0])
        self._check_updates(skipped[1])

    def _skipped_by_all_and_worst(self) -> tuple[int, int]:
        """Return how many updates were skipped so far, and how many of one row, the one with the most."""
        rows = self.stepper.skipped_updates()
        return self.stepper.skipped_steps + sum(rows), self.stepper.skipped_steps + max(rows, default=0)

    def _check_updates(self, skipped: int) -> None:
        """Check that every row is still being updated.

        Args:
            skipped: the number of updates that the row with the most of them has skipped.
        """
        done, self._checked_step = self.step - self._checked_step, self.step
        lost, self._skipped = skipped - self._skipped, skipped
        self._lost_in_a_row = self._lost_in_a_row + lost if lost == done else 0
        at_the_end = self.step == self.config.max_train_steps and self._lost_in_a_row == self.step - self._first_step
        if self._lost_in_a_row >= LOST_STEPS or (at_the_end and self._lost_in_a_row):
            raise FloatingPointError(
                f"{', '.join(self.words)}: the gradients of {self._lost_in_a_row} steps in a row were not finite, so that "
                "nothing is learned. Load the pipeline in float32 or bfloat16, since float16 overflows in some models, or look "
                "for NaN in its weights and in the photos' latents."
            )

    def _validate(self) -> None:
        """Generate validation images, if they are due."""
        c = self.config
        if not self.prompts or not self._due(c.validation_steps) or not self.is_main_process:
            return
        with torch.no_grad():
            self.log.add_images(self.step, validation.generate(self.family, self.prompts, c.resolution, c.seed))

    def _save(self) -> None:
        """Write a checkpoint, and then remove the ones that are too old. A full disk does not end the run."""
        if self.is_main_process and self.output_dir is not None:
            try:
                checkpoint.save(self.output_dir, self.step, self.concepts, self.stepper.optimizers, self.adapter, self.settings)
                checkpoint.prune(self.output_dir, self.step, self.config.checkpoints_total_limit)
            except (OSError, SafetensorError) as error:
                logger.warning(f"There is no checkpoint of step {self.step}, but training goes on: {error}")
