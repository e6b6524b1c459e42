"""The tab in which concepts are used: prompts with them, and the same seeds without them."""

from typing import Any

import gradio as gr

from .drawing import draw_pairs
from .page import Studio, chosen, enlarged, errors_shown, gallery


def build(studio: Studio, tab: gr.Tab) -> None:
    """Build the tab.

    Args:
        studio: what the page works on.
        tab: the tab, on whose opening the concepts at hand are listed anew.
    """
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            model = studio.model_choice("play-model")
            concepts = studio.concept_choice("Concepts", "play-concepts", multiselect=True)
            upload = gr.File(
                label="Add a concept from its files, of any program", file_count="multiple", file_types=[".safetensors"],
                elem_id="play-upload", height=120,
            )  # fmt: skip
            prompt = gr.Textbox(
                "a photo of a {}",
                label="Prompt",
                info="with the placeholders; {} stands for that of a single concept",
                elem_id="play-prompt",
            )
            with gr.Row():
                count = gr.Slider(1, 8, 2, step=1, label="Seeds", elem_id="play-count")
                seed = gr.Number(0, label="First seed", precision=0, elem_id="play-seed")
            draw = gr.Button("Generate", variant="primary", elem_id="play")
        with gr.Column(scale=3, min_width=320):
            images = gallery("With the concepts, and with their initializers' words", "play-images", 2)

    @errors_shown
    def play(
        model: str,
        sources: list[str] | None,
        prompt: str,
        count: int,
        seed: int | None,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Any:
        seeds, done = range(seed or 0, (seed or 0) + count), iter(range(1, 2 * count + 1))
        progress(0, "Opening the model")
        with studio.models.opened(model or "") as pipe:
            drawn = draw_pairs(
                pipe, chosen(sources), prompt, seeds, lambda: progress((next(done), 2 * count), "Generating", unit="images")
            )
        return [(enlarged(image), caption) for image, caption in drawn]

    @errors_shown
    def add(files: list[str] | None, sources: list[str] | None) -> Any:
        if not files:
            return gr.skip(), gr.skip()
        path = studio.shelf.upload(files)
        return gr.Dropdown(choices=studio.shelf.choices(), value=[*chosen(sources), str(path)]), None

    own: dict[str, Any] = {"api_visibility": "private"}
    tab.select(lambda: gr.Dropdown(choices=studio.shelf.choices()), None, concepts, show_progress="hidden", **own)
    upload.upload(add, [upload, concepts], [concepts, upload], show_progress="hidden", **own)
    draw.click(play, [model, concepts, prompt, count, seed], images, concurrency_limit=1, concurrency_id="pipeline", **own)
