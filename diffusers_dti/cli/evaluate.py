"""`dti evaluate`: generate and score images of what `dti train` has learned, following the paper's protocol."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments

if TYPE_CHECKING:
    from ..data.subjects import Subject
    from ..evaluation.generation import PlannedImage
    from ..evaluation.metrics import Metric
    from ..evaluation.protocol import Baseline, Run
    from ..evaluation.store import Store

# The scores on the figure's axes, by name: the first one that was computed is used.
SUBJECT_SCORES = ("subject", "dinov2")
PROMPT_SCORES = ("prompt", "siglip", "clip")

EXAMPLE = (
    "dti evaluate data/dreambooth.json --instances dog cat --model stabilityai/stable-diffusion-xl-base-1.0"
    " --runs out/dti out/ti out/ti@mean --output_dir out/evaluation"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `dti evaluate`."""
    parser.add_argument("data", type=Path, help="JSON file of subjects, or folder of DreamBench++, that `dti train` was given")
    parser.add_argument(
        "--runs",
        nargs="+",
        default=[],
        metavar="RUN",
        help='output folders of `dti train`; "out/ti@mean" rescales the concepts of out/ti to the mean norm of the vocabulary',
    )
    parser.add_argument(
        "--baselines",
        nargs="+",
        choices=["class", "initialization", "description"],
        default=[],
        help="fields of the subjects whose words take the place of a learned concept, in the same tables: class or "
        "initialization, the word that training starts from, which a run must surpass, and description, what the subject looks "
        "like; by default none",
    )
    arguments.add_model(parser)
    parser.add_argument("--instances", nargs="+", metavar="NAME", help="subjects to evaluate, by default all in the file")
    parser.add_argument(
        "--prompt_file",
        type=Path,
        help="DreamBooth's prompts_and_classes.txt, or a text file of prompts with {} for the subject; by default the built-in "
        "prompts, 41 each for objects, living subjects and styles",
    )
    parser.add_argument(
        "--learnable_property",
        choices=["object", "style"],
        default="object",
        help="what the subjects are for which the file does not say it, as in `dti train`; this chooses the built-in prompts; "
        "by default object",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=["dinov2", "siglip"],
        metavar="METRIC",
        help="dinov2, siglip or clip, also with another model as dinov2=MODEL, or FILE.py:FUNCTION, which is called as "
        "function(images, texts, subject) and returns {score: [a number for each image]}, see docs/command_line.md; by default "
        "dinov2 siglip",
    )
    parser.add_argument(
        "--mask_folder",
        type=Path,
        help="folder with masks of the photos, <subject>/<photo>.png, white where the subject is; by default no masks",
    )
    parser.add_argument(
        "--held_out",
        action="store_true",
        help='compare the images with the photos in the field "held_out" of each subject, which training has not seen; by '
        "default with those that it was trained on",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for images, scores, tables and the figure")
    parser.add_argument("--skip_generation", action="store_true", help="only score the images that exist already")
    arguments.add_generation(parser, seeds=[0, 1, 2, 3])


def run(args: argparse.Namespace) -> int:
    """Generate and score what has not been generated and scored yet, and write the results."""
    from ..data.photo_record import check_held_out
    from ..data.subjects import read_subjects
    from ..evaluation import protocol, summary
    from ..evaluation.progress import progress_bar
    from .open_pipeline import open_pipeline, pipeline_identity

    subjects = read_subjects(args.data, args.instances, args.mask_folder, args.learnable_property)
    if args.held_out:
        subjects = [subject.with_held_out_photos() for subject in subjects]
    runs = _find_runs(args.runs, args.baselines)
    metrics = _open_metrics(args)
    plan = _plan(args, runs, subjects)
    for run, subject in plan if args.held_out else ():
        if isinstance(run, protocol.Run):
            check_held_out(run.folder_of(subject), subject.files)
    total = sum(map(len, plan.values()))
    if not args.skip_generation:
        for run, subject in plan:
            if isinstance(run, protocol.Run):
                run.folder_of(subject)  # raises if the concept is missing, before anything is generated
        pipe, model, call = open_pipeline(args), pipeline_identity(args), dict(args.call)
        with progress_bar(total, "Generating") as bar:
            for (run, subject), images in plan.items():
                protocol.generate_subject(pipe, run, subject, images, model, args.batch_size, call, bar)
    records = []
    with progress_bar(total * len(metrics), "Scoring") as bar:
        for (run, subject), images in plan.items():
            records.extend(protocol.score(run, subject, images, metrics, bar))
    result = summary.summarize(records)
    _write_results(result, list(records[0]["scores"]), args.output_dir)
    return 0


def _find_runs(texts: list[str], baselines: list[str]) -> list["Run | Baseline"]:
    """Parse `--runs` and `--baselines`.

    Raises:
        ValueError: if there are none, or two of them have the same name.
    """
    from ..evaluation.protocol import Baseline, Run

    runs: list[Run | Baseline] = [Run(*parse_run(text)) for text in texts]
    runs += [Baseline(name) for name in dict.fromkeys(baselines)]
    if not runs:
        raise ValueError("There is nothing to evaluate: give --runs, --baselines or both.")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"Two of the runs have the same name ({', '.join(names)}): rename a folder.")
    return runs


def parse_run(text: str) -> tuple[str, Path, str | float | None]:
    """Parse a run.

    Args:
        text: a folder, "out/ti", or a folder and a scale, "out/ti@mean" or "out/ti@0.4".

    Returns:
        Its name, its folder, and the scale at which its concepts are loaded, None for the stored one.
    """
    folder, _, ending = text.rpartition("@")
    scale = arguments.scale(ending)
    if not folder or not (isinstance(scale, float) or scale in ("mean", "min", "max")):
        return Path(text).resolve().name, Path(text), None
    return f"{Path(folder).resolve().name}@{ending}", Path(folder), scale


def _open_metrics(args: argparse.Namespace) -> dict[str, tuple["Metric", "Store"]]:
    """Return each metric with the store of its scores, which depend on its code and its model's files."""
    from ..evaluation import metrics
    from ..evaluation.store import Store

    found = {}
    for spec in dict.fromkeys(args.metrics):
        file, model = Path(spec.rpartition(":")[0]), Path(spec.partition("=")[2])
        code = [Path(metrics.__file__)]
        if file.suffix == ".py":  # a user's function may import the files next to its own
            code = sorted(file.parent.glob("*.py"))
        if model.name and model.is_dir():
            code += [path for path in sorted(model.iterdir()) if path.is_file()]
        found[spec] = metrics.get_metric(spec, args.device), Store(args.output_dir / "scores.jsonl", code)
    return found


def _plan(
    args: argparse.Namespace, runs: list["Run | Baseline"], subjects: list["Subject"]
) -> dict[tuple["Run | Baseline", "Subject"], list["PlannedImage"]]:
    """List the images of each run and subject."""
    from ..evaluation import protocol
    from ..evaluation.prompts import read_prompts

    given = read_prompts(args.prompt_file) if args.prompt_file else None
    seeds = list(dict.fromkeys(args.seeds))
    plan = {}
    for run in runs:
        for subject in subjects:
            prompts = list(dict.fromkeys(protocol.prompts_of(subject, given)))
            plan[run, subject] = protocol.plan_images(run, subject, prompts, seeds, args.output_dir / "pictures")
    return plan


def _write_results(result: dict[str, Any], scores: list[str], folder: Path) -> None:
    """Write results.json and results.md, print the table, and plot results.png if both kinds of scores were computed."""
    from ..evaluation import summary

    (folder / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table = summary.markdown(result)
    (folder / "results.md").write_text(table, encoding="utf-8")
    print(table)
    x = next((name for name in PROMPT_SCORES if name in scores), None)
    y = next((name for name in SUBJECT_SCORES if name in scores), None)
    if x and y:
        try:
            summary.figure(result, x, y, folder / "results.png")
        except ImportError as error:  # everything else is written
            print(f"dti evaluate: no figure. {error}", file=sys.stderr)
    print(f"See {folder}.")
