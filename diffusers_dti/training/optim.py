"""Riemannian SGD on the unit sphere with a von Mises-Fisher prior (paper, section 4; algorithm in method order)."""

from collections.abc import Callable, Iterable

import torch
from torch.nn.functional import normalize

from ..sphere import project, retract


class RiemannianSGD(torch.optim.Optimizer):
    """Moves unit rows along the sphere; at `beta=0` every step turns a row by atan(lr).

    A row whose data gradient is zero (its token was not in the batch) or not finite does not move, and its averages do
    not either: the prior alone would make it a step of full length. `state[p]["skipped"]` counts the not finite ones.

    Args:
        params: tensors of unit rows (n, d), float32 or float64, or groups of them. A group may carry `prior`: (n, d), the
            unit rows that the von Mises-Fisher prior pulls to.
        lr: step length η on the sphere.
        kappa: concentration κ of the prior. It weighs against the data gradient's size, so gradients must be unscaled
            and averaged over accumulated batches before `step`.
        beta: decay of the running mean of the squared gradient norm, one number a row; 0 normalises each step by itself.

    Raises:
        ValueError: for a negative `lr` or `kappa`, `beta` outside [0, 1), half precision, or `kappa` without `prior`.
    """

    def __init__(self, params: Iterable, lr: float, kappa: float = 0.0, beta: float = 0.0):
        if lr < 0 or kappa < 0 or not 0 <= beta < 1:
            raise ValueError(f"lr and kappa must be at least 0 and beta in [0, 1), got {lr=}, {kappa=}, {beta=}.")
        super().__init__(params, {"lr": lr, "kappa": kappa, "beta": beta, "prior": None})
        for group in self.param_groups:
            for p in group["params"]:
                if p.dtype not in (torch.float32, torch.float64):
                    raise ValueError(f"Directions must be float32, got {p.dtype}: in half precision their norms drift.")
                if group["kappa"] > 0 and (group["prior"] is None or group["prior"].shape != p.shape):
                    raise ValueError(f"kappa > 0 needs a `prior` of shape {tuple(p.shape)} in the parameter's group.")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step for every row; nothing here reads a value back from the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for v in group["params"]:
                if v.grad is not None:
                    self._step(v, group)
        return loss

    def _step(self, v: torch.Tensor, group: dict) -> None:
        state, beta, data = self.state[v], group["beta"], v.grad
        if not state:
            column = v.new_zeros(*v.shape[:-1], 1)
            state.update(t=column.clone(), second_moment=column.clone(), skipped=column.clone())
        finite = data.isfinite().all(-1, keepdim=True)
        moves = finite & (data != 0).any(-1, keepdim=True)
        state["skipped"] += ~finite

        g = torch.where(moves, data, 0)
        if group["kappa"] > 0:
            g = g - group["kappa"] * group["prior"].to(g)
        g = project(v, g)
        state["t"] += moves
        second = beta * state["second_moment"] + (1 - beta) * g.square().sum(-1, keepdim=True)
        state["second_moment"].copy_(torch.where(moves, second, state["second_moment"]))
        g = g / ((second / (1 - beta ** state["t"].clamp_min(1))).sqrt() + 1e-8)
        v.copy_(torch.where(moves, retract(v, -group["lr"] * g), v))


class SphericalAdamW(torch.optim.AdamW):
    """AdamW on unit rows, which are put back on the sphere after each step: the paper's ablation of Riemannian SGD.

    Args:
        params: groups of tensors of unit rows (n, d), each with its `prior`, (n, d).
        lr: AdamW's learning rate.
        kappa: concentration of the prior, whose gradient is added to the data's.
    """

    def __init__(self, params: Iterable, lr: float, kappa: float = 0.0):
        super().__init__(params, lr=lr, weight_decay=0.0)  # decay changes the norm alone, which does not stay
        self.kappa = kappa

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step for every row."""
        rows = [(v, group["prior"]) for group in self.param_groups for v in group["params"] if v.grad is not None]
        for v, prior in rows:  # not where there are no data, as above
            v.grad.sub_(prior.to(v) * (v.grad != 0).any(-1, keepdim=True), alpha=self.kappa)
        loss = super().step(closure)
        for v, _ in rows:
            v.copy_(normalize(v, dim=-1))
        return loss
