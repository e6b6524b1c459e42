"""Gradients for training, whatever torch mode the caller is in; refused where a model cannot have them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..families.base import Family
from ..pipeline.offload import group_offload, layerwise_casting
from ..pipeline.text_encoders import TextEncoder, find_text_encoders


@contextmanager
def gradients_enabled(family: Family) -> Iterator[None]:
    """Compute gradients within the block, also under the caller's `torch.no_grad()` or `torch.inference_mode()`.

    Args:
        family: the family, bound to the pipeline.

    Raises:
        ValueError: if gradients cannot pass a denoiser or a text encoder.
    """
    for component, model in family.present_denoisers().items():
        _check(component, model)
    for component, encoder in find_text_encoders(family.pipe).items():
        _check(component, encoder.model)
        _check_table(encoder)
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _check(component: str, model: nn.Module) -> None:
    """Check that gradients can pass a model.

    Raises:
        ValueError: if they cannot, saying how to load the model instead.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            f"The weights of {component} were made under `torch.inference_mode()`, and gradients cannot pass them: load the "
            "pipeline outside of it."
        )
    processors = [getattr(module, "processor", None) for module in model.modules()]
    backends = {str(getattr(processor, "_attention_backend", "")).lower() for processor in processors}
    if any("sage" in backend for backend in backends):
        raise ValueError(
            f"The attention of {component} is SageAttention, which has no backward pass: call "
            f"`pipe.{component}.reset_attention_backend()` to train."
        )
    config = group_offload(model)
    if config is not None and config.offload_to_disk_path is not None:
        raise ValueError(
            f"The weights of {component} are offloaded to the disk, and the backward pass needs them in memory: call "
            "`enable_group_offload` without `offload_to_disk_path`."
        )


def _check_table(encoder: TextEncoder) -> None:
    """Check that an encoder's table is stored in the dtype that it is read in.

    Raises:
        ValueError: if it is stored in another one, which has no room for a row.
    """
    tables = encoder.embedding_modules()
    for module, hook in layerwise_casting(encoder.model):
        if module in tables:
            raise ValueError(
                f"{encoder.component} stores its table of embeddings in {hook.storage_dtype} (`enable_layerwise_casting`), "
                "which would round what is learned: leave the table out by `skip_modules_classes=(torch.nn.Embedding,)`."
            )
