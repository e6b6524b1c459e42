"""Summarize the scores of images: means with intervals, tables, and a plot of subject score against prompt score."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from ..figures import figure_class

RESAMPLES = 2000
MARKERS = "osD^v"


class Record(TypedDict):
    """The scores of one image."""

    run: str
    subject: str
    prompt: str
    seed: int
    scores: Mapping[str, float]


class Estimate(TypedDict):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


class RunSummary(TypedDict):
    """The estimates of one run, by the names of the scores."""

    mean: dict[str, Estimate]  # over subjects
    subjects: dict[str, dict[str, Estimate]]
    pictures: int  # the number of images, under its name in results that exist


def summarize(records: Sequence[Record]) -> dict[str, RunSummary]:
    """Compute means over subjects with 95 % bootstrap intervals.

    Args:
        records: the scores of every image.

    Returns:
        A summary of each run, which can be written as JSON. The interval of a subject is over its images. The interval of
        the mean over subjects is over the subjects, or over the images if there is only one subject.

    Raises:
        ValueError: if there are no records, or some images lack scores that others have.
    """
    if not records:
        raise ValueError("There are no scores to summarize: evaluate at least one image.")
    names = list(records[0]["scores"])
    values: dict[str, dict[str, list[list[float]]]] = {}
    for record in records:
        if set(record["scores"]) != set(names):
            raise ValueError(
                f"Run {record['run']!r} has the scores {', '.join(record['scores'])}, run {records[0]['run']!r} has "
                f"{', '.join(names)}: evaluate both with the same metrics."
            )
        subjects = values.setdefault(record["run"], {})
        subjects.setdefault(record["subject"], []).append([record["scores"][name] for name in names])
    summary: dict[str, RunSummary] = {}
    for run, subjects in values.items():
        tables = {subject: torch.tensor(rows, dtype=torch.float64) for subject, rows in subjects.items()}
        each = list(tables.values())  # (images, scores)
        whole = each[0] if len(each) == 1 else torch.stack([table.mean(0) for table in each])
        summary[run] = {
            "mean": _estimate(whole, names),
            "subjects": {subject: _estimate(table, names) for subject, table in tables.items()},
            "pictures": sum(len(table) for table in each),
        }
    return summary


def _estimate(values: Tensor, names: Sequence[str]) -> dict[str, Estimate]:
    """Return each column's mean, with the interval that resampling the rows with replacement yields.

    Args:
        values: (rows, scores) float64.
        names: the names of the scores.
    """
    # The generator starts anew for every subject and run: an interval must not depend on what else is summarized.
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    estimates: dict[str, Estimate] = {}
    for name, column in zip(names, values.T, strict=True):
        means = column[draws].mean(1)
        low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
        estimates[name] = {"mean": column.mean().item(), "low": low, "high": high}
    return estimates


def markdown(summary: Mapping[str, RunSummary]) -> str:
    """Format two tables: a row for each run, and a row for each subject of each run."""
    names = _score_names(summary)
    lines = _header(["run", *names, "pictures"])
    for run, entry in summary.items():
        lines.append(_row([run, *_cells(entry["mean"], names), str(entry["pictures"])]))
    lines += ["", *_header(["subject", "run", *names])]
    subjects: dict[str, None] = {}  # in the order in which they come up
    for entry in summary.values():
        subjects.update(dict.fromkeys(entry["subjects"]))
    for subject in subjects:
        for run, entry in summary.items():
            if subject in entry["subjects"]:
                lines.append(_row([subject, run, *_cells(entry["subjects"][subject], names)]))
    return "\n".join(lines) + "\n"


def figure(summary: Mapping[str, RunSummary], x: str, y: str, path: str | Path) -> None:
    """Plot a point with intervals for each run, and a small point for each of its subjects.

    Needs matplotlib (`diffusers-dti[plot]`).

    Args:
        summary: from `summarize`.
        x, y: the names of the prompt score and the subject score.
        path: the file for the plot.

    Raises:
        ValueError: if there is no such score.
        ImportError: if matplotlib is not installed.
    """
    figure_type = figure_class()
    names = _score_names(summary)
    missing = [name for name in (x, y) if name not in names]
    if missing:
        raise ValueError(f"There is no score {missing[0]!r} to plot, only {', '.join(names)}.")
    plot = figure_type(figsize=(9, 5), layout="constrained")
    axes = plot.subplots()
    for number, (run, entry) in enumerate(summary.items()):
        color, marker = f"C{number % 10}", MARKERS[number // 10 % len(MARKERS)]
        subjects = list(entry["subjects"].values())
        across, upright = [s[x]["mean"] for s in subjects], [s[y]["mean"] for s in subjects]
        axes.scatter(across, upright, 8, alpha=0.3, linewidths=0, color=color, marker=marker)
        on_x, on_y = entry["mean"][x], entry["mean"][y]
        axes.errorbar(
            on_x["mean"],
            on_y["mean"],
            xerr=_error_bar(on_x),
            yerr=_error_bar(on_y),
            label=run,
            linestyle="none",
            elinewidth=0.8,
            color=color,
            marker=marker,
        )
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    plot.legend(loc="outside right upper", fontsize="small")
    plot.savefig(path, dpi=120)


def _error_bar(estimate: Estimate) -> list[list[float]]:
    # Rounding can put a bound on the wrong side of a mean that it equals.
    return [[max(0, estimate["mean"] - estimate["low"])], [max(0, estimate["high"] - estimate["mean"])]]


def _score_names(summary: Mapping[str, RunSummary]) -> list[str]:
    return list(next(iter(summary.values()))["mean"])


def _cells(estimates: Mapping[str, Estimate], names: Sequence[str]) -> list[str]:
    return ["{mean:.3f} [{low:.3f}, {high:.3f}]".format(**estimates[name]) for name in names]


def _header(titles: Sequence[str]) -> list[str]:
    return [_row(titles), "|" + "---|" * len(titles)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
