"""The held-out loss: the loss on a few fixed draws, which tells whether a run still gets better."""

import torch
from torch import Tensor

from ..families.base import Family
from .samples import TrainingSamples

HELDOUT_SAMPLES = 16


@torch.no_grad()
def heldout_loss(family: Family, samples: TrainingSamples, batch_size: int) -> Tensor:
    """Return the loss of the rows that are swapped in, on draws that are always the same: a scalar.

    The loss of a training step depends far more on its noise and noise levels than on the rows. Here these are fixed, so that
    two steps, or two runs on the same photos, can be compared.

    Args:
        family: the family, bound to the pipeline.
        samples: the samples of the concept.
        batch_size: the number of samples in a forward pass.
    """
    total = torch.zeros((), device=family.device)
    for batch in samples.heldout_batches(HELDOUT_SAMPLES, batch_size, family.device):
        total += len(batch.prompts) * family.loss(batch, family.encode_prompts(batch.prompts, batch.zero_pads))
    return total / HELDOUT_SAMPLES
