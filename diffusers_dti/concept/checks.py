"""Check the parts of a concept, and what the header of its files says, wherever they come from."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Far within what float32 can square, so that a norm is measured again as it was set, and a row keeps its direction.
SMALLEST_SCALE, LARGEST_SCALE = 1e-10, 1e10
LONGEST_TEXT = 255  # characters of a placeholder or a name: messages repeat them

TEXTS = ("placeholder_token", "family", "base_model", "initializer", "method", "pooling", "prefix_space")
MAPPINGS = ("encoders", "training", "versions")


def check_word(placeholder: str) -> None:
    """Check that a text can be a placeholder.

    Raises:
        ValueError: if it is empty, has spaces around it, is not Unicode, is too long, or looks like a credential.
    """
    lone_surrogate = any("\ud800" <= character <= "\udfff" for character in placeholder)
    if not placeholder or placeholder != placeholder.strip() or lone_surrogate or len(placeholder) > LONGEST_TEXT:
        raise ValueError(f"The placeholder token must be a word such as '<dog>', got {placeholder!r:.80}.")
    if placeholder.startswith("hf_"):
        raise ValueError("A placeholder that starts with hf_ looks like a Hub credential: pass that as `hf_token`.")


def check_parts(directions: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> None:
    """Check directions and scales.

    Args:
        directions: (n, d) by component.
        scales: (n,) by component.

    Raises:
        ValueError: if directions are not finite unit rows, scales are out of range, or they do not match.
    """
    if not directions or directions.keys() != scales.keys():
        raise ValueError(f"Every direction needs a scale, got {sorted(directions)} and {sorted(scales)}.")
    for component, v in directions.items():
        m = scales[component]
        if v.ndim != 2 or m.shape != v.shape[:1] or not len(v):
            raise ValueError(f"{component}: directions (n, d) and scales (n,) expected, got {v.shape} and {m.shape}.")
        # `not (... <= ...)` is true for NaN as well.
        if not (torch.linalg.vector_norm(v, dim=-1) - 1).abs().le(1e-3).all():
            raise ValueError(f"{component}: directions must be finite unit rows; use `from_embeddings` for raw rows.")
        if not ((m >= SMALLEST_SCALE) & (m <= LARGEST_SCALE)).all():
            allowed = f"positive, from {SMALLEST_SCALE:g} to {LARGEST_SCALE:g}"
            raise ValueError(f"{component}: scales must be {allowed}, got {m.tolist()!s:.80}.")


def check_header(header: Mapping[str, Any]) -> None:
    """Check that the values of a header that are used have the types that they are written with.

    Args:
        header: the JSON values of a file, or the metadata of a concept that is written.

    Raises:
        ValueError: if a value has another type, or a text is too long or not Unicode.
    """
    for key in TEXTS:
        value = header.get(key)
        if value is not None and not (isinstance(value, str) and len(value) <= LONGEST_TEXT):
            raise ValueError(f"its {key} must be text of at most {LONGEST_TEXT} characters, got {value!r:.80}")
    for key in MAPPINGS:
        if not isinstance(header.get(key, {}), Mapping):
            raise ValueError(f"its {key} must be a mapping, got {header[key]!r:.80}")
    if not all(isinstance(key, str | None) for key in header.get("encoders", {}).values()):
        raise ValueError("its encoders must be keys by component")
    json.dumps(header, ensure_ascii=False).encode()  # a lone surrogate could be neither printed nor saved again


def check_scale(value: Any, norms: Tensor) -> Tensor:
    """Return the scales in a header, (n,) float32, if they are the norms of the rows, (n,).

    Raises:
        ValueError: if they are not, or are not numbers.
    """
    if not isinstance(value, list) or not all(type(number) in (int, float) for number in value):
        raise ValueError(f"its scale must be a list of numbers, got {value!r:.80}")
    scale = torch.tensor(value, dtype=torch.float32)
    # `not <=` is true for NaN as well, and an infinite scale is not within a share of itself.
    if scale.shape != norms.shape or not ((norms - scale).abs() <= 1e-4 * norms).all():
        raise ValueError(f"its scales {scale.tolist()!s:.80} are not the norms of the rows, {norms.tolist()!s:.80}")
    return scale
