"""Everyone else's files: what their keys mean, for reading and for writing.

diffusers' scripts, A1111, ComfyUI, kohya, OneTrainer and InvokeAI keep plain rows, before any scaling by √d, under a key for
each encoder. To add a format, add its row to `FORMATS`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .registry import COMPONENTS, TEXT_ENCODERS, encoder_label, infer_encoders

Parts = dict[str | None, Tensor]  # rows, (n, d), by key of TEXT_ENCODERS; None is for whichever encoder they fit
Concepts = dict[str | None, Parts]  # by placeholder; None if the file names none
Parser = Callable[[Mapping[str, Any]], Concepts | None]  # None for files of another layout

BUNDLE_PREFIX = "bundle_emb."


@dataclass(frozen=True)
class Format:
    """How a program's files name the encoders.

    Args:
        title: the program's name.
        lone_key: the key of the rows for a model whose only encoder is a CLIP.
        encoder_keys: the program's key of an encoder, by key of TEXT_ENCODERS, where the two differ; None for encoders that it
            has no embeddings for.
        parse: reads files whose layout is more than a tensor for each key; returns None for files of another layout.
    """

    title: str
    lone_key: str
    encoder_keys: Mapping[str, str | None] = field(default_factory=dict)
    parse: Parser | None = None


def parse_a1111(tensors: Mapping[str, Any]) -> Concepts | None:
    """Read A1111's layout, which is that of the first textual inversion, too: its mapping is a module."""
    if "string_to_param" not in tensors:
        return None
    name, params = tensors.get("name"), tensors["string_to_param"]
    if not isinstance(params, Mapping | torch.nn.ParameterDict) or len(params) != 1:
        raise ValueError("its `string_to_param` should hold the rows of one word")
    return {name if isinstance(name, str) and name.strip() else None: _parts({"*": next(iter(params.values()))})}


def parse_onetrainer_bundle(tensors: Mapping[str, Any]) -> Concepts | None:
    """Read the concepts that OneTrainer bundles in a LoRA."""
    bundled: dict[str | None, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith(BUNDLE_PREFIX):
            name, _, part = key.removeprefix(BUNDLE_PREFIX).replace(".string_to_param.*", ".*").rpartition(".")
            bundled.setdefault(name, {})[part] = value
    return {name: _parts(parts) for name, parts in bundled.items()} or None


# Read by all; written by `dti convert --to NAME`.
FORMATS: dict[str, Format] = {
    "comfyui": Format("ComfyUI", "emb_params"),
    "a1111": Format("A1111", "emb_params", parse=parse_a1111),  # kohya and InvokeAI as well
    "onetrainer": Format(
        "OneTrainer", "emp_params", {"t5xxl": "t5", "gemma2_2b": "gemma", "umt5xxl": None}, parse_onetrainer_bundle
    ),
}
# Keys that are only read: diffusers' early SDXL scripts of pivotal tuning, and rows for no encoder in particular.
READ_ONLY_KEYS: dict[str, str | None] = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g", "*": None}


def known_keys() -> dict[str, str | None]:
    """Return the encoder that each key of a file stands for, None for whichever encoder it fits."""
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
        Rows, (n, d) float32, by key of TEXT_ENCODERS, by placeholder. Either key is None if the file does not name it.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(tensors, Tensor):
        return {None: _parts({"*": tensors})}
    if not isinstance(tensors, Mapping) or not all(isinstance(k, str) for k in tensors):
        raise ValueError(f"it holds a {type(tensors).__name__}, not tensors by name")
    for parse in [*(format.parse for format in FORMATS.values()), _parse_encoder_keys, _parse_vectors]:
        concepts = None if parse is None else parse(tensors)
        if concepts is not None:
            return concepts
    raise ValueError(
        f"it must hold one tensor, named after its placeholder, or one for each encoder ({', '.join(TEXT_ENCODERS)}); it holds "
        f"{sorted(tensors)[:9]}"
    )


def _parse_encoder_keys(tensors: Mapping[str, Any]) -> Concepts | None:
    """Read a tensor for each encoder, under the encoder's key."""
    if tensors and {k.removesuffix("_out") for k in tensors} <= known_keys().keys():
        return {None: _parts(tensors)}
    return None


def _parse_vectors(tensors: Mapping[str, Any]) -> Concepts | None:
    """Read diffusers' layout: one tensor named after the placeholder, or a tensor for each vector."""
    if not tensors:
        return None
    first = min(tensors, key=len)
    vectors = [first, *(f"{first}_{i}" for i in range(1, len(tensors)))]
    if set(vectors) != set(tensors):
        return None
    rows = [_rows(tensors[v]) for v in vectors]
    widths = sorted({r.shape[1] for r in rows})
    if len(widths) > 1:
        raise ValueError(f"its vectors have different widths, {widths}")
    return {first: _parts({"*": torch.cat(rows)})}


def _parts(tensors: Mapping[str, Any]) -> Parts:
    output = [k for k in tensors if k.endswith("_out")]
    if output:
        raise ValueError(
            f"{', '.join(output)} replace the encoder's output (OneTrainer's output embeddings), not words of its vocabulary"
        )
    keys = known_keys()
    unknown = sorted(tensors.keys() - keys.keys())
    if unknown:
        raise ValueError(f"there is no encoder called {', '.join(unknown)}; known are {', '.join(keys)}")
    parts = {keys[k]: _rows(v) for k, v in tensors.items()}
    if len(parts) < len(tensors) or (None in parts and len(parts) > 1):
        raise ValueError(f"it is not clear which encoders {', '.join(sorted(tensors))} are for")
    return parts


def _rows(value: Any) -> Tensor:
    rows = torch.atleast_2d(value.detach()) if isinstance(value, Tensor) else None
    if rows is None or rows.ndim != 2 or not rows.is_floating_point() or not rows.numel():
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"rows (n, d) expected, got {got}")
    return rows.float()


def assign_components(keys: Iterable[str | None], default: str) -> dict[str, str | None]:
    """Guess which of a pipeline's components the encoders of a file are; returns their keys by component.

    Loading looks again: T5-XXL alone may be Flux's second, SD3's third or PixArt's only encoder.
    """
    if set(keys) == {None}:
        return {default: None}
    found: dict[str, str | None] = {}
    for key in sorted((k for k in keys if k is not None), key=list(TEXT_ENCODERS).index):
        place = max(len(found), key == "clip_g")  # the second one, even if the first is missing
        while place < len(COMPONENTS) and COMPONENTS[place] in found:
            place += 1
        if place == len(COMPONENTS):
            raise ValueError(f"no pipeline has all of {', '.join(map(str, keys))}")
        found[COMPONENTS[place]] = key
    return found


# ------------------------------------------------------------------------------------------------------------- writing
def to_state_dict(rows: Mapping[str, Tensor], metadata: Mapping[str, Any], program: str) -> dict[str, Tensor]:
    """Name a concept's rows as a program's files do.

    Args:
        rows: (n, d) by component.
        metadata: the concept's.
        program: a key of FORMATS.

    Raises:
        ValueError: if the program has no name for an encoder, or one name for two.
    """
    format = FORMATS[program]
    encoders = infer_encoders({c: r.shape[1] for c, r in rows.items()}, metadata)
    if len(encoders) == 1 and set(encoders.values()) <= {"clip_l", "clip_h", None}:
        return {format.lone_key: next(iter(rows.values()))}
    names = {component: None if key is None else format.encoder_keys.get(key, key) for component, key in encoders.items()}
    missing = [str(encoder_label(encoders[c], 0)) for c, name in names.items() if name is None]
    if missing:
        raise ValueError(f"{format.title} has no embeddings for {', '.join(missing)}.")
    if len(set(names.values())) < len(names):
        raise ValueError(
            f"Two of its encoders would be called {' and '.join(map(str, names.values()))}: there is no such file."
        )
    return {str(names[component]): r for component, r in rows.items()}


def file_stem(placeholder: str) -> str:
    """Name a file after a placeholder, dog for <dog>: A1111 and ComfyUI take the file's name as the word."""
    return re.sub(r"[^\w.-]+", "_", placeholder).strip("_.") or "concept"
