"""Reach the weights of offloaded models, and put everything back afterwards.

This is the only file that uses diffusers' private offloading functions.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from diffusers.hooks.group_offloading import (
    GroupOffloadingConfig,
    GroupOffloadingHook,
    GroupOffloadingType,
    _get_top_level_group_offload_hook,
    _maybe_remove_and_reapply_group_offloading,
)
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook
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

    Group offloading stays on. If the block fails, perhaps amid a forward pass, all of its weights are put back.
    """
    model_offload, sequential_offload, _ = _func_optionally_disable_offloading(pipe)
    # If the pipeline is called within the block, for validation, it would turn model offload on again for these hooks.
    all_hooks, pipe._all_hooks = getattr(pipe, "_all_hooks", []), []
    try:
        yield model_offload or sequential_offload
    except BaseException:
        for model in pipe.components.values():
            if isinstance(model, nn.Module):
                _maybe_remove_and_reapply_group_offloading(model)
                for module, hook in layerwise_casting(model):
                    hook.initialize_hook(module)
        raise
    finally:
        pipe._all_hooks = all_hooks
        if model_offload:
            pipe.enable_model_cpu_offload(device=pipe._offload_device)
        elif sequential_offload:
            pipe.enable_sequential_cpu_offload(device=pipe._offload_device)


@contextmanager
def moved(models: Iterable[Any], device: torch.device) -> Iterator[None]:
    """Have models on a device within the block, and afterwards where they were. Group offloading moves its models itself."""
    with ExitStack() as undo:
        for model in models:
            home = model.device
            if home != device and group_offload(model) is None:
                undo.callback(model.to, home)
                model.to(device)
        yield


def group_offload(model: nn.Module) -> GroupOffloadingConfig | None:
    """Return how diffusers offloads a model by groups of its layers, or None if it does not."""
    hook = _get_top_level_group_offload_hook(model)
    return None if hook is None else hook.config


def compute_device(model: Any) -> torch.device:
    """Return the device that a model computes on, also where group offloading keeps its weights elsewhere."""
    config = group_offload(model)
    return model.device if config is None else config.onload_device


@contextmanager
def group_offload_by_leaf(model: nn.Module) -> Iterator[None]:
    """Offload a model layer by layer within the block, if it is offloaded by groups at all.

    The layers of transformers' models are not at the top, where diffusers looks for blocks: by blocks, the model would be
    loaded as a whole, and only if it is called as a whole.
    """
    hook = _get_top_level_group_offload_hook(model)
    if hook is None or hook.config.offload_type == GroupOffloadingType.LEAF_LEVEL:
        yield
        return
    before = hook.config
    try:
        _offload_by_groups(model, replace(before, offload_type=GroupOffloadingType.LEAF_LEVEL))
        yield
    finally:
        _offload_by_groups(model, before)


def _offload_by_groups(model: nn.Module, config: GroupOffloadingConfig) -> None:
    """Change how a model is offloaded by groups."""
    _get_top_level_group_offload_hook(model).config = config  # where diffusers reads it
    _maybe_remove_and_reapply_group_offloading(model)


@contextmanager
def offload_suspended(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep group offloading and layerwise casting from moving the weights of a part of a model, within the block."""
    with ExitStack() as undo:
        for part in module.modules():
            for hook in _diffusers_hooks(part, GroupOffloadingHook):
                undo.callback(setattr, hook, "group", hook.group)
                hook.group = _NoGroup(device)
            for hook in _diffusers_hooks(part, LayerwiseCastingHook):
                undo.callback(setattr, hook, "storage_dtype", hook.storage_dtype)
                hook.storage_dtype = hook.compute_dtype
        yield


@dataclass(frozen=True)
class _NoGroup:
    """What a hook of group offloading reads of its group. No module is its leader, so that nothing is moved but the inputs."""

    onload_device: torch.device
    onload_leader: str = ""
    offload_leader: str = ""
    non_blocking: bool = False


def layerwise_casting(model: nn.Module) -> list[tuple[nn.Module, LayerwiseCastingHook]]:
    """Return the layers of a model that store their weights in another dtype than they compute in, with diffusers' hooks."""
    return [(module, hook) for module in model.modules() for hook in _diffusers_hooks(module, LayerwiseCastingHook)]


def _diffusers_hooks(module: nn.Module, kind: type) -> list[Any]:
    registry: Any = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else [hook for hook in registry.hooks.values() if isinstance(hook, kind)]
