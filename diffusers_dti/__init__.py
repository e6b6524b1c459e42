"""Directional Textual Inversion for diffusers: importing this gives every pipeline `load_directional_inversion`."""

from importlib.metadata import version as _version

from diffusers import DiffusionPipeline, ModularPipeline

from .config import DTIConfig
from .inversion import DirectionalInversion
from .loading import (
    DirectionalTextualInversionMixin,
    load_directional_inversion,
    register,
    save_directional_inversion,
    unload_directional_inversion,
)
from .optim import RiemannianSGD
from .sphere import slerp
from .trainer import DTITrainer

__version__ = _version("diffusers-dti")

for _pipeline_class in (DiffusionPipeline, ModularPipeline):
    register(_pipeline_class)
