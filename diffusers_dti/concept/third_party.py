"""Read and write other programs' files: what their keys mean.

diffusers' scripts, A1111, ComfyUI, kohya, OneTrainer and InvokeAI store plain rows, before any scaling by √d, under one key for
each encoder. To add a format, add its row to `FORMATS`.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .registry import COMPONENTS, MODEL_FAMILIES, TEXT_ENCODERS, encoder_label, infer_encoders

Parts = dict[str | None, Tensor]  # rows, (n, d), by key of TEXT_ENCODERS; None for any encoder that they fit
Concepts = dict[str | None, Parts]  # by placeholder; None if the file names none
Parser = Callable[[Mapping[str, Any]], Concepts | None]  # returns None for files with another layout

BUNDLE_PREFIX = "bundle_emb."


@dataclass(frozen=True)
class Format:
    """How a program's files name the encoders.

    Args:
        title: the program's name.
        lone_key: the key of the rows for a model whose only encoder is a CLIP.
        encoder_keys: the program's keys, by key of TEXT_ENCODERS, if they differ; None for encoders that the program has no
            embeddings for.
        parse: reads files whose layout is more than one tensor for each key; returns None for files with another layout.
        unread_families: families that the program has no embeddings for, although it has them for the encoder in others.
        otherwise: what the program does with a concept that it has no embeddings for, if it does not say so itself.
    """

    title: str
    lone_key: str
    encoder_keys: Mapping[str, str | None] = field(default_factory=dict)
    parse: Parser | None = None
    unread_families: Set[str] = frozenset()
    otherwise: str = ""


def parse_a1111(tensors: Mapping[str, Any]) -> Concepts | None:
    """Read A1111's layout, which the original textual inversion code used first."""
    if "string_to_param" not in tensors:
        return None
    params = tensors["string_to_param"]
    # The original code saves a module, which is not a Mapping.
    if not isinstance(params, Mapping | torch.nn.ParameterDict) or len(params) != 1:
        raise ValueError("its `string_to_param` should hold the rows of one word")
    (rows,) = params.values()
    name = tensors.get("name")
    placeholder = name if isinstance(name, str) and name.strip() else None
    return {placeholder: _parts({"*": rows})}


def parse_onetrainer_bundle(tensors: Mapping[str, Any]) -> Concepts | None:
    """Read the concepts that OneTrainer bundles in a LoRA, under keys such as bundle_emb.<dog>.clip_l."""
    bundled: dict[str | None, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith(BUNDLE_PREFIX):
            name, _, part = key.removeprefix(BUNDLE_PREFIX).replace(".string_to_param.*", ".*").rpartition(".")
            bundled.setdefault(name, {})[part] = value
    return {name: _parts(parts) for name, parts in bundled.items()} or None


ONETRAINER_KEYS = {"t5xxl": "t5", "gemma2_2b": "gemma", "llama": "llama"}
NOT_CLIP: dict[str, str | None] = {key: None for key, kind in TEXT_ENCODERS.items() if kind.model_type != "clip_text_model"}
# ComfyUI has keys for these, but its tokenizers never open the folder of embeddings. Of the two of Qwen3, FLUX.2's does.
NO_FOLDER = dict.fromkeys(("gemma2_2b", "umt5xxl", "gemma3_12b", "qwen25_7b"))
AS_WORDS = "It would read `embedding:NAME` as plain words, without a warning."
# All of them are read; `dti convert --to NAME` writes them.
FORMATS: dict[str, Format] = {
    "comfyui": Format("ComfyUI", "emb_params", NO_FOLDER, None, {"Z-Image"}, AS_WORDS),
    # Its embeddings are CLIP's. The layout is that of kohya and InvokeAI as well.
    "a1111": Format("A1111", "emb_params", NOT_CLIP, parse_a1111),
    "onetrainer": Format(
        "OneTrainer", "emp_params", NOT_CLIP | ONETRAINER_KEYS, parse_onetrainer_bundle, unread_families={"Lumina 2"}
    ),
}
# Keys that are only read: those of diffusers' early scripts for pivotal tuning of SDXL, and "*" for rows that name no encoder.
READ_ONLY_KEYS: dict[str, str | None] = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g", "*": None}


def known_keys() -> dict[str, str | None]:
    """Return the encoder that each key of a file stands for; None for any encoder that the rows fit."""
    keys: dict[str, str | None] = {key: key for key in TEXT_ENCODERS}
    for format in FORMATS.values():
        keys[format.lone_key] = None
        keys |= {name: key for key, name in format.encoder_keys.items() if name is not None}
    return keys | READ_ONLY_KEYS


# ------------------------------------------------------------------------------------------------------------- reading
def parse_state_dict(tensors: Any) -> Concepts:
    """Read the concepts in what another program has saved.

    Args:
        tensors: what its file holds: a tensor, or a mapping from names to tensors.

    Returns:
        By placeholder, then by key of TEXT_ENCODERS: rows, (n, d) float32. Either key is None if the file does not name it.

    Raises:
        ValueError: if the tensors are not a textual inversion.
    """
    if isinstance(tensors, Tensor):
        return {None: _parts({"*": tensors})}
    if not isinstance(tensors, Mapping) or not all(isinstance(k, str) for k in tensors):
        raise ValueError(f"it holds a {type(tensors).__name__}, not tensors by name")
    parsers: list[Parser] = [format.parse for format in FORMATS.values() if format.parse is not None]
    for parse in [*parsers, _parse_encoder_keys, _parse_vectors]:
        concepts = parse(tensors)
        if concepts is not None:
            return concepts
    raise ValueError(
        f"it must hold one tensor, named after its placeholder, or one for each encoder ({', '.join(TEXT_ENCODERS)}); it holds "
        f"{sorted(tensors)[:9]!s:.200}"
    )


def _parse_encoder_keys(tensors: Mapping[str, Any]) -> Concepts | None:
    """Read files with one tensor for each encoder, under the encoder's key."""
    if tensors and {k.removesuffix("_out") for k in tensors} <= known_keys().keys():
        return {None: _parts(tensors)}
    return None


def _parse_vectors(tensors: Mapping[str, Any]) -> Concepts | None:
    """Read diffusers' layout: one tensor named after the placeholder, or one for each vector (<dog>, <dog>_1, ...)."""
    if not tensors:
        return None
    first = min(tensors, key=len)
    vectors = [first, *(f"{first}_{i}" for i in range(1, len(tensors)))]
    if set(vectors) != set(tensors):
        return None
    rows = [as_rows(tensors[v]) for v in vectors]
    widths = sorted({r.shape[1] for r in rows})
    if len(widths) > 1:
        raise ValueError(f"its vectors have different widths, {widths}")
    return {first: _parts({"*": torch.cat(rows)})}


def _parts(tensors: Mapping[str, Any]) -> Parts:
    """Return a concept's rows by encoder, from tensors by a file's keys."""
    output = [k for k in tensors if k.endswith("_out")]
    if output:
        raise ValueError(
            f"{', '.join(output):.200} replace the encoder's output (OneTrainer's output embeddings), not words of its "
            "vocabulary"
        )
    keys = known_keys()
    unknown = sorted(tensors.keys() - keys.keys())
    if unknown:
        raise ValueError(f"there is no encoder called {', '.join(unknown):.200}; the known ones are {', '.join(keys)}")
    parts = {keys[k]: as_rows(v) for k, v in tensors.items()}
    several_for_one, one_for_any = len(parts) < len(tensors), None in parts
    if several_for_one or (one_for_any and len(parts) > 1):
        raise ValueError(f"it is not clear which encoders {', '.join(sorted(tensors))} are for")
    return parts


def as_rows(value: Any) -> Tensor:
    """Return a tensor of a file or a state dict as rows, (n, d) float32.

    Raises:
        ValueError: if it is not a tensor of that shape, or holds integers or complex numbers.
    """
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    rows = torch.atleast_2d(value.detach()) if dense else None
    if rows is None or rows.ndim != 2 or not rows.is_floating_point() or not rows.numel():
        got = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"floating-point rows (n, d) expected, got {got}")
    return rows.float()


def assign_components(keys: Iterable[str | None], default: str) -> dict[str, str | None]:
    """Guess which component of a pipeline each encoder of a file is.

    This is only a guess, and loading matches encoders to the pipeline at hand: T5-XXL alone may be Flux's second, SD3's third
    or PixArt's only encoder.

    Args:
        keys: keys of TEXT_ENCODERS, or None alone for rows that name no encoder.
        default: the component of rows that name no encoder.

    Returns:
        The encoder keys by component.

    Raises:
        ValueError: if there are more encoders than components.
    """
    if set(keys) == {None}:
        return {default: None}
    for family in MODEL_FAMILIES.values():
        if set(family.encoders.values()) == set(keys):
            return dict(family.encoders)
    found: dict[str, str | None] = {}
    for key in sorted((k for k in keys if k is not None), key=list(TEXT_ENCODERS).index):
        index = len(found)
        if key == "clip_g":
            index = max(index, 1)  # bigG is the second encoder, even in a file without the first
        while index < len(COMPONENTS) and COMPONENTS[index] in found:
            index += 1
        if index == len(COMPONENTS):
            raise ValueError(f"no pipeline has all of {', '.join(map(str, keys))}")
        found[COMPONENTS[index]] = key
    return found


# ------------------------------------------------------------------------------------------------------------- writing
def to_state_dict(rows: Mapping[str, Tensor], metadata: Mapping[str, Any], program: str) -> dict[str, Tensor]:
    """Name a concept's rows as a program's files do.

    Args:
        rows: (n, d) by component.
        metadata: the concept's.
        program: a key of FORMATS.

    Returns:
        The rows by the program's keys.

    Raises:
        ValueError: if the program has no embeddings for the family or an encoder, or the same key for two.
    """
    format = FORMATS[program]
    encoders = infer_encoders({c: r.shape[1] for c, r in rows.items()}, metadata)
    if len(encoders) == 1 and set(encoders.values()) <= {"clip_l", "clip_h", None}:
        (only,) = rows.values()
        names_of_width = [format.encoder_keys.get(k, k) for k, kind in TEXT_ENCODERS.items() if kind.width == only.shape[1]]
        if any(names_of_width) or not names_of_width:  # one of the encoders that it may be for
            return {format.lone_key: only}
    names: dict[str, str] = {}
    missing = [metadata["family"]] if metadata.get("family") in format.unread_families else []
    for component, key in encoders.items():
        name = format.encoder_keys.get(key, key) if key in TEXT_ENCODERS else None
        if name is None:
            width = rows[component].shape[1]
            label = encoder_label(key, width) if key is None or key in TEXT_ENCODERS else None
            missing.append(label or f"{component} ({width} wide)")
        else:
            names[component] = name
    if missing:
        raise ValueError(f"{format.title} has no embeddings for {', '.join(missing)}. {format.otherwise}".rstrip())
    if len(set(names.values())) < len(names):
        raise ValueError(f"Two of its encoders would be called {' and '.join(names.values())}, which one file cannot hold.")
    return {names[component]: own for component, own in rows.items()}
