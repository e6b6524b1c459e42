"""The pipeline while it is trained, and exactly as before afterwards."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..families.base import Family
from ..pipeline.offload import group_offload_by_leaf, moved, pipeline_offload_disabled
from ..pipeline.text_encoders import find_text_encoders
from .config import DTIConfig
from .saved_weights import moves_weights, weights_in_place, weights_read_again


@contextmanager
def frozen(family: Family) -> Iterator[None]:
    """Put all of a pipeline's modules in eval mode and without gradients, with offloading off; then restore everything.

    Eval mode also keeps the encoders' dropout off (the authors' `.train()` turns UMT5's on). On the device is only what
    gradients pass, or with the pipeline offloaded nothing: see `at_work`, and `Family.encode_images` for the VAE.
    """
    _ = family.device  # read before the hooks that know it are gone
    modules = [m for m in family.pipe.components.values() if isinstance(m, nn.Module)]
    kept = {id(m) for m in passed_by_gradients(family)}
    with ExitStack() as stack:
        offloaded = stack.enter_context(pipeline_offload_disabled(family.pipe))
        idle = [m for m in modules if offloaded or id(m) not in kept]
        stack.enter_context(moved(idle, torch.device("cpu")))
        for encoder in find_text_encoders(family.pipe).values():
            stack.enter_context(group_offload_by_leaf(encoder.model))
        undo = ExitStack()  # goes on with the others if one is interrupted
        for module in modules:
            for m in module.modules():
                undo.callback(setattr, m, "training", m.training)
            for p in module.parameters():
                undo.callback(p.requires_grad_, p.requires_grad)
        try:
            try:
                for module in modules:
                    module.eval().requires_grad_(False)
                yield
            finally:
                undo.close()
        finally:
            undo.close()  # if Ctrl-C came just before


@contextmanager
def at_work(family: Family) -> Iterator[None]:
    """Have what gradients pass on the device that the pipeline computes on, or diffusers' offloading bring it there in time."""
    models = passed_by_gradients(family)
    with moved(models, family.device), weights_read_again(models):
        yield


def passed_by_gradients(family: Family) -> list[nn.Module]:
    """Return the models between the rows and the loss: denoisers and text encoders."""
    return [*family.present_denoisers().values(), *(e.model for e in find_text_encoders(family.pipe).values())]


@contextmanager
def gradient_checkpointing(family: Family, config: DTIConfig) -> Iterator[None]:
    """Run denoisers with gradient checkpointing if the settings say so: less memory for more time."""
    with ExitStack() as undo:
        for model in family.present_denoisers().values():
            was_on, moving = model.is_gradient_checkpointing, moves_weights(model)
            if was_on and moving:  # by a function that does not know of it
                functions = (getattr(m, "_gradient_checkpointing_func", None) for m in model.modules())
                undo.callback(model.enable_gradient_checkpointing, next(filter(None, functions)))
            elif config.gradient_checkpointing and not was_on:
                undo.callback(model.disable_gradient_checkpointing)
            else:
                continue
            device = family.device if moving else None
            model.enable_gradient_checkpointing(_checkpointing(config.gradient_checkpointing_interval, device))
        yield


def _checkpointing(interval: int, device: torch.device | None) -> Callable[..., Any]:
    """Return a function that runs a part of a denoiser, and runs it again for the backward pass.

    Args:
        interval: do this to every so many of the parts only, and just run the others.
        device: the device of weights that move.
    """
    numbers: dict[nn.Module, int] = {}

    def run(module: nn.Module, *args: Any) -> Any:
        if numbers.setdefault(module, len(numbers)) % interval:
            return module(*args)
        contexts = nullcontext(), nullcontext() if device is None else weights_in_place(module, device)
        return checkpoint(module, *args, use_reentrant=False, context_fn=lambda: contexts)

    return run
