"""Open the pipeline that the options of `arguments.add_model` describe."""

import argparse
from typing import Any, Literal

import diffusers
import torch
from packaging.version import Version

from ..pipeline.protocols import Pipeline
from ..training.distributed import processes

# diffusers renamed the argument: from 0.40 on `torch_dtype` is deprecated, and before 0.40 `dtype` is ignored.
DTYPE_ARGUMENT = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"
Offload = Literal["none", "model", "sequential"]
TEXT_COMPONENTS = ("tokenizer", "text_encoder", "scheduler")


def open_pipeline(args: argparse.Namespace, text_only: bool = False, offload: Offload = "none") -> Pipeline:
    """Open the pipeline on its device.

    Args:
        args: the options of `add_model`.
        text_only: load only tokenizers, text encoders and the scheduler, and download nothing else.
        offload: "model" or "sequential" to keep the weights on the CPU, and move them to the device when they are needed.

    Raises:
        ValueError: if the device cannot be used, or is the CPU and weights are to be offloaded.
        OSError: if there is no such model.
    """
    device = _device(args.device) if args.device else processes().device
    if offload != "none" and device.type == "cpu":
        raise ValueError(f"--offload {offload} keeps weights off a GPU, and the model is opened on the CPU: leave it out.")
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    options: dict[str, Any] = {DTYPE_ARGUMENT: getattr(torch, dtype)}
    if args.revision is not None:
        options["revision"] = args.revision
    if args.variant is not None:
        options["variant"] = args.variant
    pipeline_class = diffusers.DiffusionPipeline
    if text_only:
        config = pipeline_class.load_config(args.model, **({"revision": args.revision} if args.revision is not None else {}))
        options |= dict.fromkeys(_other_components(config))
        # The base class does not know which components are optional (Wan's transformers), and would load them regardless.
        pipeline_class = getattr(diffusers, str(config["_class_name"]), pipeline_class)
    pipe: Pipeline = pipeline_class.from_pretrained(args.model, **options)
    if offload == "none":
        return pipe.to(device)
    getattr(pipe, f"enable_{offload}_cpu_offload")(device=device)
    return pipe


def set_scheduler(pipe: Pipeline, name: str) -> None:
    """Give a pipeline another scheduler, with the settings of its own.

    Args:
        pipe: the pipeline.
        name: a class of diffusers, such as "EulerDiscreteScheduler".

    Raises:
        ValueError: if the pipeline's scheduler is not compatible with a scheduler of that name.
    """
    compatible = {scheduler.__name__: scheduler for scheduler in pipe.scheduler.compatibles}
    if name not in compatible:
        own = type(pipe.scheduler).__name__
        raise ValueError(f"--scheduler {name} is not compatible with {own}. Choose from {', '.join(sorted(compatible))}.")
    pipe.scheduler = compatible[name].from_config(pipe.scheduler.config)


def _device(name: str) -> torch.device:
    """Return a device by its name, checked before a model is downloaded for it."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for the device
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from error


def _other_components(config: dict[str, Any]) -> list[str]:
    """Return the components in a pipeline's `model_index.json` that have nothing to do with text."""
    found = []
    for name, value in config.items():
        is_component = isinstance(value, list | tuple) and not name.startswith("_")
        if is_component and not name.startswith(TEXT_COMPONENTS):
            found.append(name)
    return found


def pipeline_identity(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that decide what a pipeline generates, as JSON values: images of another pipeline are not reused."""
    return {"model": args.model, "revision": args.revision, "variant": args.variant, "dtype": args.dtype}
