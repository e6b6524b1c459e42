"""The training loop: from samples to losses to steps, over as many processes as `accelerate launch` started."""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from diffusers.utils import logging
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ..concept.inversion import DirectionalInversion
from ..families.base import Family
from ..pipeline.text_encoders import find_text_encoders
from . import checkpoint, validation
from .adapter import Adapter
from .config import ResolvedConfig
from .context import ContextLoss
from .distributed import processes
from .log import TrainingLog
from .optim import RiemannianSGD
from .optimizers import make_optimizers
from .trainable import TrainableConcept

logger = logging.get_logger(__name__)

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
        self.context_losses = {}
        if config.context_lambda:
            self.context_losses = {c.placeholder_token: ContextLoss(family, config, c) for c in concepts}
        self.optimizers = make_optimizers(config, concepts, adapter)
        # float16 needs its losses scaled up. They are scaled back before the optimizer weighs them against the prior.
        modules = [m for m in self.pipe.components.values() if isinstance(m, nn.Module)]
        half = any(getattr(m, "dtype", None) == torch.float16 for m in modules)
        self.scaler = torch.amp.GradScaler(self.pipe.device.type, init_scale=2.0**14, enabled=half)
        self.processes = processes()
        self.output_dir = None if config.output_dir is None else Path(config.output_dir)
        self.settings = self._checkpoint_settings()
        self.step = self.skipped_steps = 0
        if config.resume_from_checkpoint and self.output_dir is not None:
            folder = checkpoint.find_checkpoint(self.output_dir, config.resume_from_checkpoint)
            if folder is not None:
                self.step = checkpoint.load(folder, concepts, self.optimizers, adapter, self.settings)
                logger.info(f"Resuming from {folder}.")
        self.inversions: dict[str, DirectionalInversion] = {}
        self.log = TrainingLog(config, ", ".join(self.words), self.step, concepts[0].initial.metadata["training"])
        self._losses = torch.zeros(len(concepts), device=self.pipe.device)  # summed since the last log entry
        self._steps_summed = 0

    def _checkpoint_settings(self) -> dict[str, Any]:
        """Return what must be the same when the run is resumed."""
        settings: dict[str, Any] = {"tokens": self.words}  # in their order
        for word, concept in zip(self.words, self.concepts):
            own = concept.initial.metadata["training"] | concept.fingerprint()
            for key, value in own.items():
                if key != "max_train_steps":  # a run may be made longer
                    settings[f"{word} {key}"] = value
        return settings

    def run(self) -> None:
        """Train from the current step to the last one."""
        with ExitStack() as stack:
            if self.adapter is not None:
                stack.callback(self.adapter.train, False)
                stack.callback(self.adapter.keep)
            stack.callback(self.log.close)
            for concept in self.concepts:
                stack.enter_context(concept.swapped_in(find_text_encoders(self.pipe)))
            try:
                while self.step < self.config.max_train_steps:
                    self._train_step()
                for word, concept in zip(self.words, self.concepts):
                    self.inversions[word] = concept.current()
            except BaseException:
                self._keep_interrupted()
                raise

    def _train_step(self) -> None:
        """Take one step, and do what is due after it."""
        losses = self._accumulate()
        self._optimizer_step()
        if _overflowed(self.scaler):
            return  # the same samples come again, at half the scale: no step is lost
        self.step += 1
        self._losses, self._steps_summed = self._losses + losses, self._steps_summed + 1
        self.log.bar.update()
        if self.step % LOG_EVERY == 0 or self.step == self.config.max_train_steps:
            self._log()
        self._validate()
        if self.config.checkpointing_steps and self.step % self.config.checkpointing_steps == 0:
            self._save()
        if self.callback is not None:
            self.callback(self.step)

    def _keep_interrupted(self) -> None:
        """Keep what was trained so far, and write a checkpoint of it."""
        for word, concept in zip(self.words, self.concepts):
            with contextlib.suppress(ValueError):  # raw rows may have become infinite, which must not hide the error
                self.inversions[word] = concept.current()
        if len(self.inversions) == len(self.words) and self.output_dir is not None and self.step:
            self._save()
            logger.warning(f'Stopped at step {self.step}. To continue, use resume_from_checkpoint="latest".')

    def _accumulate(self) -> Tensor:
        """Compute one step's gradients, averaged over accumulated batches, and return the mean loss of each concept."""
        c, device = self.config, self.pipe.device
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if c.mixed_precision == "bf16":
            autocast = torch.autocast(device.type, dtype=torch.bfloat16)
        if self.adapter is not None:
            self.adapter.train(self.step >= c.adapter_start_step)
        losses = []
        for concept in self.concepts:
            total = torch.zeros((), device=device)
            for micro in range(c.gradient_accumulation_steps):
                number = (self.step * c.gradient_accumulation_steps + micro) * self.processes.num_processes
                first = (number + self.processes.process_index) * c.train_batch_size
                with autocast:
                    loss = self._loss(concept, first)
                self.scaler.scale(loss / c.gradient_accumulation_steps).backward()
                total = total + loss.detach() / c.gradient_accumulation_steps
            losses.append(total)
        return torch.stack(losses)

    def _loss(self, concept: TrainableConcept, first: int) -> Tensor:
        """Return the loss of the batch that begins at sample `first`, a scalar."""
        c, family = self.config, self.family
        batch = concept.samples.batch(first, c.train_batch_size, self.pipe.device)
        conditioning = family.encode_prompts(batch.prompts, batch.zero_pads)
        if c.dco_beta and self.adapter is not None:  # the log-likelihood of being better than without it (arXiv 2402.12004)
            with torch.no_grad(), self.adapter.off():
                base = family.loss(batch, conditioning)
            loss = -logsigmoid(-c.dco_beta * (family.loss(batch, conditioning) - base))
        else:
            loss = family.loss(batch, conditioning)
        if c.reg_lambda:
            loss = loss + c.reg_lambda * concept.distance_to_start()
        if c.context_lambda:
            loss = loss + c.context_lambda * self.context_losses[concept.placeholder_token](first, c.train_batch_size)
        return loss

    def _optimizer_step(self) -> None:
        """Step every optimizer. Skip the step if a gradient is not finite, unless `RiemannianSGD` is the only optimizer: it
        skips bad rows itself."""
        active, parameters = [], []
        for optimizer in self.optimizers:
            trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if trained:  # none before the adapter joins in
                self._average(trained)
                self.scaler.unscale_(optimizer)
                active.append(optimizer)
                parameters += trained
        skips_rows = len(active) == 1 and isinstance(active[0], RiemannianSGD)
        if skips_rows or torch.stack([p.grad.isfinite().all() for p in parameters]).all():
            for optimizer in active:
                self.scaler.step(optimizer)
        elif not self.scaler.is_enabled():
            self.skipped_steps += 1
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _average(self, parameters: Sequence[Tensor]) -> None:
        """Average the gradients over the processes."""
        if self.processes.num_processes > 1:
            for parameter in parameters:
                parameter.grad = reduce(parameter.grad, "mean")

    def _log(self) -> None:
        """Write a log entry with the mean losses since the last one."""
        losses = reduce(self._losses / self._steps_summed, "mean").tolist()
        self._losses, self._steps_summed = torch.zeros_like(self._losses), 0
        skipped = self.skipped_steps
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                if "skipped" in state:
                    skipped += int(state["skipped"].sum())
        metrics = {}
        for word, loss, concept in zip(self.words, losses, self.concepts):
            metrics[word] = {"loss": loss, **concept.metrics()}
        self.log.write_metrics(self.step, metrics, skipped)

    def _validate(self) -> None:
        """Generate validation images, if they are due."""
        c = self.config
        due = self.step % c.validation_steps == 0 or self.step == c.max_train_steps
        if not c.validation_prompt or not due or not self.processes.is_main_process:
            return
        prompts = []
        for prompt in validation.as_list(c.validation_prompt):
            for word in self.words if "{}" in prompt else self.words[:1]:
                prompts.append(prompt.replace("{}", word))
        with torch.no_grad():
            self.log.add_images(self.step, validation.generate(self.family, prompts, c.resolution, c.seed))

    def _save(self) -> None:
        """Write a checkpoint, and then remove the ones that are too old."""
        if self.processes.is_main_process and self.output_dir is not None:
            checkpoint.save(self.output_dir, self.step, self.concepts, self.optimizers, self.adapter, self.settings)
            checkpoint.prune(self.output_dir, self.step, self.config.checkpoints_total_limit)


def _overflowed(scaler: torch.amp.GradScaler) -> bool:
    """Update the loss scale, and return whether the step was skipped for overflow; below a scale of 1 it was for NaN."""
    before = scaler.get_scale()
    scaler.update()
    return 1 < before > scaler.get_scale()
