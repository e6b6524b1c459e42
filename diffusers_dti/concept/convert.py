"""A concept's files written anew for other programs, its rows unchanged to the bit."""

from pathlib import Path
from typing import Any

from . import formats, third_party
from .inversion import DirectionalInversion
from .source import read_stored


def programs() -> tuple[str, ...]:
    """Return the names of the programs that concepts can be written for."""
    return ("diffusers", *third_party.FORMATS)


def convert(
    source: str | Path, program: str, output: str | Path, placeholder_token: str | None = None, **read_kwargs: Any
) -> list[Path]:
    """Write a concept as `program` reads it, from files of any program.

    Args:
        source: Hub id, folder or file, as for `DirectionalInversion.from_pretrained`.
        program: "diffusers" (`learned_embeds*.safetensors`, ours as well), "comfyui" or "a1111" (one file), "onetrainer" (one).
        output: a folder, or for one file its name ending in `.safetensors`. In a folder it gets the placeholder's, which is the
            word in ComfyUI's and A1111's prompts.
        placeholder_token: replaces the source's, as there.
        read_kwargs: `weight_name`, `allow_pickle`, `revision`, ..., as there.

    Returns:
        The files that were written.

    Raises:
        ValueError: where the source is no concept, or the program has no name for one of its encoders.
    """
    if program not in programs():
        raise ValueError(f"Concepts can be written for {', '.join(programs())}, not for {program!r}.")
    read, output = read_stored(source, placeholder_token, **read_kwargs), Path(output)
    if read.placeholder is None:
        raise ValueError(f"{source} names no placeholder: give one with `placeholder_token` (`--placeholder`).")
    concept = DirectionalInversion.from_embeddings(read.placeholder, read.rows, read.metadata)  # or an error
    one_file = output.suffix == formats.SUFFIX
    if program == "diffusers":
        if one_file:
            raise ValueError(f"diffusers takes one file for each encoder: give a folder for them instead of {output}.")
        if read_kwargs.get("weight_name") and output.resolve() == Path(source).resolve():
            raise ValueError(f"{source} would lose its other files: give another folder.")
        scales = concept.scales | read.scales
        headers = {c: {**read.metadata, "component": c, "scale": m.tolist()} for c, m in scales.items()}
        formats.write(output, read.placeholder, read.rows, headers)
        return [output / formats.file_name(c) for c in read.rows]
    tensors = third_party.to_state_dict(read.rows, read.metadata, program)
    path = output if one_file else output / f"{third_party.file_stem(read.placeholder)}{formats.SUFFIX}"
    formats.write_files({path: (tensors, {**read.metadata, "placeholder_token": read.placeholder})})
    return [path]
