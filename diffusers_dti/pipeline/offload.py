"""Reach the weights of offloaded models, and put everything back afterwards.

This is the only file that uses diffusers' private offloading functions.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from torch import nn

from .protocols import Pipeline


@contextmanager
def offload_disabled(model: nn.Module) -> Iterator[None]:
    """Give access to a model's own tensors, where sequential offload has put placeholders on the meta device.

    Model offload needs nothing: it moves the model as a whole, new rows included.
    """
    # The outermost hook knows no device: the hooks inside do the work.
    hooks: list[AlignDevicesHook] = []
    for module in model.modules():
        hooks += [h for h in module_hooks(module) if isinstance(h, AlignDevicesHook) and h.offload]
    if hooks:
        remove_hook_from_module(model, recurse=True)
    try:
        yield
    finally:
        if hooks:
            cpu_offload(model, hooks[0].execution_device, offload_buffers=hooks[0].offload_buffers)
        _maybe_remove_and_reapply_group_offloading(model)


@contextmanager
def all_offload_disabled(models: Iterable[nn.Module]) -> Iterator[None]:
    """Give access to the tensors of several models."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(offload_disabled(model))
        yield


def module_hooks(module: nn.Module) -> list[Any]:
    """Return accelerate's hooks on a module, one by one."""
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None:
        return []
    return list(hook.hooks) if isinstance(hook, SequentialHook) else [hook]


@contextmanager
def pipeline_offload_disabled(pipe: Pipeline) -> Iterator[None]:
    """Turn a pipeline's offloading off within the block, with all models on the device that they compute on.

    Raises:
        ValueError: under group offloading, which cannot be turned off and on again.
    """
    device = pipe.device
    model_offload, sequential_offload, group_offload = _func_optionally_disable_offloading(pipe)
    if group_offload:
        raise ValueError("Training under group offloading is not supported: build the pipeline without it.")
    # If the pipeline is called within the block, for validation, it would turn model offload on again for these hooks.
    all_hooks, pipe._all_hooks = getattr(pipe, "_all_hooks", []), []
    try:
        if model_offload or sequential_offload:
            pipe.to(pipe._offload_device)
        yield
    finally:
        pipe._all_hooks = all_hooks
        if model_offload:
            pipe.enable_model_cpu_offload(device=pipe._offload_device)
        elif sequential_offload:
            pipe.enable_sequential_cpu_offload(device=pipe._offload_device)
        elif pipe.device != device:
            pipe.to(device)
