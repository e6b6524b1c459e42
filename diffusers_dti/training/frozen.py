"""The pipeline while it is trained, and exactly as before afterwards."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..pipeline.offload import pipeline_offload_disabled
from ..pipeline.protocols import Pipeline


@contextmanager
def frozen(pipe: Pipeline) -> Iterator[None]:
    """Put all of a pipeline's modules in eval mode and without gradients, with offloading off; then restore everything.

    Eval mode also keeps the encoders' dropout off (the authors' `.train()` turns UMT5's on).
    """
    modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    with pipeline_offload_disabled(pipe):
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
