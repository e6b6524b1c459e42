"""The pipeline while it is trained, and exactly as before afterwards."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..families.base import Family
from ..pipeline.offload import moved, pipeline_offload_disabled
from ..pipeline.text_encoders import find_text_encoders


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
    kept = {id(m) for m in _passed_by_gradients(family)}
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
    """Have what gradients pass, text encoders and denoisers, on the device that the pipeline computes on."""
    with moved(_passed_by_gradients(family), family.device):
        yield


def _passed_by_gradients(family: Family) -> list[nn.Module]:
    return [*family.present_denoisers().values(), *(e.model for e in find_text_encoders(family.pipe).values())]


@contextmanager
def gradient_checkpointing(models: Iterable[Any], enabled: bool) -> Iterator[None]:
    """Run denoisers with gradient checkpointing if `enabled`: less memory for more time."""
    changed = [m for m in models if enabled and not m.is_gradient_checkpointing]
    for model in changed:
        model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for model in changed:
            model.disable_gradient_checkpointing()
