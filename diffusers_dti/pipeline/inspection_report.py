"""An inspection as text and as a figure."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..figures import figure_class


def table(report: Mapping[str, Any]) -> str:
    """Write a report of `inspect` as lines of text.

    Args:
        report: what `inspect` returned, with or without a pipeline.

    Returns:
        The lines, each with its line break. Control characters in the concept's file are escaped.

    Example:

        ```py
        >>> from diffusers_dti.pipeline.inspection import inspect, table

        >>> dog = pipe.load_directional_inversion("user/dti-dog")
        >>> print(table(inspect(dog)).splitlines()[0])
        <dog>: 1 vector for each of text_encoder, text_encoder_2
        ```
    """
    metadata, count = report["metadata"], report["num_vectors"]
    vectors = f"{count} vector{'s' if count > 1 else ''}"
    lines = [f"{report['placeholder_token']}: {vectors} for each of {', '.join(report['encoders'])}"]
    lines.append(f"family      {report['family'] or 'unknown'}")
    for key in ("base_model", "initializer", "scale_rule", "pooling", "method"):
        if key in metadata:
            lines.append(f"{key:11} {metadata[key]}")
    lines += _training_lines(metadata)
    for component, found in report["encoders"].items():
        lines += _encoder_lines(component, found)
    return "\n".join(map(printable, lines)) + "\n"


def printable(line: str) -> str:
    """Return a line for a terminal: what is not printable is escaped as in a Python literal, such as \\x1b.

    Args:
        line: text, of which some is another party's.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def _training_lines(metadata: Mapping[str, Any]) -> list[str]:
    """Write the training settings that the table does not have yet, wrapped to 120 columns."""
    training = metadata.get("training")
    if not isinstance(training, Mapping):
        return []
    settings = []
    for key, value in training.items():
        if value is not None and key not in metadata and key not in ("placeholder_token", "initializer_token", "templates"):
            settings.append(f"{key}={value}")
    text = f"training    {', '.join(settings)}"
    return textwrap.wrap(text, 120, subsequent_indent=" " * 12, break_on_hyphens=False) if settings else []


def _encoder_lines(component: str, found: Mapping[str, Any]) -> list[str]:
    """Write one encoder's part of a report."""
    name = f", {found['encoder']}" if found["encoder"] else ""
    lines = ["", f"{component} ({found['width']} wide{name})"]
    if "vocabulary" in found:
        lines.append("  vocabulary: {words} words, norms {min:.3f} to {max:.3f}, mean {mean:.3f}".format(**found["vocabulary"]))
    for i, vector in enumerate(found["vectors"]):
        lines.append(f"  {i}  {_cells(vector)}")
    if "verdict" in found:
        lines.append(f"  {found['verdict']}")
    return lines


def _cells(vector: Mapping[str, Any]) -> str:
    """Write one vector's part of a report."""
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
