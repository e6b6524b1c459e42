"""Optimizers on the unit sphere with a von Mises-Fisher prior: Riemannian SGD (paper, section 4) and Riemannian Adam."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim.optimizer import ParamsT

from ..sphere import project, retract


class SphereOptimizer(torch.optim.Optimizer, ABC):
    """Share what optimizers of unit rows have in common: the prior, the rows that do not move, the way back to the sphere.

    A row does not move if its data gradient is not finite, or zero because its token was not in the batch: the prior alone
    would make a step of full length. Its state does not change either. `state[p]["skipped"]` counts the steps of each row that
    were skipped because the gradient was not finite.

    Args:
        params: tensors of unit rows (n, d), float32 or float64, or groups of them. A group may have a `prior`, (n, d): the unit
            rows that the von Mises-Fisher prior pulls to.
        defaults: the settings of groups that do not have their own, with at least `lr` and `kappa`.

    Raises:
        ValueError: if `lr` or `kappa` is negative, rows are in half precision, or `kappa` has no `prior`.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any]):
        if defaults["lr"] < 0 or defaults["kappa"] < 0:
            raise ValueError(f"lr and kappa must be at least 0, got lr={defaults['lr']}, kappa={defaults['kappa']}.")
        super().__init__(params, {**defaults, "prior": None})
        for group in self.param_groups:
            for p in group["params"]:
                if p.dtype not in (torch.float32, torch.float64):
                    raise ValueError(f"Directions must be float32, got {p.dtype}: in half precision their norms drift.")
                if group["kappa"] > 0 and (group["prior"] is None or group["prior"].shape != p.shape):
                    raise ValueError(f"kappa > 0 needs a `prior` of shape {tuple(p.shape)} in the parameter's group.")

    @abstractmethod
    def start_state(self, v: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state of unit rows `v` before their first step, besides "t" and "skipped"."""

    @abstractmethod
    def tangent_step(self, v: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """Return the step of unit rows along the sphere, and update the state of rows that move.

        Args:
            v: unit rows, (n, d).
            g: their Riemannian gradient with the prior's, (n, d).
            state: their state; "t" counts the steps of each row, this one included, and "moves" says which rows move.
            group: the settings.
        """

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
        state = self.state[v]
        if not state:
            column = v.new_zeros(*v.shape[:-1], 1)
            state.update(t=column.clone(), skipped=column.clone(), **self.start_state(v, group))
        finite = data.square().sum(-1, keepdim=True).isfinite()  # a moment of it would stay infinite for ever
        moves = finite & data.ne(0).any(-1, keepdim=True)
        state["skipped"] += ~finite

        g = torch.where(moves, data, 0)
        if group["kappa"] > 0:
            g = g - group["kappa"] * group["prior"].to(g)
        g = project(v, g)
        state["t"] += moves
        step = self.tangent_step(v, g, {**state, "moves": moves}, group)
        v.copy_(torch.where(moves, retract(v, step), v))


class RiemannianSGD(SphereOptimizer):
    """Move unit rows along the sphere by steps of one length: with `beta=0` every step turns a row by atan(lr).

    Args:
        params: tensors of unit rows, or groups of them, see `SphereOptimizer`.
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
        if not 0 <= beta < 1:
            raise ValueError(f"RiemannianSGD needs a beta in [0, 1), got {beta}.")
        super().__init__(params, {"lr": lr, "kappa": kappa, "beta": beta})

    def start_state(self, v: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"second_moment": v.new_zeros(*v.shape[:-1], 1)}

    def tangent_step(self, v: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        beta = group["beta"]
        second = beta * state["second_moment"] + (1 - beta) * g.square().sum(-1, keepdim=True)
        state["second_moment"].copy_(torch.where(state["moves"], second, state["second_moment"]))
        g = g / ((second / (1 - beta ** state["t"].clamp_min(1))).sqrt() + 1e-8)
        return -group["lr"] * g


class RiemannianAdam(SphereOptimizer):
    """Adam along the sphere (Bécigneul and Ganea, arXiv 1810.00760), with an angle as its rate.

    The momentum is carried along to each new tangent space. Adam's own rate is that of a coordinate: its first step would turn
    a row by about lr · √d radians, .96 for Gemma's 2,304 coordinates at a rate of .02. Here the first step turns a row by
    atan(lr) at every width. Later steps are shorter where gradients disagree.

    Args:
        params: tensors of unit rows, or groups of them, see `SphereOptimizer`.
        lr: the angle of a step in radians if all gradients agree.
        kappa: the concentration κ of the prior, see `RiemannianSGD`.
        betas: the decays of the running means of the gradient and of its square.
        per_coordinate: keep a second moment for each coordinate, which steps farther along coordinates of small gradients;
            else one for each row.

    Raises:
        ValueError: if `lr` or `kappa` is negative, a beta is outside [0, 1), rows are in half precision, or `kappa` has no
            `prior`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        kappa: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        per_coordinate: bool = True,
    ):
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"RiemannianAdam needs betas in [0, 1), got {betas}.")
        super().__init__(params, {"lr": lr, "kappa": kappa, "betas": betas, "per_coordinate": per_coordinate})

    def start_state(self, v: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        second = torch.zeros_like(v) if group["per_coordinate"] else v.new_zeros(*v.shape[:-1], 1)
        return {"first_moment": torch.zeros_like(v), "second_moment": second}

    def tangent_step(self, v: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        beta_1, beta_2 = group["betas"]
        squared = g.square() if group["per_coordinate"] else g.square().sum(-1, keepdim=True)
        # The row has moved since the last step: the momentum of then is projected to the tangent space of now.
        first = beta_1 * project(v, state["first_moment"]) + (1 - beta_1) * g
        second = beta_2 * state["second_moment"] + (1 - beta_2) * squared
        for name, moment in (("first_moment", first), ("second_moment", second)):
            state[name].copy_(torch.where(state["moves"], moment, state[name]))
        t = state["t"].clamp_min(1)
        u = first / (1 - beta_1**t) / ((second / (1 - beta_2**t)).sqrt() + 1e-8)
        if group["per_coordinate"]:
            u = project(v, u) / v.shape[-1] ** 0.5
        return -group["lr"] * u


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
