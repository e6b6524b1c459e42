"""What the tabs of the page share."""

import functools
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import gradio as gr
from PIL import Image

from .models import Models
from .runner import Runner
from .shelf import Shelf

P = ParamSpec("P")
R = TypeVar("R")
ENLARGED = 256  # pixels; smaller images are enlarged by a whole number, so that their pixels can be seen


@dataclass(frozen=True)
class Studio:
    """What the page works on.

    Args:
        runner: the queue of training jobs.
        models: the pipeline that the page keeps open.
        shelf: the concepts at hand.
        resolutions: the models to offer, each with its resolution of training, or None for that of its family.
    """

    runner: Runner
    models: Models
    shelf: Shelf
    resolutions: Mapping[str, int | None] = field(default_factory=dict)

    def model_choice(self, elem_id: str) -> gr.Dropdown:
        """Return a field to choose a model, or to name any other one."""
        names = list(self.resolutions)
        return gr.Dropdown(
            [(Path(name).name if Path(name).exists() else name, name) for name in names],
            value=names[0] if names else None,
            label="Model",
            info="Hub id or folder of a pipeline",
            allow_custom_value=True,
            elem_id=elem_id,
        )

    def concept_choice(self, label: str, elem_id: str, multiselect: bool = False) -> gr.Dropdown:
        """Return a field to choose a concept at hand, or to name one on the Hub."""
        return gr.Dropdown(
            self.shelf.choices(),
            value=[] if multiselect else None,
            label=label,
            info="learned or kept here, or the Hub id of another one",
            allow_custom_value=True,
            multiselect=multiselect,
            elem_id=elem_id,
        )


def errors_shown(function: Callable[P, R]) -> Callable[P, R]:
    """Show the messages of errors that say what helps. Others are Gradio's to report."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            raise gr.Error(html.escape(str(error), quote=False), duration=None, print_exception=False) from error

    return call


def enlarged(image: Image.Image | Path) -> Image.Image:
    """Return an image, enlarged by a whole number if it is tiny."""
    if isinstance(image, Path):
        with Image.open(image) as opened:
            return enlarged(opened.convert("RGB"))
    scale = -(-ENLARGED // image.width)
    return image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST) if scale > 1 else image


def gallery(label: str, elem_id: str, columns: int) -> gr.Gallery:
    """Return a gallery of results."""
    return gr.Gallery(
        label=label, elem_id=elem_id, columns=columns, object_fit="contain", height="auto", interactive=False, format="png",
        buttons=["download", "fullscreen"],
    )  # fmt: skip


def chosen(values: Sequence[Any] | None) -> list[Any]:
    """Return what was chosen of several, which is None at first."""
    return list(values or [])
