"""From scores of pictures to what is reported: means with intervals, tables, and a figure of subject against prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RESAMPLES = 2000
MARKERS = "osD^v"

Estimate = dict[str, float]  # mean, low, high


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over subjects with 95 % bootstrap intervals.

    Args:
        records: one a picture: {"run": str, "subject": str, "prompt": str, "seed": int, "scores": {name: float}}.

    Returns:
        Per run {"mean": {score: estimate}, "subjects": {subject: {score: estimate}}, "pictures": their number}, where an
        estimate is {"mean", "low", "high"}. A subject's interval is of its pictures; the mean over subjects has that of the
        subjects, or with a single one that of its pictures. All of it can be written as JSON.

    Raises:
        ValueError: for no records, or pictures that do not all have the same scores.
    """
    if not records:
        raise ValueError("There are no scores to summarise: evaluate at least one picture.")
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
    summary = {}
    for run, subjects in values.items():
        tables = [torch.tensor(rows, dtype=torch.float64) for rows in subjects.values()]  # (pictures, scores) each
        whole = tables[0] if len(tables) == 1 else torch.stack([table.mean(0) for table in tables])
        summary[run] = {
            "mean": _estimates(whole, names),
            "subjects": {subject: _estimates(table, names) for subject, table in zip(subjects, tables)},
            "pictures": sum(map(len, tables)),
        }
    return summary


def markdown(summary: dict[str, dict[str, Any]]) -> str:
    """Two tables: a row for each run, and a row for each subject of each run."""
    names = list(next(iter(summary.values()))["mean"])
    lines = _head(["run", *names, "pictures"])
    lines += [_row([run, *_cells(entry["mean"], names), str(entry["pictures"])]) for run, entry in summary.items()]
    lines += ["", *_head(["subject", "run", *names])]
    for subject in dict.fromkeys(subject for entry in summary.values() for subject in entry["subjects"]):
        for run, entry in summary.items():
            if subject in entry["subjects"]:
                lines.append(_row([subject, run, *_cells(entry["subjects"][subject], names)]))
    return "\n".join(lines) + "\n"


def figure(summary: dict[str, dict[str, Any]], x: str, y: str, path: str | Path) -> None:
    """A point for each run with its intervals, and a small one for each subject. Needs matplotlib (`diffusers-dti[plot]`).

    Args:
        summary: from `summarise`.
        x, y: names of the text score and the subject score.
        path: the picture to write.

    Raises:
        ValueError: for a score that there is not.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures are drawn by matplotlib: pip install diffusers-dti[plot]") from error
    names = list(next(iter(summary.values()))["mean"])
    if missing := [name for name in (x, y) if name not in names]:
        raise ValueError(f"There is no score {missing[0]!r} to draw: there are {', '.join(names)}.")
    drawing = Figure(figsize=(9, 5), layout="constrained")
    axes = drawing.subplots()
    for number, (run, entry) in enumerate(summary.items()):
        style, mean = {"color": f"C{number % 10}", "marker": MARKERS[number // 10 % len(MARKERS)]}, entry["mean"]
        subjects = entry["subjects"].values()
        axes.scatter([s[x]["mean"] for s in subjects], [s[y]["mean"] for s in subjects], 8, alpha=0.3, linewidths=0, **style)
        # rounding can put a bound past a mean that it equals
        errors = [[[max(0, m["mean"] - m["low"])], [max(0, m["high"] - m["mean"])]] for m in (mean[x], mean[y])]
        point = mean[x]["mean"], mean[y]["mean"]
        axes.errorbar(*point, xerr=errors[0], yerr=errors[1], label=run, linestyle="none", elinewidth=0.8, **style)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    drawing.legend(loc="outside right upper", fontsize="small")
    drawing.savefig(path, dpi=120)


def _estimates(values: torch.Tensor, names: Sequence[str]) -> dict[str, Estimate]:
    """Of (items, scores): each column's mean, and the interval when items are drawn again with replacement."""
    # The same draws for every subject and run: an interval does not hang on what else is summarised.
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = torch.stack([column[draws].mean(1) for column in values.T], dim=1)  # (resamples, scores)
    rows = torch.stack([values.mean(0), *means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype), dim=0)])
    return {name: dict(zip(("mean", "low", "high"), column.tolist())) for name, column in zip(names, rows.T)}


def _cells(estimates: dict[str, Estimate], names: Sequence[str]) -> list[str]:
    return ["{mean:.3f} [{low:.3f}, {high:.3f}]".format(**estimates[name]) for name in names]


def _head(titles: Sequence[str]) -> list[str]:
    return [_row(titles), "|" + "---|" * len(titles)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
