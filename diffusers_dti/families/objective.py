"""The error that every family's training minimises."""

from torch import Tensor

from ..training.samples import Batch


def squared_error(prediction: Tensor, target: Tensor, batch: Batch) -> Tensor:
    """Mean squared error, weighted where the photos have masks; a scalar in float32. Latents may have frames."""
    squared = (prediction.float() - target.float()).square()
    if batch.weights is None:
        return squared.mean()
    n, height, width = len(squared), *squared.shape[-2:]
    return (batch.weights.view(n, *[1] * (squared.ndim - 3), height, width) * squared).mean()
