"""The processes that `accelerate launch` started; one where it did not."""

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def processes() -> PartialState:
    """Their number, this one's index, and its device."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # which it does not look for by itself
