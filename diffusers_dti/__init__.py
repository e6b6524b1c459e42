"""Directional Textual Inversion for diffusers: importing this package gives every pipeline `load_directional_inversion`.

Where things live:

- `concept/`: what is learned, and how it travels: files, the Hub, other programs' formats. Knows no pipeline.
- `pipeline/`: a concept in a pipeline: loading, unloading, inspecting.
- `families/`: what differs between architectures, one class each.
- `data/`: photos and lists of subjects.
- `training/`: from photos to a concept: `DTITrainer` and its settings.
- `evaluation/`: the paper's protocol.
- `cli/`: the command `dti`, one file for each verb.
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline

from .concept.inversion import DirectionalInversion
from .pipeline import ModularPipeline
from .pipeline.loading import load_directional_inversion, save_directional_inversion, unload_directional_inversion
from .pipeline.locks import hold_directional_inversions
from .pipeline.mixin import DirectionalTextualInversionMixin
from .pipeline.registration import register
from .sphere import slerp

if TYPE_CHECKING:
    from .training.config import DTIConfig
    from .training.optim import RiemannianSGD
    from .training.trainer import DTITrainer

__version__ = _version("diffusers-dti")

__all__ = [
    "DTIConfig",
    "DTITrainer",
    "DirectionalInversion",
    "DirectionalTextualInversionMixin",
    "RiemannianSGD",
    "hold_directional_inversions",
    "load_directional_inversion",
    "register",
    "save_directional_inversion",
    "slerp",
    "unload_directional_inversion",
]

# Registration is never lazy: after the import, every pipeline has the methods. Training is: loading does not wait for it.
for _pipeline_class in (DiffusionPipeline, ModularPipeline):
    register(_pipeline_class)

_LAZY = {"DTIConfig": "training.config", "DTITrainer": "training.trainer", "RiemannianSGD": "training.optim"}


if not TYPE_CHECKING:  # a type checker would take any name, misspelled ones too, to be in a module with `__getattr__`

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(_import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
