"""The optimizers of a training method."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .adapter import Adapter
from .config import ResolvedConfig
from .defaults import Schedule
from .optim import RiemannianAdam, RiemannianSGD, SphericalAdamW
from .trainable import TrainableConcept

MAGNITUDE_RATE = 0.005  # for a trained magnitude's logarithm, before `scale_lr`: the rate of textual inversion

# The share of the rate at a share of the steps. Not diffusers' `get_scheduler`, whose state would have to be resumed.
SCHEDULES: dict[Schedule, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "late": lambda done: min(1.0, 3 * (1 - done)),
}


def set_rates(optimizers: Sequence[torch.optim.Optimizer], schedule: Schedule, done: float) -> None:
    """Set the rates of the next step.

    Args:
        optimizers: the optimizers.
        schedule: how their rates fall.
        done: the share of the steps that are done, in [0, 1).
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * SCHEDULES[schedule](done)


def make_optimizers(
    config: ResolvedConfig, concepts: Sequence[TrainableConcept], adapter: Adapter | None
) -> list[torch.optim.Optimizer]:
    """Make one optimizer for the tokens, and one each for trained magnitudes and for the adapter if there are any."""
    optimizers = [_token_optimizer(config, concepts)]
    if config.train_magnitude:
        factors = []
        for concept in concepts:
            for rows in concept.rows.values():
                if rows.log_factor is not None:
                    factors.append(rows.log_factor)
        optimizers.append(torch.optim.AdamW(factors, lr=MAGNITUDE_RATE * config.rate_factor, weight_decay=0.0))
    if adapter is not None:
        parameters = adapter.parameters.values()
        optimizers.append(torch.optim.AdamW(parameters, lr=config.adapter_learning_rate, weight_decay=1e-2))
    return optimizers


def _token_optimizer(config: ResolvedConfig, concepts: Sequence[TrainableConcept]) -> torch.optim.Optimizer:
    rate = config.effective_learning_rate
    groups: list[dict[str, Any]] = []
    for concept in concepts:
        for component, rows in concept.rows.items():
            prior = concept.initial.directions[component].to(rows.direction.device)
            groups.append({"params": [rows.direction], "prior": prior})
    if config.raw:  # as in diffusers' textual inversion scripts
        parameters = [group["params"][0] for group in groups]
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-2)
    if config.optimizer == "radam":
        return RiemannianAdam(groups, lr=rate, kappa=config.kappa)
    if config.optimizer == "adamw":
        return SphericalAdamW(groups, lr=rate, kappa=config.kappa)
    return RiemannianSGD(groups, lr=rate, kappa=config.kappa, beta=config.beta)
