"""Reach the weights of offloaded models, and put everything back afterwards.

This is the only file that uses diffusers' private offloading functions.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
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

    Raises:
        ValueError: if the tensors are not in memory; nothing is changed then.
    """
    # The outermost hook knows no device: the hooks inside do the work.
    hooks: list[AlignDevicesHook] = []
    for module in model.modules():
        hooks += [h for h in module_hooks(module) if isinstance(h, AlignDevicesHook) and h.offload]
    _check_in_memory(model, hooks)
    if hooks:
        remove_hook_from_module(model, recurse=True)
    try:
        yield
    finally:
        if hooks:
            cpu_offload(model, hooks[0].execution_device, offload_buffers=hooks[0].offload_buffers)
        _maybe_remove_and_reapply_group_offloading(model)


def _check_in_memory(model: nn.Module, hooks: Sequence[AlignDevicesHook]) -> None:
    """Check that a model's tensors are somewhere in memory: a row cannot be added to a file, nor to nothing."""
    # An offloaded tensor that came from the meta device is on the disk, by `device_map`; `disk_offload` moves it there.
    on_disk = any(torch.device("meta") in hook.original_devices.values() or _is_on_disk(hook.weights_map) for hook in hooks)
    if on_disk or (not hooks and any(parameter.is_meta for parameter in model.parameters())):
        raise ValueError(
            f"The weights of {type(model).__name__} are {'on the disk' if on_disk else 'not loaded'}, and concepts need them "
            "in memory: load it without offloading to the disk (`device_map`), and offload by `enable_model_cpu_offload()`."
        )


def _is_on_disk(weights: Any) -> bool:
    return getattr(getattr(weights, "dataset", None), "save_folder", None) is not None


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
def pipeline_offload_disabled(pipe: Pipeline) -> Iterator[bool]:
    """Turn a pipeline's model or sequential offloading off within the block; yields whether it was on.

    Raises:
        ValueError: under group offloading, which cannot be turned off and on again.
    """
    model_offload, sequential_offload, group_offload = _func_optionally_disable_offloading(pipe)
    if group_offload:
        raise ValueError("Training under group offloading is not supported: build the pipeline without it.")
    # If the pipeline is called within the block, for validation, it would turn model offload on again for these hooks.
    all_hooks, pipe._all_hooks = getattr(pipe, "_all_hooks", []), []
    try:
        yield model_offload or sequential_offload
    finally:
        pipe._all_hooks = all_hooks
        if model_offload:
            pipe.enable_model_cpu_offload(device=pipe._offload_device)
        elif sequential_offload:
            pipe.enable_sequential_cpu_offload(device=pipe._offload_device)


@contextmanager
def moved(models: Iterable[Any], device: torch.device) -> Iterator[None]:
    """Have models on a device within the block, and afterwards where they were."""
    with ExitStack() as undo:
        for model in models:
            home = model.device
            if home != device:
                undo.callback(model.to, home)
                model.to(device)
        yield
