"""Weights that have moved by the time of the backward pass: they are read again there, and not kept since the forward pass.

Around each forward pass, diffusers' group offloading and layerwise casting exchange the data of a model's parameters. Autograd
saves some of them as parameters, which are on another device or in another dtype by the backward pass, and some as views of the
data, which then stay in memory.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..pipeline.offload import group_offload, layerwise_casting, offload_suspended


def moves_weights(model: nn.Module) -> bool:
    """Return whether diffusers exchanges the data of a model's parameters around each forward pass."""
    return group_offload(model) is not None or bool(layerwise_casting(model))


@contextmanager
def weights_read_again(models: Iterable[nn.Module]) -> Iterator[None]:
    """Let gradients pass models whose weights move: forward passes in the block save where a weight is, in place of it.

    The backward pass fetches one weight at a time.
    """
    weights = {id(p): p for model in models if moves_weights(model) for p in model.parameters()}

    def pack(tensor: Tensor) -> Any:
        weight = weights.get(id(tensor), weights.get(id(tensor._base)))
        if weight is None:
            return tensor
        return weight, tensor.device, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        weight, device, dtype, *view = saved
        return fetch(weight.data, device, dtype).as_strided(*view)

    with saved_tensors_hooks(pack, unpack) if weights else ExitStack():
        yield


@contextmanager
def weights_in_place(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Give a part of a model whose weights move copies of its weights on the device, within the block.

    Gradient checkpointing runs such a part again. What autograd saves then are these copies, which are gone after the part's
    backward pass. Whole models are offloaded by hooks that are not called here, and with streams those of this part would also
    load the weights that come next in a forward pass.
    """
    dtypes = {id(part): hook.compute_dtype for part, hook in layerwise_casting(module)}
    with offload_suspended(module, device), ExitStack() as undo:
        for part in module.modules():
            dtype = dtypes.get(id(part))
            for own in (part._parameters, part._buffers):
                tensors: dict[str, Any] = own
                for name, tensor in tensors.items():
                    if tensor is not None and not tensor.requires_grad:
                        undo.callback(tensors.__setitem__, name, tensor)
                        tensors[name] = fetch(tensor.data, device, dtype or tensor.dtype)
        yield


def fetch(data: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a weight's data on a device and in a dtype."""
    return data.to(device, dtype, non_blocking=True)
