"""What a concept is beside a vocabulary: its family, its norms among those of the words, its angle to the word it came from,
the words nearest to it. All of it reads, and changes nothing."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..concept import registry
from ..concept.inversion import DirectionalInversion
from ..figures import figure_class
from ..sphere import angle
from .offload import offload_disabled
from .text_encoders import TextEncoder, find_text_encoders, match_components
from .vocabulary import word_rows

BINS = 40
ROUNDING = 0.01  # by which a norm may pass the vocabulary's: tables in half precision are rounded


def family(concept: DirectionalInversion) -> str | None:
    """The family of models that a concept is for as its file says, or likely for by its components and their widths."""
    return concept.metadata.get("family") or registry.infer_family({c: v.shape[1] for c, v in concept.directions.items()})


def from_vocabulary(pipe: Any, words: str, num_vectors: int | None = None) -> DirectionalInversion:
    """Words of a pipeline's own vocabulary as a concept, to move towards or away from by `DirectionalInversion.slerp`.

    Args:
        pipe: the pipeline; its text encoders are enough.
        words: one vector for each of their tokens.
        num_vectors: of the concept to be mixed with; where it is more than the words have, their rows are taken in turn.

    Raises:
        ValueError: for words of more vectors than that.
    """
    return DirectionalInversion.from_embeddings(words, word_rows(find_text_encoders(pipe), words, num_vectors))


def inspect(concept: DirectionalInversion, pipe: Any = None, nearest: int = 5) -> dict[str, Any]:
    """All that can be said of a concept, as JSON values.

    Args:
        concept: what to look at.
        pipe: the pipeline that it is for, of which tokenizers and text encoders are enough. Without one nothing is said of
            the vocabulary.
        nearest: how many of the words nearest to each vector to name.

    Returns:
        "placeholder_token", "num_vectors", "family" (or None), "metadata", and "encoders": by component "width", "encoder" (its
        likely name, or None) and "vectors", a dict each with its "norm". With a pipeline each encoder has its "vocabulary" (the
        number of "words", the "min", "mean" and "max" of their norms, a histogram's "counts" and "edges") and a "verdict", and
        each vector its "percentile" among these norms, "times_mean", "angle" to the initializer's row in degrees (None where
        there is none), and the "nearest" words by cosine, {"token", "cosine"}.

    Raises:
        ValueError: for a pipeline that the concept is not for.
    """
    encoders: dict[str, dict[str, Any]] = {}
    text_encoders = {} if pipe is None else find_text_encoders(pipe)
    if pipe is not None:
        concept = match_components(pipe, text_encoders, concept)
    keys = registry.declared_encoders(concept.directions, concept.metadata)
    for component, v in concept.directions.items():
        norms = concept.scales[component].tolist()
        encoders[component] = {
            "width": v.shape[1],
            "encoder": registry.encoder_label(keys.get(component), v.shape[1]),
            "vectors": [{"norm": m} for m in norms],
        }
        if pipe is not None:
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
    """Add to `found` what one encoder's vocabulary says."""
    weight = encoder.weight
    all_norms = torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32).cpu()
    ids = (encoder.original_rows() & (all_norms > 0)).nonzero()[:, 0]
    norms, v = all_norms[ids], concept.directions[encoder.component]
    # a part at a time: in float32 Gemma's and UMT5's tables are 2 and 4 GB
    cosines = torch.cat([v @ rows.float().cpu().T for rows in weight.split(8192)], 1)[:, ids] / norms
    best = cosines.topk(min(nearest, len(ids)))
    counts, edges = torch.histogram(norms, BINS)
    low, mean, high = (getattr(norms, f)().item() for f in ("min", "mean", "max"))
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
    """Degrees between a concept's vectors and the rows of the words it was started from, where there are such rows."""
    initializer, v = concept.metadata.get("initializer"), concept.directions[encoder.component]
    if not isinstance(initializer, str):
        return None
    try:
        rows = word_rows({encoder.component: encoder}, initializer, len(v))[encoder.component]
    except ValueError:  # it was no word but another concept, or another vocabulary's
        return None
    return torch.rad2deg(angle(v, rows))


def _verdict(vectors: list[dict[str, Any]], low: float, high: float) -> str:
    """A line about the vector whose norm is farthest outside the vocabulary's."""
    vector = max(vectors, key=lambda x: max(x["norm"] / high, low / x["norm"]))
    norm, share = vector["norm"], vector["times_mean"]
    if low * (1 - ROUNDING) <= norm <= high * (1 + ROUNDING):
        return f"norm is at the {_ordinal(round(vector['percentile']))} percentile: a normal word"
    size = f"{share:.0f}" if share >= 10 else f"{share:.2g}"
    what = "inflated" if norm > high else "shrunken"
    return f"norm is {size} times the vocabulary's mean: {what}; load with token_scale='mean'"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def table(report: Mapping[str, Any]) -> str:
    """A report of `inspect` as lines of text."""
    metadata, encoders = report["metadata"], report["encoders"]
    count = report["num_vectors"]
    lines = [f"{report['placeholder_token']}: {count} vector{'s' if count > 1 else ''} for each of {', '.join(encoders)}"]
    lines.append(f"family      {report['family'] or 'unknown'}")
    for key in ("base_model", "initializer", "scale_rule", "pooling", "method"):
        if key in metadata:
            lines.append(f"{key:11} {metadata[key]}")
    said = {*metadata, "placeholder_token", "initializer_token", "templates"}
    training = metadata.get("training")
    settings = {k: v for k, v in training.items() if v is not None and k not in said} if isinstance(training, Mapping) else {}
    if settings:
        text = ", ".join(f"{k}={v}" for k, v in settings.items())
        lines += textwrap.wrap(f"training    {text}", 120, subsequent_indent=" " * 12, break_on_hyphens=False)
    for component, found in encoders.items():
        name = f", {found['encoder']}" if found["encoder"] else ""
        lines += ["", f"{component} ({found['width']} wide{name})"]
        if words := found.get("vocabulary"):
            lines.append("  vocabulary: {words} words, norms {min:.3f} to {max:.3f}, mean {mean:.3f}".format(**words))
        lines += [f"  {i}  {_cells(vector)}" for i, vector in enumerate(found["vectors"])]
        lines += [f"  {found['verdict']}"] if "verdict" in found else []
    return "\n".join(lines) + "\n"


def _cells(vector: Mapping[str, Any]) -> str:
    cells = [f"norm {vector['norm']:.4g}"]
    if "percentile" in vector:
        cells += [f"percentile {vector['percentile']:.1f}", f"{vector['times_mean']:.3g} x mean"]
        cells += [f"{vector['angle']:.1f}° from the initializer"] if vector["angle"] is not None else []
        cells += ["near " + ", ".join(f"{x['token']} {x['cosine']:.2f}" for x in vector["nearest"])]
    return "  ".join(cells)


def figure(report: Mapping[str, Any], path: str | Path) -> None:
    """Plot the norms of each encoder's vocabulary, with the concept's norms marked, and each vector's nearest words.

    Needs matplotlib (`diffusers-dti[plot]`).

    Args:
        report: what `inspect` returned for a concept and a pipeline.
        path: the file for the plot.

    Raises:
        ValueError: if the report has no vocabulary.
        ImportError: if matplotlib is not installed.
    """
    figure_type = figure_class()
    encoders = report["encoders"]
    if not all("vocabulary" in found for found in encoders.values()):
        raise ValueError("The report has no vocabulary to plot: inspect the concept with the model that it is for.")
    columns = 1 + report["num_vectors"]
    plot = figure_type(figsize=(1 + 3.2 * columns, 2.8 * len(encoders)), layout="constrained")
    grid = plot.subplots(len(encoders), columns, squeeze=False)
    for (component, found), (histogram, *others) in zip(encoders.items(), grid):
        words, vectors = found["vocabulary"], found["vectors"]
        histogram.stairs(words["counts"], words["edges"], fill=True, color="C0", alpha=0.5)
        for i, vector in enumerate(vectors):
            histogram.axvline(vector["norm"], color=f"C{i + 1}")
        histogram.set(title=component, xlabel="norm", ylabel="words")
        for i, axes in enumerate(others):
            if i < len(vectors):
                _plot_nearest(axes, vectors[i]["nearest"], f"{report['placeholder_token']}, vector {i}", f"C{i + 1}")
            else:
                axes.axis("off")
    plot.savefig(path, dpi=120)


def _plot_nearest(axes: Any, nearest: Sequence[Mapping[str, Any]], title: str, color: str) -> None:
    """Plot the cosines of the nearest words as bars."""
    axes.barh(range(len(nearest)), [word["cosine"] for word in nearest], color=color)
    # An unescaped dollar sign would start a formula.
    axes.set_yticks(range(len(nearest)), [word["token"].replace("$", r"\$") for word in nearest])
    axes.invert_yaxis()
    axes.set(title=title.replace("$", r"\$"), xlabel="cosine")
