"""`dti convert`: a learned word from one program to another."""

import argparse
from pathlib import Path

from . import models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From where, for which program, to where."""
    models.add_source(parser)
    parser.add_argument("--to", required=True, choices=["diffusers", "comfyui", "a1111", "onetrainer"], help="which reads it")
    parser.add_argument(
        "--output", type=Path, required=True,
        help="a folder, or (not for diffusers) a file ending in .safetensors, whose name is then the word in ComfyUI and A1111",
    )  # fmt: skip
    parser.add_argument("--revision", help="of the source on the Hub")


def run(args: argparse.Namespace) -> int:
    """Write it, and say what was written."""
    from ..concept.convert import convert

    options = models.source_options(args)
    if args.revision is not None:
        options["revision"] = args.revision
    for path in convert(args.source, args.to, args.output, **options):
        print(f"Wrote {path}.")
    return 0
