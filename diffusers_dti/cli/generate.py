"""`dti generate`: prompts with learned words, from one or more seeds, and a contact sheet."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from . import models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Concepts, prompts, seeds."""
    models.add_arguments(parser)
    parser.add_argument(
        "--concepts", nargs="+", required=True, metavar="CONCEPT",
        help="of learned words: folders or Hub ids, whose adapters are loaded with them, or files",
    )  # fmt: skip
    parser.add_argument(
        "--token_scale", type=models.scale, help='bring their norms to the vocabulary\'s "mean", "min" or "max", or to a number'
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--prompts", nargs="+", metavar="PROMPT", help='such as "a <dog> on the beach"; {} stands for the word of one concept'
    )
    which.add_argument("--prompt_file", type=Path, help="a text file with a prompt on each line, # before comments")
    parser.add_argument("--output_dir", type=Path, required=True, help="pictures come as <seed>/<number>_<words>.png")
    add_drawing(parser, seeds=[0])


def add_drawing(parser: argparse.ArgumentParser, seeds: list[int]) -> None:
    """What `dti evaluate` has as well."""
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds, help=f"by default {' '.join(map(str, seeds))}")
    parser.add_argument("--batch_size", type=count, default=4, help="pictures drawn at once, by default 4")
    parser.add_argument(
        "--call", nargs="+", action="extend", default=[], metavar="NAME=VALUE", type=_setting,
        help="arguments of the pipeline's call: num_inference_steps=30 guidance_scale=5 height=1024",
    )  # fmt: skip


def count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


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
    from ..evaluation.generation import PlannedImage, concepts_loaded, contact_sheet, generate_missing

    lines = args.prompts or args.prompt_file.read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise ValueError("There are no prompts: give some, or a file with one on each line.")
    pipe = models.open_pipeline(args)
    with concepts_loaded(pipe, args.concepts, args.token_scale) as digest:
        words = list(pipe.directional_inversions)
        if len(words) > 1 and any("{}" in p for p in prompts):
            raise ValueError(f"Which of {', '.join(words)} does {{}} stand for? Write it out.")
        prompts = [p.replace("{}", words[0]) for p in prompts]
        if without := [p for p in prompts if not any(word in p for word in words)]:
            print(f"dti generate: {without[0]!r} has none of {', '.join(words)} in it.", file=sys.stderr)
        seeds = dict.fromkeys(args.seeds)
        pictures = [PlannedImage.named(args.output_dir, i, p, p, seed) for seed in seeds for i, p in enumerate(prompts)]
        origin = {"concepts": digest, "model": models.pipeline_identity(args)}
        generate_missing(pipe, pictures, origin, args.batch_size, dict(args.call))
    sheet = args.output_dir / "sheet.png"
    contact_sheet(pictures).save(sheet)
    print(f"See {sheet}.")
    return 0
