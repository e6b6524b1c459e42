"""An option of `dti train` for every field of `DTIConfig`: its type from the annotation, its help from the field's metadata.

transformers' `HfArgumentParser` reads dataclasses too, but it would lose settings: it turns `str | float` into `float`,
passes all metadata on to argparse, and gives every option a value, so that settings the user chose cannot be told from
defaults.
"""

import argparse
from collections.abc import Sequence
from dataclasses import Field, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .. import DTIConfig, families
from ..concept.methods import METHODS
from . import arguments


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field; one that is not given leaves no attribute in the parsed arguments."""
    names = ", ".join(family.name for family in families.FAMILIES)
    group = parser.add_argument_group(
        "settings", f"The fields of DTIConfig, by default those of the model's family.\nFamilies: {names}."
    )
    types = get_type_hints(DTIConfig)
    for field in fields(DTIConfig):
        kind = parser_options(types[field.name], field.metadata.get("choices"))
        group.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=_help(field), **kind)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given, by field."""
    return {field.name: getattr(args, field.name) for field in fields(DTIConfig) if hasattr(args, field.name)}


def parser_options(annotation: Any, choices: Any = None) -> dict[str, Any]:
    """Return the arguments of `add_argument` that read values of a field's type.

    Args:
        annotation: the type of the field, resolved.
        choices: from the field's metadata: names, or a function that returns them; None for those of a `Literal`, if any.
    """
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if bool in members:
        return {"action": argparse.BooleanOptionalAction}
    if any(get_origin(member) is Sequence for member in members):
        return {"nargs": "+"}
    names = _choices(members) if choices is None else list(choices() if callable(choices) else choices)
    # The choices are shown, but not passed to argparse: `DTIConfig` checks them, with one message for Python and the command.
    if float in members and (names or str in members):
        return {"type": arguments.scale} | ({"metavar": "{" + ",".join([*names, "NUMBER"]) + "}"} if names else {})
    if names:
        return {"metavar": "{" + ",".join(names) + "}"}
    return {"type": next((kind for kind in (int, float) if kind in members), str)}


def _choices(members: Sequence[Any]) -> list[str]:
    """Return the values of the `Literal`s among the members of a union."""
    names: list[str] = []
    for member in members:
        if get_origin(member) is Literal:
            names += get_args(member)
    return names


def _help(field: Field[Any]) -> str:
    """Return what the field's metadata says, with the default, and with every method that is registered by now."""
    text = field.metadata.get("help", "")
    if field.name == "method":
        for name, method in METHODS.items():
            if method.summary not in text:
                text += f'; "{name}", {method.summary}'
    if field.name == "initializer_token":
        text += "; on the command line, a text with a slash is the path or Hub id of a concept"
    if "by default" not in text:
        text += f"; by default {_default(field)}"
    return text.replace("%", "%%")  # argparse formats help texts


def _default(field: Field[Any]) -> str:
    """Return the default of a field in words, with the families that it is for if they differ."""
    names: dict[str, list[str]] = {}  # of families, by value
    for family in families.FAMILIES:
        value = getattr(DTIConfig().resolve(family), field.name)
        if value is None or isinstance(value, bool):
            value = {True: "on", False: "off", None: "none"}[value]
        names.setdefault(str(value), []).append(family.name)
    if len(names) == 1:
        return next(iter(names))
    return ", ".join(f"{value} for {' and '.join(own)}" for value, own in names.items())
