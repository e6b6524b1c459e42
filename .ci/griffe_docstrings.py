"""Adapt the docstrings to the site, where they are Markdown."""

import inspect
import re
from typing import Any

import griffe

from diffusers_dti import DTIConfig


def escape(match: re.Match[str]) -> str:
    """Keep code, and escape any other "<": a placeholder would be taken for HTML."""
    return match[0] if match[0].startswith("`") else "&lt;"


class Docstrings(griffe.Extension):
    """Fill in the settings of `DTIConfig`, escape placeholders, and make a section of each example."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        # As in Python: the help of its settings is added when it is imported.
        config = pkg["training.config.DTIConfig"]
        config.docstring.value = inspect.getdoc(DTIConfig)
        for cls in (config, *config.mro()):
            for attribute in cls.attributes.values():
                if isinstance(attribute.value, griffe.ExprCall):  # setting(default, help, ...)
                    attribute.value = attribute.value.arguments[0]
        self.adapt(pkg)

    def adapt(self, of: griffe.Object) -> None:
        """Adapt the docstrings of an object and of all that is in it."""
        if of.docstring:
            text = re.sub(r"```.*?```|`[^`]*`|<(?=\w)", escape, of.docstring.value, flags=re.DOTALL)
            of.docstring.value = re.sub(r"^Example:\n\n", "Examples:\n", text, flags=re.MULTILINE)
        for member in of.members.values():
            if not member.is_alias:
                self.adapt(member)
