"""The training loop: samples to losses to steps, over as many processes as `accelerate launch` started."""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import reduce
from diffusers.utils import logging
from torch.nn.functional import logsigmoid

from ..concept.inversion import DirectionalInversion
from ..families.base import Family
from ..pipeline.text_encoders import find_text_encoders
from . import checkpoint, validation
from .adapter import Adapter
from .config import DTIConfig
from .distributed import processes
from .log import TrainingLog
from .optim import RiemannianSGD, SphericalAdamW
from .trainable import TrainableConcept

logger = logging.get_logger(__name__)

LOG_EVERY = 10  # steps between two readings of loss and angle: each one waits for the device
MAGNITUDE_RATE = 0.005  # of a trained magnitude's logarithm, before `scale_lr`: that of textual inversion


def optimizers(config: DTIConfig, concepts: Sequence[TrainableConcept], adapter: Adapter | None) -> list[torch.optim.Optimizer]:
    """Those of a method: one for the tokens, one each for trained magnitudes and for the adapter."""
    c, rate = config, config.effective_learning_rate
    if c.raw:  # as diffusers' textual inversion scripts have it
        made: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([r.direction for x in concepts for r in x.rows.values()], lr=rate, weight_decay=1e-2)
        ]
    else:
        groups = [
            {"params": [r.direction], "prior": x.initial.directions[component].to(r.direction.device)}
            for x in concepts
            for component, r in x.rows.items()
        ]
        if c.optimizer == "adamw":
            made = [SphericalAdamW(groups, lr=rate, kappa=c.kappa)]
        else:
            made = [RiemannianSGD(groups, lr=rate, kappa=c.kappa, beta=c.beta)]
    if c.train_magnitude:
        factors = [r.log_factor for x in concepts for r in x.rows.values()]
        made.append(torch.optim.AdamW(factors, lr=MAGNITUDE_RATE * c.rate_factor, weight_decay=0.0))
    if adapter is not None:
        made.append(torch.optim.AdamW(adapter.parameters.values(), lr=c.adapter_learning_rate, weight_decay=1e-2))
    return made


class Loop:
    """One run over concepts that are loaded in the pipeline.

    Its `inversions` are filled at the end, also at a bad one; `report` has the history and the pictures.
    """

    def __init__(
        self,
        family: Family,
        config: DTIConfig,
        concepts: Sequence[TrainableConcept],
        adapter: Adapter | None,
        callback: Callable[[int], None] | None,
    ):
        self.pipe, self.family, self.config, self.callback = family.pipe, family, config, callback
        self.concepts, self.adapter = concepts, adapter
        self.words = [x.initial.placeholder_token for x in concepts]
        self.optimizers = optimizers(config, concepts, adapter)
        self.processes = processes()
        self.settings: dict[str, Any] = {"tokens": self.words}  # in their order
        for word, concept in zip(self.words, concepts):
            own = concept.initial.metadata["training"] | concept.fingerprint()
            # a run may be made longer
            self.settings |= {f"{word} {k}": v for k, v in own.items() if k != "max_train_steps"}
        self.step = self.skipped_steps = 0
        if config.resume_from_checkpoint:
            folder = checkpoint.find_checkpoint(config.output_dir, config.resume_from_checkpoint)
            if folder is not None:
                self.step = checkpoint.load(folder, concepts, self.optimizers, adapter, self.settings)
                logger.info(f"Going on from {folder}.")
        self.inversions: dict[str, DirectionalInversion] = {}
        self.log = TrainingLog(config, ", ".join(self.words), self.step, concepts[0].initial.metadata["training"])

    def run(self) -> None:
        """Train from the current step to the last one."""
        c, pipe = self.config, self.pipe
        # float16 needs its losses scaled up; they are scaled back before the optimizer, which weighs them against the prior
        half = torch.float16 in {m.dtype for m in pipe.components.values() if isinstance(m, torch.nn.Module)}
        scaler = torch.amp.GradScaler(pipe.device.type, init_scale=2.0**14, enabled=half)
        totals, readings = torch.zeros(len(self.concepts), device=pipe.device), 0
        with ExitStack() as stack:
            stack.callback(self.log.close)
            for concept in self.concepts:
                stack.enter_context(concept.swapped_in(find_text_encoders(pipe)))
            try:
                while self.step < c.max_train_steps:
                    losses = self._accumulate(scaler)
                    self._optimizer_step(scaler)
                    if half and _overflowed(scaler):
                        continue  # the same samples again, at half the scale: no step is lost
                    totals, readings, self.step = totals + losses, readings + 1, self.step + 1
                    self.log.bar.update()
                    if self.step % LOG_EVERY == 0 or self.step == c.max_train_steps:
                        self._log(reduce(totals / readings, "mean"))
                        totals, readings = torch.zeros_like(totals), 0
                    self._validate()
                    if c.checkpointing_steps and self.step % c.checkpointing_steps == 0:
                        self._save()
                    if self.callback is not None:
                        self.callback(self.step)
                self.inversions |= {w: x.current() for w, x in zip(self.words, self.concepts)}
            except BaseException:  # an interruption too: what was trained is kept
                for word, concept in zip(self.words, self.concepts):
                    with contextlib.suppress(ValueError):  # raw rows may have become infinite: not to hide the error
                        self.inversions[word] = concept.current()
                if len(self.inversions) == len(self.words) and c.output_dir is not None and self.step:
                    self._save()
                    logger.warning(f'Stopped at step {self.step}; go on with resume_from_checkpoint="latest".')
                raise

    def _accumulate(self, scaler: torch.amp.GradScaler) -> torch.Tensor:
        """One step's gradients, averaged over accumulated batches; returns each concept's mean loss."""
        c, pipe = self.config, self.pipe
        autocast = contextlib.nullcontext()
        if c.mixed_precision == "bf16":
            autocast = torch.autocast(pipe.device.type, dtype=torch.bfloat16)
        if self.adapter is not None:
            self.adapter.train(self.step >= c.adapter_start_step)
        losses = []
        for concept in self.concepts:
            total = torch.zeros((), device=pipe.device)
            for micro in range(c.gradient_accumulation_steps):
                number = (self.step * c.gradient_accumulation_steps + micro) * self.processes.num_processes
                first = (number + self.processes.process_index) * c.train_batch_size
                with autocast:
                    loss = self._loss(concept, first)
                scaler.scale(loss / c.gradient_accumulation_steps).backward()
                total = total + loss.detach() / c.gradient_accumulation_steps
            losses.append(total)
        return torch.stack(losses)

    def _loss(self, concept: TrainableConcept, first: int) -> torch.Tensor:
        """Of the batch that begins at sample `first`, a scalar."""
        c, pipe, family = self.config, self.pipe, self.family
        batch = concept.samples.batch(first, c.train_batch_size, pipe.device)
        conditioning = family.encode_prompts(batch.prompts, batch.zero_pads)
        if c.dco_beta:  # how much better than without the adapter, as a log-likelihood (arXiv 2402.12004)
            with torch.no_grad(), self.adapter.off():
                base = family.loss(batch, conditioning)
            loss = -logsigmoid(-c.dco_beta * (family.loss(batch, conditioning) - base))
        else:
            loss = family.loss(batch, conditioning)
        return loss + c.reg_lambda * concept.distance_to_start() if c.reg_lambda else loss

    def _optimizer_step(self, scaler: torch.amp.GradScaler) -> None:
        """A step of all optimizers; where gradients are not finite, of none but the one that leaves such rows out itself."""
        gradients = []
        for optimizer in self.optimizers:
            given = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if self.processes.num_processes > 1:
                for parameter in given:
                    parameter.grad = reduce(parameter.grad, "mean")
            if given:  # an adapter may not have joined in
                scaler.unscale_(optimizer)
                gradients.append((optimizer, given))
        alone = len(gradients) == 1 and isinstance(gradients[0][0], RiemannianSGD)
        if alone or torch.stack([p.grad.isfinite().all() for _, given in gradients for p in given]).all():
            for optimizer, _ in gradients:
                scaler.step(optimizer)
        elif not scaler.is_enabled():
            self.skipped_steps += 1
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _log(self, losses: torch.Tensor) -> None:
        skipped = sum(int(s["skipped"].sum()) for o in self.optimizers for s in o.state.values() if "skipped" in s)
        skipped += self.skipped_steps
        others = {w: x.metrics() for w, x in zip(self.words, self.concepts)}
        self.log.write_metrics(self.step, dict(zip(self.words, losses.tolist())), others, skipped)

    def _validate(self) -> None:
        """Pictures on the way, if it is time for them."""
        c = self.config
        due = self.step % c.validation_steps == 0 or self.step == c.max_train_steps
        if c.validation_prompt and due and self.processes.is_main_process:
            prompts = [c.validation_prompt] if isinstance(c.validation_prompt, str) else c.validation_prompt
            prompts = [p.replace("{}", word) for p in prompts for word in (self.words if "{}" in p else self.words[:1])]
            with torch.no_grad():
                self.log.add_images(self.step, validation.generate(self.family, prompts, c.resolution, c.seed))

    def _save(self) -> None:
        if self.processes.is_main_process:
            folder = self.config.output_dir
            checkpoint.save(folder, self.step, self.concepts, self.optimizers, self.adapter, self.settings)
            checkpoint.prune(folder, self.step, self.config.checkpoints_total_limit)  # once the new one is whole


def _overflowed(scaler: torch.amp.GradScaler) -> bool:
    """Update the scale and say whether the step was left out; below a scale of 1 it is not for overflow that it was."""
    before = scaler.get_scale()
    scaler.update()
    return 1 < before > scaler.get_scale()
