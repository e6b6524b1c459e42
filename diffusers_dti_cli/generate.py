"""`dti generate`: prompts with learned words, from one or more seeds, and a contact sheet."""

import argparse
import json
from pathlib import Path
from typing import Any

from . import models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Concepts, prompts, seeds."""
    models.add_arguments(parser)
    parser.add_argument(
        "--concepts", nargs="+", required=True, metavar="CONCEPT",
        help="folders or Hub ids of learned words, with adapters beside them if there are any",
    )  # fmt: skip
    parser.add_argument("--token_scale", help='bring their norms to the vocabulary\'s "mean", "min" or "max", or to a number')
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--prompts", nargs="+", metavar="PROMPT", help='such as "a <dog> on the beach"')
    which.add_argument("--prompt_file", type=Path, help="a text file with a prompt on each line")
    parser.add_argument("--output_dir", type=Path, required=True, help="pictures come as <seed>/<number>_<words>.png")
    add_drawing(parser, seeds=[0])


def add_drawing(parser: argparse.ArgumentParser, seeds: list[int]) -> None:
    """What `dti evaluate` has as well."""
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds, help=f"by default {' '.join(map(str, seeds))}")
    parser.add_argument("--batch_size", type=int, default=4, help="pictures drawn at once, by default 4")
    parser.add_argument(
        "--call", nargs="+", default=[], metavar="NAME=VALUE", type=_setting,
        help="arguments of the pipeline's call: num_inference_steps=30 guidance_scale=5 height=1024",
    )  # fmt: skip


def _setting(text: str) -> tuple[str, Any]:
    """A name with a JSON value, or with a text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def run(args: argparse.Namespace) -> int:
    """Draw what is not there yet, and the contact sheet."""
    from diffusers_dti.evaluation.protocol import loaded
    from diffusers_dti.pictures import Picture, contact_sheet, draw

    prompts = args.prompts or [line for line in args.prompt_file.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{args.prompt_file} has no prompts: write one on each line.")
    pictures = [Picture.named(args.output_dir, i, p, p, seed) for seed in args.seeds for i, p in enumerate(prompts)]
    pipe = models.open_pipeline(args)
    with loaded(pipe, args.concepts, args.token_scale) as origin:
        draw(pipe, pictures, origin, args.batch_size, dict(args.call))
    sheet = args.output_dir / "sheet.png"
    contact_sheet(pictures).save(sheet)
    print(f"See {sheet}.")
    return 0
