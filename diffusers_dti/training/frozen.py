"""The pipeline while it is trained, and exactly as before afterwards."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..families.base import Family
from ..pipeline.offload import moved, pipeline_offload_disabled
from ..pipeline.text_encoders import find_text_encoders
from .saved_weights import moves_weights, weights_in_place, weights_read_again


@contextmanager
def frozen(family: Family) -> Iterator[None]:
    """Put all of a pipeline's modules in eval mode and without gradients, with offloading off; then restore everything.

    Eval mode also keeps the encoders' dropout off (the authors' `.train()` turns UMT5's on). On the device is only what
    gradients pass, or with the pipeline offloaded nothing: see `at_work`, and `Family.encode_images` for the VAE.
    """
    for name in ("device", "dtypes"):  # the pipeline may be elsewhere by now, or in another dtype
        vars(family).pop(name, None)
    assert family.device  # read before the hooks that know it are gone
    modules = [m for m in family.pipe.components.values() if isinstance(m, nn.Module)]
    kept = {id(m) for m in passed_by_gradients(family)}
    with ExitStack() as stack:
        offloaded = stack.enter_context(pipeline_offload_disabled(family.pipe))
        idle = [m for m in modules if offloaded or id(m) not in kept]
        stack.enter_context(moved(idle, torch.device("cpu")))
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
def gradient_checkpointing(family: Family, enabled: bool) -> Iterator[None]:
    """Run denoisers with gradient checkpointing if `enabled`: less memory for more time."""

    def checkpointed(module: nn.Module, *args: Any) -> Any:
        contexts = nullcontext(), weights_in_place(module, family.device)
        return checkpoint(module, *args, use_reentrant=False, context_fn=lambda: contexts)

    with ExitStack() as undo:
        for model in family.present_denoisers().values():
            was_on = model.is_gradient_checkpointing
            if was_on and moves_weights(model):  # by a function that does not know of it
                functions = (getattr(m, "_gradient_checkpointing_func", None) for m in model.modules())
                undo.callback(model.enable_gradient_checkpointing, next(filter(None, functions)))
            elif enabled and not was_on:
                undo.callback(model.disable_gradient_checkpointing)
            else:
                continue
            model.enable_gradient_checkpointing(checkpointed if moves_weights(model) else None)
        yield
