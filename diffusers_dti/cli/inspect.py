"""`dti inspect`: show what a concept's files hold, and compare it with the words of a model's vocabulary."""

import argparse
import json
from pathlib import Path

from . import arguments

EXAMPLE = "dti inspect user/dti-cat --model stabilityai/stable-diffusion-xl-base-1.0 --output out/cat.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `dti inspect`."""
    arguments.add_source(parser)
    arguments.add_model(parser, required=False)
    parser.add_argument(
        "--nearest", type=arguments.count, default=5, help="number of nearest words to list for each vector, by default 5"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, help="image to plot norms and nearest words into (needs --model)")


def run(args: argparse.Namespace) -> int:
    """Read the concept, compare it with the model if one is given, and print the report."""
    from .. import DirectionalInversion
    from ..pipeline.inspection import figure, inspect, table
    from .open_pipeline import open_pipeline

    if args.output and not args.model:
        raise ValueError("--output plots the concept against a model's vocabulary: say with --model which one.")
    concept = DirectionalInversion.from_pretrained(args.source, **arguments.source_options(args))
    pipe = open_pipeline(args, text_only=True) if args.model else None
    report = inspect(concept, pipe, args.nearest)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(table(report), end="")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figure(report, args.output)
        if not args.json:
            print(f"See {args.output}.")
    return 0
