"""One training step: from samples to losses to gradients to rows, over as many processes as `accelerate launch` started."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ..families.base import Family
from .adapter import Adapter
from .config import ResolvedConfig
from .context import ContextLoss
from .distributed import average, processes
from .heldout import heldout_loss
from .optim import SphereOptimizer
from .optimizers import make_optimizers, set_rates
from .trainable import TrainableConcept


class Stepper:
    """Take the steps of a run.

    Args:
        family: the family, bound to the pipeline.
        config: the settings.
        concepts: the concepts to train. Their rows are swapped in while steps are taken, and not yet before.
        adapter: the adapter to train with them.

    Attributes:
        optimizers: those of the tokens, of trained magnitudes and of the adapter.
        skipped_steps: the number of steps that were skipped because a gradient was not finite.
    """

    def __init__(self, family: Family, config: ResolvedConfig, concepts: Sequence[TrainableConcept], adapter: Adapter | None):
        self.family, self.config = family, config
        self.device = family.device
        self.concepts, self.adapter = concepts, adapter
        self.context_losses: dict[str, ContextLoss] = {}
        if config.context_lambda:
            self.context_losses = {c.placeholder_token: ContextLoss(family, config, c) for c in concepts}
        self.optimizers = make_optimizers(config, concepts, adapter)
        # float16 needs its losses scaled up. They are scaled back before the optimizer weighs them against the prior.
        modules = [m for m in family.pipe.components.values() if isinstance(m, nn.Module)]
        half = any(getattr(m, "dtype", None) == torch.float16 for m in modules)
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**14, enabled=half)
        self.processes = processes()
        self.skipped_steps = 0

    def take(self, step: int) -> Tensor | None:
        """Take step number `step`, counted from 0, with every concept.

        Returns:
            The mean loss of each concept, (n,). None if float16 overflowed: take the step again, at half the loss scale.
        """
        losses = self._accumulate(step)
        return losses if self.update(step) else None

    def update(self, step: int) -> bool:
        """Step the optimizers with the gradients of step number `step`.

        Returns:
            Whether the step is done. False if float16 overflowed.
        """
        self._optimizer_step(step)
        scale = self.scaler.get_scale()
        self.scaler.update()
        if self.scaler.get_scale() < scale:
            if scale > 1:
                return False
            self.skipped_steps += 1  # below 1 it was no overflow, but NaN
        return True

    def skipped_updates(self) -> list[int]:
        """Return how many updates each row has skipped by itself so far, besides `skipped_steps`."""
        counts: list[int] = []
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                if "skipped" in state:
                    counts += state["skipped"].flatten().int().tolist()
        return counts

    def heldout_loss(self, concept: TrainableConcept) -> Tensor:
        """Return the held-out loss of a concept, a scalar."""
        with self.autocast():
            return heldout_loss(self.family, concept.samples, self.config.train_batch_size)

    def _accumulate(self, step: int) -> Tensor:
        """Compute one step's gradients, averaged over accumulated batches, and return the mean loss of each concept."""
        c = self.config
        if self.adapter is not None:
            self.adapter.train(step >= c.adapter_start_step)
        losses = []
        for concept in self.concepts:
            total = torch.zeros((), device=self.device)
            for micro in range(c.gradient_accumulation_steps):
                first = self.first_sample(step, micro)
                with self.autocast():
                    loss = self._loss(concept, first)
                self.scaler.scale(loss / c.gradient_accumulation_steps).backward()
                total = total + loss.detach() / c.gradient_accumulation_steps
            losses.append(total)
        return torch.stack(losses)

    def first_sample(self, step: int, micro: int) -> int:
        """Return the number of the first sample of this process in an accumulated batch of a step."""
        number = (step * self.config.gradient_accumulation_steps + micro) * self.processes.num_processes
        return (number + self.processes.process_index) * self.config.train_batch_size

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Run models as `mixed_precision` says, within the block."""
        if self.config.mixed_precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def _loss(self, concept: TrainableConcept, first: int) -> Tensor:
        """Return the loss of the batch that begins at sample `first`, a scalar."""
        c, family = self.config, self.family
        batch = concept.samples.batch(first, c.train_batch_size, self.device)
        conditioning = family.encode_prompts(batch.prompts, batch.zero_pads)
        if c.dco_beta and self.adapter is not None:  # the log-likelihood of being better than without it (arXiv 2402.12004)
            with torch.no_grad(), self.adapter.off():
                base = family.loss(batch, conditioning)
            loss = -logsigmoid(-c.dco_beta * (family.loss(batch, conditioning) - base))
        else:
            loss = family.loss(batch, conditioning)
        return self.penalized(loss, concept, first)

    def penalized(self, loss: Tensor, concept: TrainableConcept, first: int) -> Tensor:
        """Return the loss of the batch that begins at sample `first` with the terms that do not come from the denoiser."""
        c = self.config
        if c.reg_lambda:
            loss = loss + c.reg_lambda * concept.distance_to_start()
        if c.context_lambda:
            loss = loss + c.context_lambda * self.context_losses[concept.placeholder_token](first, c.train_batch_size)
        return loss

    def _optimizer_step(self, step: int) -> None:
        """Step every optimizer. Skip the step if a gradient is not finite, unless a `SphereOptimizer` is the only one: it skips
        bad rows itself."""
        c = self.config
        set_rates(self.optimizers, c.lr_scheduler, step / c.max_train_steps)
        active, parameters = [], []
        for optimizer in self.optimizers:
            trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if trained:  # none before the adapter joins in
                for parameter in trained:
                    parameter.grad = average(parameter.grad)
                self.scaler.unscale_(optimizer)
                active.append(optimizer)
                parameters += trained
        skips_rows = len(active) == 1 and isinstance(active[0], SphereOptimizer)
        if skips_rows or torch.stack([p.grad.isfinite().all() for p in parameters]).all():
            for optimizer in active:
                self.scaler.step(optimizer)
        elif not self.scaler.is_enabled():
            self.skipped_steps += 1
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
