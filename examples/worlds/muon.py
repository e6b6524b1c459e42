"""An optimizer that trains a transformer of the worlds in fewer steps than AdamW."""

import math
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalized(matrices: Tensor) -> Tensor:
    """Bring all singular values near one, by five Newton-Schulz steps, (n, rows, columns)."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """Muon for the linear layers of the blocks, whose steps are orthogonal matrices, and AdamW for everything else.

    torch's own Muon computes in bfloat16, which is slow on many CPUs. Both parts have one learning rate, because a step of
    Muon is scaled to the size of one of AdamW.

    Args:
        model: the transformer.
        learning_rate: the learning rate.
        weight_decay: the weight decay.
    """

    def __init__(self, model: nn.Module, learning_rate: float, weight_decay: float = 0.01) -> None:
        matrices, rest = [], []
        for name, p in model.named_parameters():
            inside = p.ndim == 2 and (".attention." in name or ".feed_forward." in name)
            (matrices if inside else rest).append(p)
        super().__init__([{"params": matrices}, {"params": rest}], lr=learning_rate, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        group = self.param_groups[0]
        for p in group["params"]:
            by_shape.setdefault(p.shape, []).append(p)
            self.state[p].setdefault("step", torch.zeros(()))  # AdamW expects one when a state is loaded
            self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
        for shape, parameters in by_shape.items():
            ahead = torch.stack([p.grad.lerp(self.state[p]["momentum"], 0.95) for p in parameters])
            for p, update in zip(parameters, orthogonalized(ahead)):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update, alpha=group["lr"] * 0.2 * math.sqrt(max(shape)))
                p.grad = None  # nothing is left for AdamW
        super().step()
