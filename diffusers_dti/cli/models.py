"""The options that say which pipeline, and opening it."""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """`--model` and what goes with it."""
    parser.add_argument("--model", required=required, help="the pipeline: a Hub id or a folder")
    parser.add_argument("--revision", help="of the model on the Hub")
    parser.add_argument("--variant", help='of the model\'s files, such as "fp16"')
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="by default bfloat16 on a GPU and float32 without one"
    )
    parser.add_argument("--device", help='such as "cuda:1"; by default the first GPU, or the one that accelerate gives')


def add_source(parser: argparse.ArgumentParser) -> None:
    """A concept, of any program."""
    parser.add_argument("source", help="the learned word: a Hub id, folder or file, of any program")
    parser.add_argument("--placeholder", help="the word, instead of the source's, or which one of a file with several")
    parser.add_argument("--weight_name", help="the source's file, where it is not called learned_embeds")
    parser.add_argument("--subfolder", help="of the source")
    parser.add_argument(
        "--allow_pickle", action="store_true", help="read .pt and .bin files, for their tensors alone: their code is never run"
    )


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """The same as arguments of `DirectionalInversion.from_pretrained`."""
    names = ("weight_name", "subfolder", "allow_pickle")
    return {"placeholder_token": args.placeholder} | {name: getattr(args, name) for name in names}


def open_pipeline(args: argparse.Namespace, text_only: bool = False) -> Any:
    """The pipeline, on its device; with `text_only` tokenizers, text encoders and scheduler, and nothing else is fetched."""
    import diffusers
    import torch

    from ..training.distributed import processes

    device = torch.device(args.device) if args.device else processes().device
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    options = {k: v for k in ("revision", "variant") if (v := getattr(args, k)) is not None}
    kind = diffusers.DiffusionPipeline
    if text_only:
        config = kind.load_config(args.model, **{k: v for k, v in options.items() if k == "revision"})
        components = [name for name, value in config.items() if isinstance(value, list | tuple) and not name.startswith("_")]
        options |= {n: None for n in components if not n.startswith(("tokenizer", "text_encoder", "scheduler"))}
        # the base class does not know which components are optional (Wan's transformers), and would load those all the same
        kind = getattr(diffusers, str(config["_class_name"]), kind)
    return kind.from_pretrained(args.model, torch_dtype=getattr(torch, dtype), **options).to(device)


def pipeline_identity(args: argparse.Namespace) -> dict[str, Any]:
    """What pictures of one pipeline are told from another's by."""
    return {name: getattr(args, name) for name in ("model", "revision", "variant", "dtype")}


def scale(text: str) -> str | float:
    """A `token_scale`: a rule's name, or a number."""
    try:
        return float(text)
    except ValueError:
        return text
