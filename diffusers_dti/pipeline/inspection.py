"""Compare a concept with a vocabulary: norms, angles to the initializer, and the nearest words. Nothing here writes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..concept import registry
from ..concept.inversion import DirectionalInversion
from ..sphere import angle
from .inspection_report import figure, table
from .matching import match_components
from .offload import offload_disabled
from .pooling import pooling_of
from .protocols import Pipeline
from .text_encoders import TextEncoder, find_text_encoders
from .vocabulary_check import check_width
from .word_rows import word_rows

__all__ = ["family", "figure", "from_vocabulary", "inspect", "table"]

BINS = 40  # of the histogram of norms
ROUNDING = 0.01  # how far a normal norm may be outside the vocabulary's range: tables in half precision are rounded


def family(concept: DirectionalInversion) -> str | None:
    """Return the family of models that a concept is for.

    Args:
        concept: the concept.

    Returns:
        The family that the concept's file names; otherwise the one that its components and their widths suggest, or None.

    Example:

        ```py
        >>> import torch
        >>> from diffusers_dti import DirectionalInversion
        >>> from diffusers_dti.pipeline.inspection import family

        >>> family(DirectionalInversion.from_embeddings("<dog>", {"text_encoder": torch.ones(2304)}))
        'SANA'
        ```
    """
    return concept.metadata.get("family") or registry.infer_family({c: v.shape[1] for c, v in concept.directions.items()})


def from_vocabulary(pipe: Pipeline, words: str, num_vectors: int | None = None) -> DirectionalInversion:
    """Make a concept from words of a pipeline's own vocabulary, to move towards or away from with `DirectionalInversion.slerp`.

    Args:
        pipe: the pipeline. Tokenizers and text encoders are enough.
        words: the words, with one vector for each of their tokens.
        num_vectors: the number of vectors of the concept to mix it with. If the words have fewer, their rows are repeated.

    Returns:
        The concept, whose placeholder is the words. Load it under another one (`token`).

    Raises:
        ValueError: if the words have more vectors than that, or an encoder does not know them.

    Example:

        ```py
        >>> from diffusers_dti.pipeline.inspection import from_vocabulary

        >>> dog = pipe.load_directional_inversion("user/dti-dog")
        >>> redder = dog.slerp(from_vocabulary(pipe, "red", dog.num_vectors), degrees=20)
        ```
    """
    return DirectionalInversion.from_embeddings(words, word_rows(find_text_encoders(pipe), words, num_vectors))


def inspect(concept: DirectionalInversion, pipe: Pipeline | None = None, nearest: int = 5) -> dict[str, Any]:
    """Report on a concept, in JSON values.

    Args:
        concept: the concept.
        pipe: the pipeline that it is for. Tokenizers and text encoders are enough. Without one, the report does not compare
            the concept with a vocabulary.
        nearest: the number of nearest words to name for each vector.

    Returns:
        A dict of "placeholder_token", "num_vectors", "family" (or None), "metadata" and "encoders". The latter has, for each
        component, a dict of

        - "width", of the embeddings;
        - "encoder", its likely name, or None;
        - "vectors", a list with a dict for each vector: its "norm" and, with a pipeline, the "percentile" of the norm in the
          vocabulary, "times_mean" (the norm divided by the vocabulary's mean), "angle" to the initializer's row in degrees
          (None without such a row), and "nearest", a list of {"token", "cosine"};
        - "vocabulary", with a pipeline: the number of "words", the "min", "mean" and "max" of their norms, and the "counts"
          and "edges" of a histogram of the norms;
        - "verdict", with a pipeline: a line of text.

    Raises:
        ValueError: if the concept is not for the pipeline, or says that it is pooled in an unknown way.

    Example:

        ```py
        >>> from diffusers_dti.pipeline.inspection import inspect

        >>> dog = pipe.load_directional_inversion("user/dti-dog")
        >>> report = inspect(dog, pipe)
        >>> list(report)
        ['placeholder_token', 'num_vectors', 'family', 'metadata', 'encoders']
        >>> list(report["encoders"]["text_encoder_2"])
        ['width', 'encoder', 'vectors', 'vocabulary', 'verdict']
        ```
    """
    pooling_of(concept)  # what loading refuses is refused here
    encoders: dict[str, dict[str, Any]] = {}
    text_encoders: dict[str, TextEncoder] = {}
    if pipe is not None:
        text_encoders = find_text_encoders(pipe)
        concept = match_components(pipe, text_encoders, concept)
    keys = registry.declared_encoders(concept.directions, concept.metadata)
    for component, v in concept.directions.items():
        encoders[component] = {
            "width": v.shape[1],
            "encoder": registry.encoder_label(keys.get(component), v.shape[1]),
            "vectors": [{"norm": norm} for norm in concept.scales[component].tolist()],
        }
        if component in text_encoders:
            check_width(text_encoders[component], concept)
            with offload_disabled(text_encoders[component].model):
                _compare(encoders[component], concept, text_encoders[component], nearest)
    return {
        "placeholder_token": concept.placeholder_token,
        "num_vectors": concept.num_vectors,
        "family": family(concept),
        "metadata": concept.metadata,
        "encoders": encoders,
    }


@torch.no_grad()
def _compare(found: dict[str, Any], concept: DirectionalInversion, encoder: TextEncoder, nearest: int) -> None:
    """Add to `found`, an encoder's part of the report, how the concept compares with the encoder's vocabulary."""
    weight = encoder.weight
    all_norms = torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32).cpu()
    ids = (encoder.original_rows() & (all_norms > 0)).nonzero()[:, 0]
    norms, v = all_norms[ids], concept.directions[encoder.component]
    # One part of the table at a time: in float32, Gemma's and UMT5's are 2 and 4 GB.
    products = [v @ rows.float().cpu().T for rows in weight.split(8192)]
    cosines = torch.cat(products, 1)[:, ids] / norms
    best = cosines.topk(min(nearest, len(ids)))
    counts, edges = torch.histogram(norms, BINS)
    low, mean, high = norms.min().item(), norms.mean().item(), norms.max().item()
    found["vocabulary"] = {
        "words": len(norms), "min": low, "mean": mean, "max": high,
        "counts": counts.int().tolist(), "edges": edges.tolist(),
    }  # fmt: skip
    angles = _angles(concept, encoder)
    for i, vector in enumerate(found["vectors"]):
        norm = vector["norm"]
        vector["percentile"] = 50 * ((norms < norm).float().mean() + (norms <= norm).float().mean()).item()
        vector["times_mean"] = norm / mean
        vector["angle"] = None if angles is None else angles[i].item()
        tokens = encoder.tokenizer.convert_ids_to_tokens(ids[best.indices[i]].tolist())
        vector["nearest"] = [{"token": t, "cosine": c} for t, c in zip(tokens, best.values[i].tolist(), strict=True)]
    found["verdict"] = _verdict(found["vectors"], low, high)


def _angles(concept: DirectionalInversion, encoder: TextEncoder) -> Tensor | None:
    """Return the angles in degrees, (n,), between a concept's vectors and its initializer's rows; None without such rows."""
    initializer, v = concept.metadata.get("initializer"), concept.directions[encoder.component]
    if not isinstance(initializer, str):
        return None
    try:
        # Files from before the setting started from the word alone.
        in_context = bool(_training_settings(concept).get("initializer_context"))
        rows = word_rows({encoder.component: encoder}, initializer, len(v), in_context)[encoder.component]
    except ValueError:  # the initializer was another concept, or is not a word of this vocabulary
        return None
    return torch.rad2deg(angle(v, rows))


def _training_settings(concept: DirectionalInversion) -> Mapping[str, Any]:
    settings = concept.metadata.get("training")
    return settings if isinstance(settings, Mapping) else {}


def _verdict(vectors: list[dict[str, Any]], low: float, high: float) -> str:
    """Write a line about the vector whose norm is farthest outside the vocabulary's."""
    vector = max(vectors, key=lambda x: max(x["norm"] / high, low / x["norm"]))
    norm, share = vector["norm"], vector["times_mean"]
    if low * (1 - ROUNDING) <= norm <= high * (1 + ROUNDING):
        return f"norm is at the {_ordinal(round(vector['percentile']))} percentile: a normal word"
    size = f"{share:.0f}" if share >= 10 else f"{share:.2g}"
    what = "inflated" if norm > high else "shrunken"
    return f"norm is {size} times the vocabulary's mean: {what}; load with token_scale='mean'"


def _ordinal(number: int) -> str:
    """Write a number as 1st, 2nd, 3rd, 4th."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
