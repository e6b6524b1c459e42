"""The options that say which pipeline, and opening it."""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--model` and what goes with it."""
    parser.add_argument("--model", required=True, help="the pipeline: a Hub id or a folder")
    parser.add_argument("--revision", help="of the model on the Hub")
    parser.add_argument("--variant", help='of the model\'s files, such as "fp16"')
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="by default bfloat16 on a GPU and float32 without one"
    )
    parser.add_argument("--device", help='such as "cuda:1"; by default the first GPU, or the one that accelerate gives')


def open_pipeline(args: argparse.Namespace) -> Any:
    """The pipeline, on its device."""
    import torch
    from diffusers import DiffusionPipeline

    from diffusers_dti.processes import processes  # with the package, which gives pipelines their methods

    device = torch.device(args.device) if args.device else processes().device
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    options = {k: v for k in ("revision", "variant") if (v := getattr(args, k)) is not None}
    return DiffusionPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, dtype), **options).to(device)


def told_apart(args: argparse.Namespace) -> dict[str, Any]:
    """What pictures of one pipeline are told from another's by."""
    return {name: getattr(args, name) for name in ("model", "revision", "variant", "dtype")}


def scale(text: str) -> str | float:
    """A `token_scale`: a rule's name, or a number."""
    try:
        return float(text)
    except ValueError:
        return text
