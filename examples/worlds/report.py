"""Write the study's tables into docs/study.md, between the comments that name them, and draw its figure."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from asides import ASIDES
from gates import STUDIED
from rows import CEILING, FINAL, FLOOR, PARTS
from walk import spearman

from diffusers_dti.evaluation.summary import Record, RunSummary, summarize
from diffusers_dti.figures import figure_class

if TYPE_CHECKING:
    from study import Study

OURS = "DTI @100"  # the new default
LINES = (FLOOR, CEILING, "DTI", "DTI, the old default", "TI, best rate")  # of the figure
STEPWISE = ("main", "curve", "others")  # the parts whose rows are named with their steps
MARGIN = 0.05  # a score lower by less than this counts as equal
SCORES = ("subject", "prompt")
SPLITS = ("test", "fresh", "dev", "more")


def records(study: "Study", part: str, world: str, splits: Sequence[str]) -> list[Record]:
    """Return the scores of all runs of a part that there are, one record for each length and use."""
    found: list[Record] = []
    for job in study.jobs(part, [world], splits, PARTS[part].seeds):
        result = study.result(job)
        if result is None:
            continue
        for length in job.lengths:
            for use, scores in result[str(length)].items():
                name = ", ".join(filter(None, (job.row.name, use))) + (f" @{length}" if part in STEPWISE else "")
                own = {"angle": 0.0, "heldout_loss": 0.0} | scores
                found.append({"run": name, "subject": job.bundle.words(), "prompt": "", "seed": job.seed, "scores": own})
    return found


def differences(of: Sequence[Record], run: str, other: str) -> list[Record]:
    """Return the scores of a run minus those of another one, for each subject and seed that both have."""

    def by_run(name: str) -> dict[tuple[str, int], Mapping[str, float]]:
        return {(r["subject"], r["seed"]): r["scores"] for r in of if r["run"] == name}

    ours, theirs = by_run(run), by_run(other)
    paired = []
    for subject, seed in ours.keys() & theirs.keys():
        scores = {name: ours[subject, seed][name] - theirs[subject, seed][name] for name in SCORES}
        paired.append(Record(run=f"{run} - {other}", subject=subject, prompt="", seed=seed, scores=scores))
    return sorted(paired, key=lambda r: (r["subject"], r["seed"]))


def interval(summary: RunSummary, score: str, sign: str = "") -> str:
    """Format a mean with its interval."""
    e = summary["mean"][score]
    return f"{e['mean']:{sign}.3f} [{e['low']:{sign}.3f}, {e['high']:{sign}.3f}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def scores_table(study: "Study", part: str, world: str, splits: Sequence[str]) -> str:
    """Return a part's table of a world: scores, norms and angles."""
    found = records(study, part, world, splits)
    if not found:
        return "Not measured yet."
    rows = []
    for name, summary in summarize(found).items():
        mean = summary["mean"]
        cells = [interval(summary, score) for score in SCORES]
        more = [f"{mean['norm']['mean']:.1f}", f"{mean['angle']['mean']:.0f}°"]
        line = name.partition(" @")[0]
        if line in (FLOOR, CEILING):
            name, more = line, ["", ""]
        rows.append([name, *cells, *more, str(summary["pictures"])])
    return table(("", "subject", "prompt", "norm", "angle", "runs"), rows)


def differences_table(study: "Study", world: str) -> str:
    """Return the paired differences that the new default is judged by."""
    rows = []
    for splits in (["test"], ["fresh"], ["test", "fresh"]):
        found = records(study, "main", world, splits)
        final = FINAL[world]
        for other in (f"DTI, the old default @{final}", "TI, best rate @100", f"TI, best rate @{final}"):
            paired = differences(found, OURS, other)
            if paired:
                (summary,) = summarize(paired).values()
                holds = all(summary["mean"][score]["low"] > -MARGIN for score in SCORES)
                cells = [interval(summary, score, "+") for score in SCORES]
                rows.append([" and ".join(splits), other, *cells, "yes" if holds else "no", str(summary["pictures"])])
    header = ("subjects", f"{OURS} minus", "subject", "prompt", f"both above -{MARGIN}", "pairs")
    return table(header, rows) if rows else "Not measured yet."


def summary_table(study: "Study") -> str:
    """Return subject / prompt of the main rows, a column for each world."""
    cells: dict[str, dict[str, str]] = {}
    for world in STUDIED:
        found = records(study, "main", world, ("test", "fresh"))
        for name, summary in summarize(found).items() if found else ():
            line, _, length = name.partition(" @")
            steps = {"100": ", 100 steps", str(FINAL[world]): ", 400 or 500 steps"}.get(length)
            if steps and "rescaled" not in line:
                key = line if line in (FLOOR, CEILING) else line + steps
                mean = summary["mean"]
                cells.setdefault(key, {})[world] = f"{mean['subject']['mean']:.3f} / {mean['prompt']['mean']:.3f}"
    return table(("", *STUDIED), [[name, *(own.get(world, "") for world in STUDIED)] for name, own in cells.items()])


def seeds_table(study: "Study") -> str:
    """Return how much the scores of one subject vary with the seed: the standard deviation, averaged over subjects."""
    rows = []
    for world in STUDIED:
        by_run: dict[str, dict[str, list[Mapping[str, float]]]] = {}
        for record in records(study, "main", world, ("test", "fresh")):
            by_run.setdefault(record["run"], {}).setdefault(record["subject"], []).append(record["scores"])
        for name, subjects in by_run.items():
            groups = [group for group in subjects.values() if len(group) > 1]
            if groups and name.endswith(("@100", f"@{FINAL[world]}")):
                spread = [statistics.mean(statistics.stdev(s[score] for s in group) for group in groups) for score in SCORES]
                rows.append([world, name, *(f"{value:.3f}" for value in spread)])
    return table(("world", "", "subject", "prompt"), rows)


def heldout_table(study: "Study") -> str:
    """Return how the held-out loss goes with the score over the steps of a run, and what choosing the step by it would bring.

    The correlation is -1 if a lower loss always comes with a higher score.
    """
    rows = []
    for world in STUDIED:
        own: dict[tuple[str, int], list[Mapping[str, float]]] = {}
        for record in records(study, "main", world, ("test", "fresh")):
            if record["run"].startswith("DTI, the old default @"):
                own.setdefault((record["subject"], record["seed"]), []).append(record["scores"])
        runs = [steps for steps in own.values() if len(steps) > 1]
        if runs:
            ranks = [spearman([(s["heldout_loss"], overall(s)) for s in steps]) for steps in runs]
            known = [rank for rank in ranks if not math.isnan(rank)]  # a run whose scores never change has no ranks
            ends = [statistics.mean(overall(pick(steps)) for steps in runs) for pick in (_last, _lowest, _best)]
            rank = f"{statistics.mean(known):+.2f}" if known else "-"
            rows.append([world, str(len(runs)), rank, *(f"{score:.3f}" for score in ends)])
    header = ("world", "runs", "rank correlation", "score at the end", "at the lowest loss", "at the best step")
    return table(header, rows) if rows else "Not measured yet."


def overall(scores: Mapping[str, float]) -> float:
    """Return the mean of both scores."""
    return statistics.mean(scores[score] for score in SCORES)


def _last(steps: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    return steps[-1]


def _lowest(steps: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    return min(steps, key=lambda s: s["heldout_loss"])


def _best(steps: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    return max(steps, key=overall)


def draw(study: "Study", path: Path) -> None:
    """Plot the scores against the steps, a column for each world."""
    plot = figure_class()(figsize=(11, 6), layout="constrained")
    grid = plot.subplots(2, len(STUDIED), sharex=True, sharey="row", squeeze=False)
    for column, world in enumerate(STUDIED):
        lines: dict[str, dict[int, RunSummary]] = {}
        for part in ("curve", "main"):  # the curve has one seed, and only where the other has nothing
            found = records(study, part, world, ("test", "fresh"))
            for name, summary in summarize(found).items() if found else ():
                line, _, length = name.partition(" @")
                if line in LINES:
                    lines.setdefault(line, {})[int(length)] = summary
        for row, score in enumerate(SCORES):
            axes = grid[row][column]
            for line in (FLOOR, CEILING):
                if line in lines:
                    (only,) = lines[line].values()
                    axes.axhline(only["mean"][score]["mean"], color="gray", linestyle=":", label=line)
            for line in (line for line in LINES[2:] if line in lines):
                points = lines[line]
                estimates = [points[length]["mean"][score] for length in sorted(points)]
                axes.plot(sorted(points), [e["mean"] for e in estimates], marker="o", markersize=3, label=line)
                axes.fill_between(sorted(points), [e["low"] for e in estimates], [e["high"] for e in estimates], alpha=0.15)
            axes.set(title=world if row == 0 else None, xlabel="steps" if row else None, ylabel=None if column else score)
            axes.grid(alpha=0.3)
    grid[0][0].legend(fontsize="small", loc="lower right")
    plot.savefig(path, dpi=110)


def write(study: "Study", pages: Sequence[Path]) -> None:
    """Write every table into its place on the pages, and the figure beside the first one.

    A table's place is between `<!-- table: NAME -->` and `<!-- end -->`, where NAME is "summary", "seeds", "heldout",
    "differences" and a world, or a part with a world and perhaps a split, such as "main sdxl fresh".
    """

    def filled(match: re.Match[str]) -> str:
        what, *where = match[1].split()
        if what in ASIDES:
            found = study.aside(what, where[0])
            text = table(found[0], found[1:]) if found else "Not measured yet."
        elif what == "seeds":
            text = seeds_table(study)
        elif what == "summary":
            text = summary_table(study)
        elif what == "heldout":
            text = heldout_table(study)
        elif what == "differences":
            text = differences_table(study, where[0])
        else:
            text = scores_table(study, what, where[0], where[1:] or SPLITS)
        return f"<!-- table: {match[1]} -->\n\n{text}\n\n<!-- end -->"

    for page in pages:
        page.write_text(re.sub(r"<!-- table: (.*?) -->.*?<!-- end -->", filled, page.read_text(), flags=re.DOTALL))
    draw(study, pages[0].with_suffix(".png"))
