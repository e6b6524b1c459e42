"""The processes that `accelerate launch` started, or a single one without it."""

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def processes() -> PartialState:
    """Return the number of processes, and this one's index and device."""
    # accelerate's launcher sets the variable, and only `Accelerator` reads it.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
