"""`dti evaluate`: the paper's protocol over runs of `dti train`."""

import argparse
import json
import sys
from pathlib import Path

from . import generate, models

SUBJECT_LIKE, TEXT_LIKE = ("subject", "dinov2"), ("prompt", "siglip", "clip")  # the figure's axes, by names of scores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Runs, subjects, prompts, metrics."""
    parser.add_argument("data", type=Path, help="the JSON file of subjects that `dti train` was given")
    parser.add_argument(
        "--runs", nargs="+", required=True, metavar="RUN",
        help='output folders of `dti train`; "out/ti@mean" brings the norms of out/ti to the vocabulary\'s mean',
    )  # fmt: skip
    models.add_arguments(parser)
    parser.add_argument("--instances", nargs="+", help="the subjects to evaluate, by default all of the file")
    parser.add_argument(
        "--prompt_file", type=Path,
        help="DreamBooth's prompts_and_classes.txt, or a text file of prompts with {} for the subject; by default 41 of our "
        "own for objects and 41 for living subjects",
    )  # fmt: skip
    parser.add_argument(
        "--metrics", nargs="+", default=["dinov2", "siglip"],
        help="dinov2, siglip, clip, each also as dinov2=MODEL, or FILE.py:FUNCTION; by default dinov2 and siglip",
    )  # fmt: skip
    parser.add_argument(
        "--mask_folder", type=Path, help="masks of the photos, <subject>/<photo>.png, white where the subject is"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="pictures, scores, tables and figure come here")
    parser.add_argument("--skip_generation", action="store_true", help="score the pictures that are there")
    generate.add_drawing(parser, seeds=[0, 1, 2, 3])


def run(args: argparse.Namespace) -> int:
    """Draw and score what has not been, and write the report."""
    from ..data.subjects import read_subjects
    from ..evaluation import metrics, protocol, summary
    from ..evaluation.prompts import read_prompts
    from ..evaluation.store import Store

    subjects = read_subjects(args.data, args.instances, args.mask_folder)
    runs = [protocol.Run(*_named(text)) for text in args.runs]
    if len({r.name for r in runs}) < len(runs):
        raise ValueError(f"Two of the runs have one name, of {', '.join(r.name for r in runs)}: rename a folder.")
    given = read_prompts(args.prompt_file) if args.prompt_file else None
    # each with what its scores depend on: the code, of a function of one's own also its neighbours', and a model's files
    found = {}
    for spec in dict.fromkeys(args.metrics):
        file, model = Path(spec.rpartition(":")[0]), Path(spec.partition("=")[2])
        code = sorted(file.parent.glob("*.py")) if file.suffix == ".py" else [Path(metrics.__file__)]
        code += [f for f in sorted(model.iterdir()) if f.is_file()] if model.name and model.is_dir() else []
        found[spec] = metrics.get_metric(spec, args.device), Store(args.output_dir / "scores.jsonl", code)
    plan = {}
    for r in runs:
        for s in subjects:
            if not args.skip_generation:
                r.folder_of(s)  # before anything is drawn
            prompts = dict.fromkeys(protocol.prompts_of(s, given))
            plan[r, s] = protocol.plan_images(
                r, s, list(prompts), list(dict.fromkeys(args.seeds)), args.output_dir / "pictures"
            )
    if not args.skip_generation:
        pipe = models.open_pipeline(args)
        for (r, s), pictures in plan.items():
            protocol.generate_subject(pipe, r, s, pictures, models.pipeline_identity(args), args.batch_size, dict(args.call))
    records = [record for (r, s), pictures in plan.items() for record in protocol.score(r, s, pictures, found)]
    result = summary.summarize(records)
    (args.output_dir / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table = summary.markdown(result)
    (args.output_dir / "results.md").write_text(table, encoding="utf-8")
    print(table)
    names = list(records[0]["scores"])
    x, y = (next((n for n in likely if n in names), None) for likely in (TEXT_LIKE, SUBJECT_LIKE))
    if x and y:
        try:
            summary.figure(result, x, y, args.output_dir / "results.png")
        except ImportError as error:  # all else is done
            print(f"dti evaluate: no figure. {error}", file=sys.stderr)
    print(f"See {args.output_dir}.")
    return 0


def _named(text: str) -> tuple[str, Path, str | float | None]:
    """Name, folder and scale of "out/ti" or "out/ti@mean"."""
    folder, _, scale = text.rpartition("@")
    if not folder or not (scale in ("mean", "min", "max") or isinstance(models.scale(scale), float)):
        return Path(text).resolve().name, Path(text), None
    return f"{Path(folder).resolve().name}@{scale}", Path(folder), models.scale(scale)
