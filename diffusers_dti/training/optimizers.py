"""The optimizers of a training method."""

from collections.abc import Sequence
from typing import Any

import torch

from .adapter import Adapter
from .config import ResolvedConfig
from .optim import RiemannianSGD, SphericalAdamW
from .trainable import TrainableConcept

MAGNITUDE_RATE = 0.005  # for a trained magnitude's logarithm, before `scale_lr`: the rate of textual inversion


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
    if config.optimizer == "adamw":
        return SphericalAdamW(groups, lr=rate, kappa=config.kappa)
    return RiemannianSGD(groups, lr=rate, kappa=config.kappa, beta=config.beta)
