"""The tab that says what a concept's files hold, and how it compares with the words of a model's vocabulary."""

import html
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..concept.inversion import DirectionalInversion
from ..pipeline.inspection import figure, inspect, table
from .page import Studio, errors_shown


def build(studio: Studio, tab: gr.Tab) -> None:
    """Build the tab.

    Args:
        studio: what the page works on.
        tab: the tab, on whose opening the concepts at hand are listed anew.
    """
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            model = studio.model_choice("inspect-model")
            concept = studio.concept_choice("Concept", "inspect-concept")
            show = gr.Button("Inspect", variant="primary", elem_id="inspect")
        with gr.Column(scale=3, min_width=320):
            verdict = gr.Markdown(elem_id="verdict")
            plot = gr.Image(
                label="Norms of the vocabulary and of the concept, and the nearest words", show_label=False, interactive=False,
                format="png", buttons=[], elem_id="plot",
            )  # fmt: skip
            details = gr.Code(
                label="Details", language=None, interactive=False, elem_id="details", wrap_lines=True, show_line_numbers=False
            )

    @errors_shown
    def look(model: str, source: str | None) -> Any:
        if not source:
            raise ValueError("Choose a concept.")
        one = DirectionalInversion.from_pretrained(source)
        with studio.models.opened(model or "", text_only=True) as pipe:
            report = inspect(one, pipe)
        lines = [f"- **{component}**: {html.escape(found['verdict'])}" for component, found in report["encoders"].items()]
        with tempfile.TemporaryDirectory(prefix="dti-") as folder:
            figure(report, file := Path(folder) / "figure.png")
            with Image.open(file) as image:
                drawn = image.convert("RGB")
        return "\n".join(lines), drawn, table(report)

    own: dict[str, Any] = {"api_visibility": "private"}
    tab.select(lambda: gr.Dropdown(choices=studio.shelf.choices()), None, concept, show_progress="hidden", **own)
    show.click(look, [model, concept], [verdict, plot, details], concurrency_limit=1, concurrency_id="pipeline", **own)
