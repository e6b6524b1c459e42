"""Gradients for training, whatever torch mode the caller is in; refused where a model cannot have them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook
from torch import nn

from ..families.base import Family
from ..pipeline.text_encoders import find_text_encoders


@contextmanager
def gradients_enabled(family: Family) -> Iterator[None]:
    """Compute gradients within the block, also under the caller's `torch.no_grad()` or `torch.inference_mode()`.

    Args:
        family: the family, bound to the pipeline.

    Raises:
        ValueError: if gradients cannot pass a denoiser or a text encoder.
    """
    for component, model in family.present_denoisers().items():
        _check(component, model, bfloat16_passes=True)
    for component, encoder in find_text_encoders(family.pipe).items():
        _check(component, encoder.model, bfloat16_passes=False)
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _check(component: str, model: nn.Module, bfloat16_passes: bool) -> None:
    """Check that gradients can pass a model.

    Args:
        component: its name.
        model: the model.
        bfloat16_passes: whether they pass layers that are stored in float8 and compute in bfloat16.

    Raises:
        ValueError: if they cannot, saying how to load the model instead.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            f"The weights of {component} were made under `torch.inference_mode()`, and gradients cannot pass them: load the "
            "pipeline outside of it."
        )
    for module in model.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            if isinstance(hook, LayerwiseCastingHook) and not (bfloat16_passes and hook.compute_dtype == torch.bfloat16):
                raise ValueError(
                    f"{component} stores its weights in {hook.storage_dtype} and computes in {hook.compute_dtype} "
                    "(`enable_layerwise_casting`), and gradients do not pass such layers: load it without that to train, in "
                    "bfloat16 to save memory."
                )
