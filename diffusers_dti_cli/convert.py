"""`dti convert`: a learned word from one program to another."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From where, for which program, to where."""
    parser.add_argument("source", help="a Hub id, folder or file, of any of these programs")
    parser.add_argument("--to", required=True, choices=["diffusers", "comfyui", "a1111", "onetrainer"], help="which reads it")
    parser.add_argument(
        "--output", type=Path, required=True,
        help="a folder, or (not for diffusers) a file ending in .safetensors, whose name is then the word in ComfyUI and A1111",
    )  # fmt: skip
    parser.add_argument("--placeholder", help="the word, instead of the source's, or which one of a file with several")
    parser.add_argument("--weight_name", help="the source's file, where it is not called learned_embeds")
    parser.add_argument("--revision", help="of the source on the Hub")
    parser.add_argument(
        "--allow_pickle", action="store_true", help="read .pt and .bin files, for their tensors alone: their code is never run"
    )


def run(args: argparse.Namespace) -> int:
    """Write it, and say what was written."""
    from diffusers_dti.convert import convert

    options = {"weight_name": args.weight_name, "allow_pickle": args.allow_pickle}
    if args.revision is not None:
        options["revision"] = args.revision
    for path in convert(args.source, args.to, args.output, args.placeholder, **options):
        print(f"Wrote {path}.")
    return 0
