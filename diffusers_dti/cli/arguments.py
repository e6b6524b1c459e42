"""Options that several verbs share, and the types of their values."""

import argparse
import contextlib
from typing import Any

from ..parsing import parse_json

DTYPES = ("float32", "bfloat16", "float16")


def add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add `--model` and the options that say how to open it."""
    parser.add_argument("--model", required=required, help="Hub id or folder of the pipeline")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub, by default the main branch")
    parser.add_argument("--variant", help='variant of the model\'s files, such as "fp16"; by default the plain files')
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the model, by default bfloat16 on a GPU and float32 on the CPU"
    )
    parser.add_argument(
        "--device", help='device of the model, such as "cuda:1"; by default the first GPU, or the one that accelerate assigns'
    )


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add the concept to read, in the format of any program."""
    parser.add_argument("source", help="Hub id, folder or file of the concept, in the format of any supported program")
    parser.add_argument(
        "--placeholder",
        help="word that stands for the concept in prompts, and selects it in a file of several; by default the file's own",
    )
    parser.add_argument("--weight_name", help="name of the file to read, by default learned_embeds*.safetensors")
    parser.add_argument("--subfolder", help="folder of the concept within the source, by default the source itself")
    parser.add_argument(
        "--allow_pickle",
        action="store_true",
        help="also read .pt and .bin files: only their tensors are loaded, code in them is never run",
    )


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_source` as arguments of `DirectionalInversion.from_pretrained`."""
    return {
        "placeholder_token": args.placeholder,
        "weight_name": args.weight_name,
        "subfolder": args.subfolder,
        "allow_pickle": args.allow_pickle,
    }


def add_generation(parser: argparse.ArgumentParser, seeds: list[int]) -> None:
    """Add the options that say how images are generated, with the verb's default `seeds`."""
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=seed,
        default=seeds,
        metavar="SEED",
        help=f"seeds, one image of each prompt for each of them; by default {' '.join(map(str, seeds))}",
    )
    parser.add_argument("--batch_size", type=count, default=4, help="number of images generated at once, by default 4")
    parser.add_argument(
        "--call",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        type=setting,
        help="arguments of the pipeline's call, such as num_inference_steps=30 guidance_scale=5; by default the pipeline's own",
    )


def scale(text: str) -> str | float:
    """Parse a `token_scale`: a number, or else the name of a rule."""
    try:
        return float(text)
    except ValueError:
        return text


def count(text: str) -> int:
    """Parse a number of at least 1.

    Raises:
        argparse.ArgumentTypeError: if it is anything else.
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def seed(text: str) -> int:
    """Parse a seed, which torch keeps in 64 bits.

    Raises:
        argparse.ArgumentTypeError: if it is anything else.
    """
    with contextlib.suppress(ValueError):
        if -(2**63) <= int(text) < 2**63:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 64 bits, from -2**63 to 2**63 - 1")


def setting(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE, where the value is JSON, or else plain text.

    Raises:
        argparse.ArgumentTypeError: if there is no equals sign.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, parse_json(value)
    except ValueError:
        return name, value
