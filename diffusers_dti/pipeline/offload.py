"""Working on modules that offloading has spread over devices, and giving them back as they were."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from torch import nn


@contextmanager
def weights_at_hand(encoder: nn.Module) -> Iterator[None]:
    """The encoder's own tensors, where sequential offload has put placeholders on the meta device in their stead.

    Model offload needs nothing: it moves the module as a whole, new rows included.
    """
    # the outermost hook knows no device: those inside do the work
    hooks = [h for m in encoder.modules() for h in module_hooks(m) if isinstance(h, AlignDevicesHook) and h.offload]
    if hooks:
        remove_hook_from_module(encoder, recurse=True)
    try:
        yield
    finally:
        if hooks:
            cpu_offload(encoder, hooks[0].execution_device, offload_buffers=hooks[0].offload_buffers)
        _maybe_remove_and_reapply_group_offloading(encoder)


def module_hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return list(hook.hooks) if isinstance(hook, SequentialHook) else [hook]


@contextmanager
def frozen(pipe: Any) -> Iterator[None]:
    """All of a pipeline's modules in eval mode and without gradients, offloading off; afterwards as before.

    Eval mode also keeps encoders' dropout off (the authors' `.train()` switches UMT5's on).
    """
    device = pipe.device
    model_offload, sequential_offload, group_offload = _func_optionally_disable_offloading(pipe)
    if group_offload:
        raise ValueError("Training under group offloading is not supported: build the pipeline without it.")
    # a pipeline that is called in training, for validation, would switch model offload on again for these
    all_hooks, pipe._all_hooks = getattr(pipe, "_all_hooks", []), []
    modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    training = {m: m.training for module in modules for m in module.modules()}
    gradients = {p: p.requires_grad for module in modules for p in module.parameters()}
    try:
        for module in modules:
            module.eval().requires_grad_(False)
        if model_offload or sequential_offload:
            pipe.to(pipe._offload_device)
        yield
    finally:
        for m, was in training.items():
            m.training = was
        for p, was in gradients.items():
            p.requires_grad_(was)
        pipe._all_hooks = all_hooks
        if model_offload:
            pipe.enable_model_cpu_offload(device=pipe._offload_device)
        elif sequential_offload:
            pipe.enable_sequential_cpu_offload(device=pipe._offload_device)
        elif pipe.device != device:
            pipe.to(device)


@contextmanager
def checkpointed(models: Iterable[Any], enabled: bool) -> Iterator[None]:
    """Denoisers with gradient checkpointing, if so wished: less memory for more time."""
    changed = [m for m in models if enabled and not m.is_gradient_checkpointing]
    for model in changed:
        model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for model in changed:
            model.disable_gradient_checkpointing()


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """A half precision module in float32 for a while: SDXL's VAE overflows in float16."""
    parameters = [(p, p.dtype) for p in module.parameters() if p.is_floating_point()]
    buffers = [
        (m, name, b.dtype) for m in module.modules() for name, b in m.named_buffers(recurse=False) if b.is_floating_point()
    ]
    nn.Module.to(module, torch.float32)  # diffusers' own `to` warns of what is meant here
    try:
        yield
    finally:
        for p, dtype in parameters:
            p.data = p.data.to(dtype)
        for m, name, dtype in buffers:  # `to` puts new ones in their place
            m._buffers[name] = m._buffers[name].to(dtype)
