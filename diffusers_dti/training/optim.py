"""Riemannian SGD on the unit sphere with a von Mises-Fisher prior (paper, section 4; algorithm in method order)."""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim.optimizer import ParamsT

from ..sphere import project, retract


class RiemannianSGD(torch.optim.Optimizer):
    """Move unit rows along the sphere. With `beta=0` every step turns a row by atan(lr).

    A row does not move if its data gradient is not finite, or zero because its token was not in the batch: the prior alone
    would make a step of full length. Its running mean does not change either. `state[p]["skipped"]` counts the steps of each
    row that were skipped because the gradient was not finite.

    Args:
        params: tensors of unit rows (n, d), float32 or float64, or groups of them. A group may have a `prior`, (n, d): the unit
            rows that the von Mises-Fisher prior pulls to.
        lr: the step length η on the sphere.
        kappa: the concentration κ of the prior. It is weighed against the size of the data gradient, so gradients must be
            unscaled, and averaged over accumulated batches, before `step`.
        beta: the decay of the running mean of the squared gradient norm, one number for each row; 0 normalizes each step by
            itself.

    Raises:
        ValueError: if `lr` or `kappa` is negative, `beta` is outside [0, 1), rows are in half precision, or `kappa` has no
            `prior`.

    Example:

        ```py
        >>> import torch
        >>> from diffusers_dti import RiemannianSGD

        >>> rows = torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(2, 768), dim=-1))
        >>> optimizer = RiemannianSGD([{"params": [rows], "prior": rows.detach().clone()}], lr=0.01, kappa=1e-4)
        >>> rows[:, 0].sum().backward()
        >>> optimizer.step()
        >>> bool(torch.allclose(rows.norm(dim=-1), torch.ones(2)))
        True
        ```
    """

    def __init__(self, params: ParamsT, lr: float, kappa: float = 0.0, beta: float = 0.0):
        if lr < 0 or kappa < 0 or not 0 <= beta < 1:
            raise ValueError(f"lr and kappa must be at least 0 and beta in [0, 1), got {lr=}, {kappa=}, {beta=}.")
        super().__init__(params, {"lr": lr, "kappa": kappa, "beta": beta, "prior": None})
        for group in self.param_groups:
            for p in group["params"]:
                if p.dtype not in (torch.float32, torch.float64):
                    raise ValueError(f"Directions must be float32, got {p.dtype}: in half precision their norms drift.")
                if group["kappa"] > 0 and (group["prior"] is None or group["prior"].shape != p.shape):
                    raise ValueError(f"kappa > 0 needs a `prior` of shape {tuple(p.shape)} in the parameter's group.")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with every row. Nothing here reads a value back from the device.

        Args:
            closure: a function that computes the gradients again and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for v in group["params"]:
                if v.grad is not None:
                    self._step(v, v.grad, group)
        return loss

    def _step(self, v: Tensor, data: Tensor, group: dict[str, Any]) -> None:
        state, beta = self.state[v], group["beta"]
        if not state:
            column = v.new_zeros(*v.shape[:-1], 1)
            state.update(t=column.clone(), second_moment=column.clone(), skipped=column.clone())
        finite = data.isfinite().all(-1, keepdim=True)
        moves = finite & data.ne(0).any(-1, keepdim=True)
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
        lr: the learning rate of AdamW.
        kappa: the concentration of the prior, whose gradient is added to the data's.
    """

    def __init__(self, params: ParamsT, lr: float, kappa: float = 0.0):
        super().__init__(params, lr=lr, weight_decay=0.0)  # decay would only change the norm, which does not last
        self.kappa = kappa

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with every row."""
        rows = []
        for group in self.param_groups:
            for v in group["params"]:
                if v.grad is not None:
                    rows.append((v, group["prior"]))
        for v, prior in rows:  # a row without data does not move, as above
            v.grad.sub_(prior.to(v) * v.grad.ne(0).any(-1, keepdim=True), alpha=self.kappa)
        loss = super().step(closure)
        for v, _ in rows:
            v.copy_(normalize(v, dim=-1))
        return loss
