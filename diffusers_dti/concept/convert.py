"""Rewrite a concept's files for other programs, its rows unchanged bit for bit."""

import re
from pathlib import Path
from typing import Any

from . import formats, third_party
from .concept import Concept
from .registry import COMPONENTS
from .source import describe_source, errors_named, read_stored


def programs() -> tuple[str, ...]:
    """Return the names of the programs that concepts can be written for."""
    return ("diffusers", *third_party.FORMATS)


def convert(
    source: str | Path,
    program: str,
    output: str | Path,
    placeholder_token: str | None = None,
    overwrite: bool = False,
    **read_kwargs: Any,
) -> list[Path]:
    """Write a concept in the format of `program`, from files of any program.

    Args:
        source: a Hub id, folder or file, as for `DirectionalInversion.from_pretrained`.
        program: "diffusers" (our own format, `learned_embeds*.safetensors`), or a key of `third_party.FORMATS`, each of which
            takes a single file: "comfyui", "a1111" or "onetrainer".
        output: a folder, or a name ending in `.safetensors` for a single file. In a folder the file is named after the
            placeholder, because ComfyUI and A1111 take a file's name as the word in prompts.
        placeholder_token: replaces the placeholder in the source.
        overwrite: replace files of others, too. Those that this package wrote for the same placeholder always are.
        read_kwargs: further arguments of `from_pretrained`: `weight_name`, `allow_pickle`, `revision`, and so on.

    Returns:
        The files that were written.

    Raises:
        OSError: if there are no files at the source, or another concept's file would be overwritten.
        ValueError: if the source is not a concept, or the program has no name for one of its encoders.
    """
    if program not in programs():
        raise ValueError(f"Concepts can be written for {', '.join(programs())}, not for {program!r}.")
    stored, output = read_stored(source, placeholder_token, **read_kwargs), Path(output)
    if stored.placeholder is None:
        raise ValueError(f"{describe_source(source)} names no placeholder: pass `placeholder_token` (`--placeholder`).")
    with errors_named(source):
        concept = Concept.from_embeddings(stored.placeholder, stored.rows, stored.metadata)  # checks the rows
    one_file = output.suffix == formats.SUFFIX
    if program == "diffusers":
        if one_file:
            raise ValueError(f"diffusers takes one file for each encoder: give a folder for them instead of {output}.")
        if read_kwargs.get("weight_name") and output.resolve() == Path(source).resolve():
            raise ValueError(f"{source} would lose its other files: give another folder.")
        _check_files(stored.placeholder, [output / formats.file_name(c) for c in COMPONENTS], overwrite)
        formats.write(output, stored.placeholder, stored.rows, concept.scales | stored.scales, stored.metadata)
        return [output / formats.file_name(component) for component in stored.rows]
    tensors = third_party.to_state_dict(stored.rows, stored.metadata, program)
    path = output if one_file else output / f"{_file_stem(stored.placeholder)}{formats.SUFFIX}"
    _check_files(stored.placeholder, [path], overwrite)
    formats.write_files({path: (tensors, {**stored.metadata, "placeholder_token": stored.placeholder})})
    return [path]


def _file_stem(placeholder: str) -> str:
    """Name a file after a placeholder, such as dog for <dog>, because A1111 and ComfyUI take the file's name as the word."""
    return re.sub(r"[^\w.-]+", "_", placeholder).strip("_.") or "concept"


def _check_files(placeholder: str, paths: list[Path], overwrite: bool) -> None:
    """Check that files do not exist, or are of the same concept.

    Raises:
        OSError: if one is not.
    """
    for path in paths:
        if path.exists() and not overwrite and formats.placeholder_of(path) != placeholder:
            raise OSError(
                f"{path} exists and is not {placeholder}'s: choose another output, or pass `overwrite` (`--overwrite`)."
            )
