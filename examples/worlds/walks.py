"""The walks that walk.py compares: settings of the trainer, and variants that are not worth a setting unless they win."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffusers_dti.training import optimizers
from diffusers_dti.training.optim import RiemannianAdam
from diffusers_dti.training.samples import Sample, TrainingSamples


@dataclass(frozen=True)
class Walk:
    """A way to train.

    Args:
        settings: settings of the trainer.
        variant: a key of `VARIANTS`, or None.
        average: use the mean of the second half of the path on the sphere.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    variant: str | None = None
    average: bool = False


FLOOR, CEILING = "the word alone", "the description in words"  # nothing is trained


class FixedAngle(RiemannianAdam):
    """Riemannian Adam whose moments only choose the direction: all steps have one length."""

    def tangent_step(self, v: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        return group["lr"] * normalize(super().tangent_step(v, g, state, group), dim=-1)


def _antithetic(self: TrainingSamples, k: int, original: Any) -> Sample:
    """Give samples 2k and 2k + 1 everything in common but the sign of their noise."""
    sample: Sample = original(self, k // 2)
    return replace(sample, noise=-sample.noise) if k % 2 else sample


def _mapped(self: TrainingSamples, k: int, original: Any, quantile: Any) -> Sample:
    """Map a timestep, as a share of their number, to another one by a function."""
    sample: Sample = original(self, k)
    share = quantile((sample.timestep + 0.5) / self.num_timesteps)
    return replace(sample, timestep=min(int(self.num_timesteps * share), self.num_timesteps - 1))


def _middle(u: float) -> float:
    """Return the quantile of a logit-normal distribution, as Stable Diffusion 3 draws noise levels."""
    return float(torch.sigmoid(torch.special.ndtri(torch.tensor(u))))


def _low(u: float) -> float:
    """Return more of the low timesteps: less noise for Stable Diffusion, more noise for flow matching."""
    return u**1.5


def _high(u: float) -> float:
    """Return more of the high timesteps: the other way round."""
    return 1 - (1 - u) ** 1.5


def _samples(function: Any, **arguments: Any) -> tuple[type, str, Any]:
    """Return the replacement of how a training sample is made."""
    original = TrainingSamples._sample
    return TrainingSamples, "_sample", functools.partialmethod(function, original=original, **arguments)


VARIANTS: dict[str, tuple[Any, str, Any]] = {
    "one second moment": (optimizers, "RiemannianAdam", functools.partial(RiemannianAdam, per_coordinate=False)),
    "one angle": (optimizers, "RiemannianAdam", FixedAngle),
    "antithetic": _samples(_antithetic),
    "middle timesteps": _samples(_mapped, quantile=_middle),
    "low timesteps": _samples(_mapped, quantile=_low),
    "high timesteps": _samples(_mapped, quantile=_high),
}


@contextmanager
def variant(name: str | None) -> Iterator[None]:
    """Train by a variant within the block."""
    if name is None:
        yield
    else:
        with mock.patch.object(*VARIANTS[name]):
            yield


def _grid() -> dict[str, Walk]:
    walks = {FLOOR: Walk(), CEILING: Walk()}

    def add(optimizer: str, schedule: str, *rates: float, more: str = "", variant: str | None = None, **settings: Any) -> None:
        average = settings.pop("average", False)
        own = {"method": "ti"} if optimizer == "ti" else {"optimizer": optimizer}
        for rate in rates:
            name = " ".join(filter(None, (optimizer, schedule, f"{rate:g}", variant or more)))
            walks[name] = Walk({**own, "lr_scheduler": schedule, "learning_rate": rate, **settings}, variant, average)

    add("rsgd", "constant", 0.01, 0.02, 0.04)
    add("rsgd", "linear", 0.02, 0.03)
    add("rsgd", "cosine", 0.02, 0.03, 0.05)
    add("rsgd", "late", 0.02)
    add("rsgd", "constant", 0.01, 0.02, more="mean of the path", average=True)
    add("radam", "constant", 0.02, 0.05)
    add("radam", "cosine", 0.025, 0.05, 0.1)
    add("radam", "linear", 0.05)
    add("radam", "late", 0.05)
    add("radam", "cosine", 0.01, 0.025, 0.05, variant="one second moment")
    add("radam", "cosine", 0.01, 0.02, variant="one angle")
    add("adamw", "cosine", 0.005, 0.01)
    for optimizer, rate in (("rsgd", 0.02), ("radam", 0.05)):
        add(optimizer, "cosine", rate, more="stratified", timestep_sampling="stratified")
        for name in ("antithetic", "middle timesteps", "low timesteps", "high timesteps"):
            add(optimizer, "cosine", rate, variant=name)
    add("ti", "constant", 0.001, 0.005, 0.02)
    add("ti", "cosine", 0.005, 0.02, 0.04)
    return walks


WALKS = _grid()
