"""Give `DTIConfig` on the site the docstring that it has in Python: its settings are filled in when it is imported."""

import inspect
from typing import Any

import griffe

from diffusers_dti import DTIConfig


class Settings(griffe.Extension):
    """Replace the docstring that is in the source."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        pkg["training.config.DTIConfig"].docstring.value = inspect.getdoc(DTIConfig)
