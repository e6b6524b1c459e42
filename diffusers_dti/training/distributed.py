"""The processes that `accelerate launch` started, or a single one without it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from accelerate.utils import reduce as accelerate_reduce
from torch import Tensor

PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Alone:
    """A process that trains by itself, as if there were no other."""

    device: torch.device
    num_processes = 1
    process_index = 0
    is_main_process = True

    def wait_for_everyone(self) -> None:
        """Do not wait: there is nobody else."""


_alone: ContextVar[Alone | None] = ContextVar("alone", default=None)


def processes() -> PartialState | Alone:
    """Return the number of processes, and this one's index and device."""
    # accelerate's launcher sets the variable, and only `Accelerator` reads it.
    return _alone.get() or PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


@contextmanager
def alone() -> Iterator[None]:
    """Let each process train by itself within the block: `processes()` is then this one only."""
    token = _alone.set(Alone(processes().device))
    try:
        yield
    finally:
        _alone.reset(token)


def average(tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over the processes."""
    # Not accelerate's `reduce` alone, which does not know of `alone`.
    return accelerate_reduce(tensor, "mean") if processes().num_processes > 1 else tensor


def broadcast(values: list[Any]) -> None:
    """Replace the values in a list by those of the first process."""
    if processes().num_processes > 1:
        broadcast_object_list(values)


class Reunion:
    """A point that processes reach at times of their own, hours apart, and where they exchange what they have.

    It is made by all processes at once. Their usual connection ends a run in which one waits for more than some minutes.
    """

    def __init__(self) -> None:
        self.count = processes().num_processes
        self.group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE) if self.count > 1 else None

    def gather(self, value: Any) -> list[Any]:
        """Wait for all processes, and return their values in the order of the processes."""
        values = [value] * self.count
        if self.group is not None:
            torch.distributed.all_gather_object(values, value, group=self.group)
        return values
