"""Open the pipeline that the options of `arguments.add_model` describe."""

import argparse
from typing import Any

import torch

from ..pipeline import opening
from ..pipeline.opening import Offload
from ..pipeline.protocols import Pipeline
from ..training.distributed import processes


def open_pipeline(args: argparse.Namespace, text_only: bool = False, offload: Offload = "none") -> Pipeline:
    """Open the pipeline on its device.

    Args:
        args: the options of `add_model`.
        text_only, offload: see `opening.open_pipeline`.

    Raises:
        ValueError: if the device cannot be used, or is the CPU and weights are to be offloaded.
        OSError: if there is no such model.
    """
    device = check_device(args.device) if args.device else processes().device
    if offload != "none" and device.type == "cpu":
        raise ValueError(f"--offload {offload} keeps weights off a GPU, and the model is opened on the CPU: leave it out.")
    return opening.open_pipeline(
        args.model, device, args.dtype, revision=args.revision, variant=args.variant, text_only=text_only, offload=offload
    )


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


def check_device(name: str) -> torch.device:
    """Return a device by its name, checked before a model is downloaded for it."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for the device
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from error


def pipeline_identity(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that decide what a pipeline generates, as JSON values: images of another pipeline are not reused."""
    return {"model": args.model, "revision": args.revision, "variant": args.variant, "dtype": args.dtype}
