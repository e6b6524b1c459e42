"""`dti inspect`: what a file holds, and how it lies in a model's vocabulary."""

import argparse
import json
from pathlib import Path

from . import generate, models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The concept, the model, and how to tell."""
    models.add_source(parser)
    models.add_arguments(parser, required=False)
    parser.add_argument(
        "--nearest", type=generate.count, default=5, help="how many of the words nearest to each vector, by default 5"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, help="draw norms and nearest words into this picture (needs --model)")


def run(args: argparse.Namespace) -> int:
    """Read, compare, tell."""
    from .. import DirectionalInversion
    from ..pipeline.inspection import figure, inspect, table

    if args.output and not args.model:
        raise ValueError("--output draws the concept beside a vocabulary: say with --model whose.")
    concept = DirectionalInversion.from_pretrained(args.source, **models.source_options(args))
    pipe = models.open_pipeline(args, text_only=True) if args.model else None
    report = inspect(concept, pipe, args.nearest)
    print(json.dumps(report, indent=2) if args.json else table(report), end="\n" if args.json else "")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figure(report, args.output)
    return 0
