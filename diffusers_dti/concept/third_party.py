"""Everyone else's files: what their keys mean, for reading and for writing.

diffusers' scripts, A1111, ComfyUI, kohya, OneTrainer and InvokeAI keep plain rows, before any scaling by √d, under an encoder's
key.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

COMPONENTS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class Encoder(NamedTuple):
    model_type: str  # of its configuration in transformers
    width: int
    name: str  # with the models that have it


# in the order in which pipelines have them
ENCODERS = {
    "clip_l": Encoder("clip_text_model", 768, "CLIP-L (Stable Diffusion 1, SDXL, SD3, Flux)"),
    "clip_h": Encoder("clip_text_model", 1024, "CLIP-H (Stable Diffusion 2)"),
    "clip_g": Encoder("clip_text_model", 1280, "CLIP bigG (SDXL, SD3)"),
    "t5xxl": Encoder("t5", 4096, "T5-XXL (Flux, SD3, PixArt)"),
    "umt5xxl": Encoder("umt5", 4096, "UMT5-XXL (Wan)"),
    "gemma2_2b": Encoder("gemma2", 2304, "Gemma 2 2B (SANA)"),
}
# what files call them; None is for whichever encoder it fits
KEYS: dict[str, str | None] = {k: k for k in ENCODERS}
KEYS |= {"t5": "t5xxl", "gemma": "gemma2_2b"}  # OneTrainer; t5 also diffusers' Flux script
KEYS |= {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}  # early SDXL scripts of pivotal tuning
KEYS |= {"emb_params": None, "emp_params": None, "*": None}  # A1111, kohya, InvokeAI; OneTrainer
BUNDLED = "bundle_emb."
FAMILY_ENCODERS = {"SANA": "gemma2_2b", "Wan": "umt5xxl"}  # of the families whose encoder the width alone does not tell

Parts = dict[str | None, Tensor]  # rows, (n, d), by key of ENCODERS


def parse(tensors: Any) -> dict[str | None, Parts]:
    """The concepts in what another program has saved, by placeholder, None where it names none.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(tensors, Tensor):
        return {None: _parts({"*": tensors})}
    if not isinstance(tensors, Mapping) or not all(isinstance(k, str) for k in tensors):
        raise ValueError(f"it holds a {type(tensors).__name__}, and no tensors by name")
    if "string_to_param" in tensors:  # A1111, and the first textual inversion of all, whose mapping is a module
        name, params = tensors.get("name"), tensors["string_to_param"]
        if not isinstance(params, Mapping | torch.nn.ParameterDict) or len(params) != 1:
            raise ValueError("its `string_to_param` should hold the rows of one word")
        return {name if isinstance(name, str) and name.strip() else None: _parts({"*": next(iter(params.values()))})}
    bundled: dict[str | None, dict[str, Any]] = {}
    for key in [k for k in tensors if k.startswith(BUNDLED)]:  # OneTrainer, in a LoRA
        name, _, part = key.removeprefix(BUNDLED).replace(".string_to_param.*", ".*").rpartition(".")
        bundled.setdefault(name, {})[part] = tensors[key]
    if bundled:
        return {name: _parts(parts) for name, parts in bundled.items()}
    if tensors and {k.removesuffix("_out") for k in tensors} <= KEYS.keys():
        return {None: _parts(tensors)}
    if tensors:
        first = min(tensors, key=len)
        vectors = [first, *(f"{first}_{i}" for i in range(1, len(tensors)))]
        if set(vectors) == set(tensors):  # diffusers: one tensor, or a vector each
            rows = [_rows(tensors[v]) for v in vectors]
            if len({r.shape[1] for r in rows}) > 1:
                raise ValueError(f"its vectors are of different widths, {sorted({r.shape[1] for r in rows})}")
            return {first: _parts({"*": torch.cat(rows)})}
    raise ValueError(
        f"it must hold one tensor, named after its placeholder, or one for each encoder ({', '.join(ENCODERS)}); it holds "
        f"{sorted(tensors)[:9]}"
    )


def _parts(tensors: Mapping[str, Any]) -> Parts:
    output = [k for k in tensors if k.endswith("_out")]
    if output:
        raise ValueError(
            f"{', '.join(output)} stand in for what the encoder gives (OneTrainer's output embeddings), not for words"
        )
    if unknown := tensors.keys() - KEYS.keys():
        raise ValueError(f"there is no encoder of the name {', '.join(sorted(unknown))}; known are {', '.join(KEYS)}")
    parts = {KEYS[k]: _rows(v) for k, v in tensors.items()}
    if len(parts) < len(tensors) or (None in parts and len(parts) > 1):
        raise ValueError(f"it is not clear which encoders {', '.join(sorted(tensors))} are for")
    return parts


def _rows(value: Any) -> Tensor:
    rows = torch.atleast_2d(value.detach()) if isinstance(value, Tensor) else None
    if rows is None or rows.ndim != 2 or not rows.is_floating_point() or not rows.numel():
        raise ValueError(
            f"rows (n, d) expected, got {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
        )
    return rows.float()


def components(keys: Iterable[str | None], default: str) -> dict[str, str | None]:
    """Which of a pipeline's components the encoders of a file most likely are, their keys by component.

    Loading looks again: T5-XXL alone may be Flux's second, SD3's third or PixArt's only encoder.
    """
    if set(keys) == {None}:
        return {default: None}
    found: dict[str, str | None] = {}
    for key in sorted(keys, key=list(ENCODERS).index):
        place = max(len(found), key == "clip_g")  # the second even where the first is missing
        while (place < len(COMPONENTS)) and COMPONENTS[place] in found:
            place += 1
        if place == len(COMPONENTS):
            raise ValueError(f"no pipeline has all of {', '.join(map(str, keys))}")
        found[COMPONENTS[place]] = key
    return found


def known(components: Iterable[str], metadata: Mapping[str, Any]) -> dict[str, str | None]:
    """The encoder of each component as the concept's file says, or as its family has it; empty where neither does."""
    if metadata.get("encoders"):
        return dict(metadata["encoders"])
    key = FAMILY_ENCODERS.get(str(metadata.get("family")))
    return dict.fromkeys(components, key) if key else {}


def encoder_name(key: str | None, width: int) -> str | None:
    """The encoder that rows are for, by their width and their key; None where neither is known."""
    said = ENCODERS.get(key or "")
    named = [e.name for e in ENCODERS.values() if e.width == width and (said is None or said.model_type == e.model_type)]
    return " or ".join(named) or (said.name if said else None)


def fits(key: str | None, width: int, encoder: Any) -> bool:
    """Whether rows of a key, None for any, are for an encoder."""
    said = ENCODERS.get(key or "")
    same = said is None or said.model_type == encoder.config.get_text_config().model_type
    return same and width == encoder.get_input_embeddings().weight.shape[1]


# ------------------------------------------------------------------------------------------------------------- writing
def keys(widths: Mapping[str, int], metadata: Mapping[str, Any]) -> dict[str, str | None]:
    """The encoder of each component of a concept: as its file said, by its family or by its width; None where none tells."""
    said = known(widths, metadata)
    several, found = set(widths) != {COMPONENTS[0]}, {}
    for component, width in widths.items():
        wide = [k for k, e in ENCODERS.items() if e.width == width]  # both T5 and UMT5 for 4096
        by_place = "t5xxl" if wide else ("clip_l", "clip_g", "t5xxl")[COMPONENTS.index(component)]
        by_width = wide[0] if len(wide) == 1 else by_place if several else None
        found[component] = said.get(component) or by_width
    return found


def tensors(rows: Mapping[str, Tensor], metadata: Mapping[str, Any], program: str) -> dict[str, Tensor]:
    """A concept's (n, d) by component, under the names that "comfyui" (A1111 as well) or "onetrainer" reads.

    Raises:
        ValueError: where a program has no name for an encoder, or one for two.
    """
    named = keys({c: r.shape[1] for c, r in rows.items()}, metadata)
    alone = {"comfyui": "emb_params", "onetrainer": "emp_params"}[program]
    if len(named) == 1 and set(named.values()) <= {"clip_l", "clip_h", None}:
        return {alone: next(iter(rows.values()))}
    names = {"t5xxl": "t5", "gemma2_2b": "gemma", "umt5xxl": None} if program == "onetrainer" else {}
    if missing := [encoder_name(k, 0) for k in named.values() if names.get(k, k) is None]:
        raise ValueError(f"OneTrainer has no embeddings for {', '.join(map(str, missing))}.")
    if len(set(named.values())) < len(named):
        raise ValueError(
            f"Two of its encoders would be called {' and '.join(map(str, named.values()))}: there is no such file."
        )
    return {names.get(named[c], named[c]): r for c, r in rows.items()}


def file_stem(placeholder: str) -> str:
    """A file's name for a placeholder, which A1111 and ComfyUI take as the word: dog for <dog>."""
    return re.sub(r"[^\w.-]+", "_", placeholder).strip("_.") or "concept"
