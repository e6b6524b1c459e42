"""Open a pipeline by its name: on a device, in a dtype, whole or only what reads text."""

from typing import Any, Literal

import diffusers
import torch
from packaging.version import Version

from .protocols import Pipeline

# diffusers renamed the argument: from 0.40 on `torch_dtype` is deprecated, and before 0.40 `dtype` is ignored.
DTYPE_ARGUMENT = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"
Offload = Literal["none", "model", "sequential"]
TEXT_COMPONENTS = ("tokenizer", "text_encoder", "scheduler")


def open_pipeline(
    model: str,
    device: torch.device,
    dtype: str | None = None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    text_only: bool = False,
    offload: Offload = "none",
) -> Pipeline:
    """Open a pipeline on its device.

    Args:
        model: Hub id or folder of the pipeline.
        device: where it computes.
        dtype: the name of its dtype, by default bfloat16 on a GPU and float32 on the CPU.
        revision: branch, tag or commit of the model on the Hub.
        variant: variant of the model's files, such as "fp16".
        text_only: load only tokenizers, text encoders and the scheduler, and download nothing else.
        offload: "model" or "sequential" to keep the weights on the CPU, and move them to the device when they are needed.

    Raises:
        OSError: if there is no such model.
    """
    options: dict[str, Any] = {DTYPE_ARGUMENT: getattr(torch, dtype or ("float32" if device.type == "cpu" else "bfloat16"))}
    if revision is not None:
        options["revision"] = revision
    if variant is not None:
        options["variant"] = variant
    pipeline_class = diffusers.DiffusionPipeline
    if text_only:
        config = pipeline_class.load_config(model, **({"revision": revision} if revision is not None else {}))
        options |= dict.fromkeys(_other_components(config))
        # The base class does not know which components are optional (Wan's transformers), and would load them regardless.
        pipeline_class = getattr(diffusers, str(config["_class_name"]), pipeline_class)
    pipe: Pipeline = pipeline_class.from_pretrained(model, **options)
    if offload == "none":
        return pipe.to(device)
    getattr(pipe, f"enable_{offload}_cpu_offload")(device=device)
    return pipe


def _other_components(config: dict[str, Any]) -> list[str]:
    """Return the components in a pipeline's `model_index.json` that have nothing to do with text."""
    found = []
    for name, value in config.items():
        is_component = isinstance(value, list | tuple) and not name.startswith("_")
        if is_component and not name.startswith(TEXT_COMPONENTS):
            found.append(name)
    return found
