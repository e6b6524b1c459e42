"""`dti evaluate`: the paper's protocol over runs of `dti train`."""

import argparse
import json
import os
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
    from diffusers_dti.evaluation import metrics, protocol, summary
    from diffusers_dti.evaluation.prompts import read_prompts
    from diffusers_dti.store import Store
    from diffusers_dti.subjects import read_subjects

    subjects = read_subjects(args.data, args.instances, args.mask_folder)
    runs = [protocol.Run.parse(text) for text in args.runs]
    given = read_prompts(args.prompt_file) if args.prompt_file else None
    found = {spec: metrics.find(spec, args.device) for spec in args.metrics}
    own = [Path(spec.rpartition(":")[0]) for spec in args.metrics if spec.rpartition(":")[0].endswith(".py")]
    store = Store(args.output_dir / "scores.jsonl", [Path(metrics.__file__), *own])
    plan = {
        (r, s): protocol.planned(r, s, protocol.prompts_of(s, given), args.seeds, args.output_dir / "pictures")
        for r in runs
        for s in subjects
    }
    if not args.skip_generation:
        pipe = models.open_pipeline(args)
        for (r, s), pictures in plan.items():
            protocol.generate(pipe, r, s, pictures, args.batch_size, dict(args.call))
        del pipe  # the metrics' models take its place
    records = [record for (r, s), pictures in plan.items() for record in protocol.score(r, s, pictures, found, store)]
    result = summary.summarise(records)
    _write(args.output_dir / "results.json", json.dumps(result, indent=2) + "\n")
    table = summary.markdown(result)
    _write(args.output_dir / "results.md", table)
    print(table)
    names = list(records[0]["scores"])
    x, y = (next((n for n in likely if n in names), None) for likely in (TEXT_LIKE, SUBJECT_LIKE))
    if x and y:
        summary.figure(result, x, y, args.output_dir / "results.png")
    print(f"See {args.output_dir}.")
    return 0


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)
