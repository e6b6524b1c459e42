"""`dti convert`: rewrite a concept's files for another program."""

import argparse
from pathlib import Path

from ..concept.convert import convert, programs
from . import arguments

EXAMPLE = "dti convert out/dog --to comfyui --output out/dog.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `dti convert`."""
    arguments.add_source(parser)
    parser.add_argument("--to", required=True, choices=programs(), help="program that is to read the concept")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder to write to, or (except for diffusers) a file ending in .safetensors, whose name is then the concept's "
        "word in ComfyUI and A1111",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a file that this command did not write for the same placeholder; by default it is an error",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the source on the Hub, by default the main branch")


def run(args: argparse.Namespace) -> int:
    """Write the files, and list them."""
    options = arguments.source_options(args)
    if args.revision is not None:
        options["revision"] = args.revision
    for path in convert(args.source, args.to, args.output, overwrite=args.overwrite, **options):
        print(f"Wrote {path}.")
    return 0
