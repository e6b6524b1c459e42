"""What a setting is: a dataclass field that carries its help, its choices and its limit.

The check, the docstring and the command line read them from the field, so that each is written once.
"""

import difflib
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields, is_dataclass, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

Choices = tuple[str, ...] | Callable[[], tuple[str, ...]]


def setting(
    default: Any,
    help: str,
    *,
    choices: Choices | None = None,
    at_least: int | None = None,
    affects_result: bool = True,
) -> Any:
    """Declare a field of a configuration.

    Args:
        default: its default; with None as the default, None is always allowed.
        help: what the docstring and `dti train --help` say about it.
        choices: the values that it can have, or a function that returns them if they can grow.
        at_least: the smallest number that it can be.
        affects_result: whether another value trains another concept. Settings that do not are left out of the concept's
            metadata, and may differ when a run is resumed.
    """
    metadata: dict[str, Any] = {"help": help, "affects_result": affects_result}
    if choices is not None:
        metadata["choices"] = choices
    if at_least is not None:
        metadata["at_least"] = at_least
    return field(default=default, metadata=metadata)


def check_settings(config: Any) -> None:
    """Check each field of a configuration by itself.

    Raises:
        TypeError: if a value is of another type than the field.
        ValueError: if a value is not one of the field's choices, below its limit, infinite, or beyond 64 bits.
    """
    for f in fields(config):
        value = getattr(config, f.name)
        if value is None and f.default is None:
            continue
        choices = f.metadata.get("choices")
        if callable(choices):
            choices = choices()
        if choices is not None and value not in choices:
            allowed = choices if f.default is not None else (None, *choices)
            raise ValueError(f"{f.name} must be one of {', '.join(map(str, allowed))}, got {value!r:.80}.")
        limit = f.metadata.get("at_least")
        if value is not None or limit is None:
            _check_type(f.name, value, f.type)
        if limit is not None and (value is None or not value >= limit):  # not `value < limit`, which is False for NaN
            raise ValueError(f"{f.name} must be at least {limit}, got {value!s:.80}.")
        takes_floats = _matches(0.5, f.type)
        if isinstance(value, int) and not takes_floats and not -(2**63) <= value < 2**63:
            raise ValueError(f"{f.name} must be a whole number of 64 bits, from -2**63 to 2**63 - 1, got {value!s:.80}.")
        if limit is not None and value > sys.float_info.max:
            raise ValueError(f"{f.name} must be finite, got {value!s:.80}.")


# Not `huggingface_hub.dataclasses.strict`: it checks in `__setattr__`, which the `__init__` of a frozen dataclass bypasses. It
# also refuses a whole number for a float, and hub 0.34 knows neither `int | None` nor `Sequence`, and takes True for an int.
def _check_type(name: str, value: Any, annotation: Any) -> None:
    """Check that a value has the type of its field.

    Raises:
        TypeError: if it has another one.
    """
    if not _matches(value, annotation):
        wanted = annotation.__name__ if isinstance(annotation, type) else re.sub(r"(\w+\.)+", "", str(annotation))
        raise TypeError(f"{name} must be {wanted}, got {value!r:.80}.")


def _matches(value: Any, annotation: Any) -> bool:
    """Return whether a value has the type that an annotation of a setting describes."""
    kind, members = get_origin(annotation), get_args(annotation)
    if kind in (Union, UnionType):
        return any(_matches(value, member) for member in members)
    if kind is Literal:
        return value in members
    if kind is Mapping:
        return isinstance(value, Mapping) and all(_matches(k, members[0]) and _matches(v, members[1]) for k, v in value.items())
    if kind is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_matches(v, members[0]) for v in value)
    if isinstance(value, bool):  # is an int in Python
        return annotation is bool
    return isinstance(value, (int, float) if annotation is float else annotation)


def override(config: Any, overrides: Mapping[str, Any]) -> Any:
    """Return a configuration with other values of single settings.

    Raises:
        TypeError: if a setting does not exist, with the nearest name in the message, or `config` is not a configuration.
    """
    if not is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"`config` must be a `DTIConfig`, got {config!r:.80}: give single settings by their names.")
    names = [f.name for f in fields(config)]
    for name in overrides.keys() - set(names):
        near = sorted((n for n in names if name in n), key=len) or difflib.get_close_matches(name, names, 1)
        raise TypeError(f"There is no setting {name}." + (f" Did you mean {near[0]}?" if near else ""))
    return replace(config, **overrides)


def document_settings(config_class: type) -> None:
    """Write the help of all fields into the class docstring, below its line "Args:"."""
    args = []
    for f in fields(config_class):
        text = f"{f.name}: {f.metadata['help']}."
        args.append(textwrap.fill(text, 116, initial_indent=" " * 4, subsequent_indent=" " * 8))

    def with_args(line: re.Match[str]) -> str:
        return textwrap.indent("\n".join(["Args:", *args]), line["indent"])

    config_class.__doc__ = re.sub(r"^(?P<indent> *)Args:$", with_args, config_class.__doc__ or "", count=1, flags=re.M)
