"""One step of several runs on one pipeline, for which the models run once.

The models are frozen, and no layer mixes the samples of a batch. So the rows of a run get the gradient that they have alone, to
the rounding of another batch size, and what is not finite stays where it is.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..families.base import Batch
from .step import Stepper


def take_together(steppers: Sequence[Stepper], steps: Sequence[int]) -> list[Tensor | None]:
    """Take a step with each of several runs, as `Stepper.take` does with one.

    Args:
        steppers: those of the runs, of one concept each, on one pipeline and without adapters. They have the same resolution,
            precision and `gradient_accumulation_steps`.
        steps: the number of each one's step.

    Returns:
        What `Stepper.take` returns, for each run.
    """
    if len(steppers) == 1:
        return [steppers[0].take(steps[0])]
    losses = _accumulate(steppers, steps)
    return [own if stepper.update(step) else None for stepper, step, own in zip(steppers, steps, losses)]


def _accumulate(steppers: Sequence[Stepper], steps: Sequence[int]) -> list[Tensor]:
    """Compute the gradients of a step of each run, and return the mean loss of each run's concept, (1,)."""
    family, device, count = steppers[0].family, steppers[0].device, steppers[0].config.gradient_accumulation_steps
    concepts = [concept for stepper in steppers for concept in stepper.concepts]
    totals = [torch.zeros(1, device=device) for _ in steppers]
    for micro in range(count):
        firsts = [stepper.first_sample(step, micro) for stepper, step in zip(steppers, steps)]
        sizes = [stepper.config.train_batch_size for stepper in steppers]
        own = zip(concepts, firsts, sizes)
        batch = join([concept.samples.batch(first, size, device) for concept, first, size in own])
        scaled = []
        with steppers[0].autocast():
            each = family.sample_losses(batch, family.encode_prompts(batch.prompts, batch.zero_pads)).split(sizes)
            for number, stepper in enumerate(steppers):
                loss = stepper.penalized(each[number].mean(), concepts[number], firsts[number]) / count
                totals[number] = totals[number] + loss.detach()
                scaled.append(stepper.scaler.scale(loss))
        torch.autograd.backward(scaled)
    return totals


def join(batches: Sequence[Batch]) -> Batch:
    """Return the samples of several batches of one resolution as one batch."""
    weights = None
    if any(batch.weights is not None for batch in batches):
        ones = [batch.latents.new_ones(len(batch.latents), 1, *batch.latents.shape[-2:]) for batch in batches]
        weights = torch.cat([one if batch.weights is None else batch.weights for one, batch in zip(ones, batches)])
    return replace(
        batches[0],
        latents=torch.cat([batch.latents for batch in batches]),
        noise=torch.cat([batch.noise for batch in batches]),
        weights=weights,
        timesteps=torch.cat([batch.timesteps for batch in batches]),
        prompts=[prompt for batch in batches for prompt in batch.prompts],
        original_sizes=[size for batch in batches for size in batch.original_sizes],
        crop_corners=[corner for batch in batches for corner in batch.crop_corners],
        zero_pads=[zeros for batch in batches for zeros in batch.zero_pads],
    )
