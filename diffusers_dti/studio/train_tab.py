"""The tab in which a concept is learned: the form on the left, the run on the right."""

import html
from collections.abc import Sequence
from typing import Any

import gradio as gr

from ..data.images import IMAGE_SUFFIXES
from ..training.defaults import STEPS
from ..training.token_settings import AUTO
from . import photos
from .page import Studio, chosen, errors_shown
from .run_view import RunView

PREVIEW_RESOLUTION = 512  # where only the model's family knows the resolution, and the model is not open yet
DRAWINGS = 4  # of the validation prompts, in a run


def build(studio: Studio, page: gr.Blocks) -> None:
    """Build the tab.

    Args:
        studio: what the page works on.
        page: the page, on whose load the newest run is shown.
    """
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            files = gr.File(
                label="Photos of the subject, 3 to 6",
                file_count="multiple",
                file_types=sorted([*IMAGE_SUFFIXES, photos.CAPTION]),
                elem_id="photos",
                height=140,
            )
            message = gr.Markdown(elem_id="photos-message", visible=False)
            crops = gr.Gallery(
                label="What training sees: crops outlined, masks pale", columns=3, height="auto", visible=False,
                elem_id="crops", interactive=False, buttons=[], object_fit="contain",
            )  # fmt: skip
            model = studio.model_choice("train-model")
            with gr.Row():
                placeholder = gr.Textbox(
                    "<concept>", label="Placeholder", info="the new word in prompts", elem_id="placeholder"
                )
                initializer = gr.Textbox(
                    label="Initializer", info="a word for what the photos show; empty: proposed", elem_id="initializer"
                )
            prompts = gr.Textbox(
                "a photo of a {}\na red {}",
                lines=2,
                label="Validation prompts",
                info="one on each line, with {} for the placeholder",
                elem_id="prompts",
            )
            with gr.Row():
                steps = gr.Number(STEPS, label="Steps", precision=0, minimum=1, elem_id="steps")
                first = next(iter(studio.resolutions.values()), None)
                resolution = gr.Number(
                    first, label="Resolution", info="empty: the model's own", precision=0, elem_id="resolution"
                )
            start = gr.Button("Start", variant="primary", elem_id="start")
        with gr.Column(scale=3, min_width=320):
            view = RunView(studio)

    @errors_shown
    def begin(
        uploads: Sequence[str] | None, model: str, word: str, initializer: str, prompts: str, steps: int, resolution: int | None
    ) -> Any:
        settings: dict[str, Any] = {
            "placeholder_token": word.strip() or None,
            "initializer_token": initializer.strip() or AUTO,
            "max_train_steps": steps,
            "validation_steps": max(1, -(-(steps or 0) // DRAWINGS)),
        }
        if settings["placeholder_token"] is None:
            raise ValueError("Choose a placeholder: the new word for the subject in prompts, such as <dog>.")
        if resolution:
            settings["resolution"] = resolution
        if lines := [line.strip() for line in prompts.splitlines() if line.strip()]:
            settings["validation_prompt"] = lines
        job = studio.runner.add(chosen(uploads), model or "", settings)
        return view.choose(job.name)

    def look(uploads: Sequence[str] | None, resolution: int | None, word: str) -> Any:
        if not uploads:
            return gr.Gallery(value=None, visible=False), gr.Markdown(visible=False)
        try:
            shown = photos.preview(uploads, resolution or PREVIEW_RESOLUTION, word.strip() or None)
        except (ValueError, OSError) as error:
            text = html.escape(str(error), quote=False)
            return gr.Gallery(value=None, visible=False), gr.Markdown(f"⚠ {text}", visible=True)
        return gr.Gallery(value=shown, visible=True), gr.Markdown(visible=False)

    def resolution_of(model: str) -> int | None:
        return studio.resolutions.get(model)

    own: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.on([files.change, resolution.change], look, [files, resolution, placeholder], [crops, message], **own)
    model.change(resolution_of, model, resolution, **own)
    fields = [files, model, placeholder, initializer, prompts, steps, resolution]
    started = start.click(begin, fields, view.runs, **own)
    view.listen(page, started)
