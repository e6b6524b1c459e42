"""The tab between two concepts: a slider along the great circle through them, and beyond its ends."""

import math
from typing import Any

import gradio as gr

from ..concept.inversion import DirectionalInversion
from ..sphere import angle
from .drawing import draw_path
from .page import Studio, enlarged, errors_shown, gallery

BEYOND = 45  # degrees of the slider beyond each end


def build(studio: Studio, tab: gr.Tab) -> None:
    """Build the tab.

    Args:
        studio: what the page works on.
        tab: the tab, on whose opening the concepts at hand are listed anew.
    """
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            model = studio.model_choice("blend-model")
            first = studio.concept_choice("First concept", "blend-first")
            second = studio.concept_choice("Second concept", "blend-second")
            degrees = gr.Slider(
                -BEYOND, 90 + BEYOND, 0, step=1, label="Degrees from the first toward the second", elem_id="blend-degrees"
            )
            prompt = gr.Textbox("a photo of a {}", label="Prompt", info="with {} for the concept", elem_id="blend-prompt")
            with gr.Row():
                count = gr.Slider(1, 8, 1, step=1, label="Seeds", elem_id="blend-count")
                seed = gr.Number(0, label="First seed", precision=0, elem_id="blend-seed")
            draw = gr.Button("Generate", variant="primary", elem_id="blend")
        with gr.Column(scale=3, min_width=320):
            images = gallery("The first, the one between, and the second", "blend-images", 3)
            with gr.Row():
                name = gr.Textbox(label="Name", info="to keep the one between under", elem_id="blend-name", scale=3)
                save = gr.Button("Save", elem_id="blend-save", min_width=80, elem_classes="beside")
            outcome = gr.Markdown(elem_id="blend-outcome")

    def read(first: str | None, second: str | None) -> tuple[DirectionalInversion, DirectionalInversion]:
        if not first or not second:
            raise ValueError("Choose two concepts.")
        return DirectionalInversion.from_pretrained(first), DirectionalInversion.from_pretrained(second)

    @errors_shown
    def measure(first: str | None, second: str | None) -> Any:
        if not first or not second:
            return gr.skip()
        one, other = read(first, second)
        one.slerp(other, 0.5)  # which refuses concepts that cannot be mixed
        apart = [math.degrees(angle(v, other.directions[c]).max().item()) for c, v in one.directions.items()]
        end = math.ceil(max(apart))
        text = ", ".join(f"{a:.0f}° in {c}" for a, c in zip(apart, one.directions))
        return gr.Slider(-BEYOND, end + BEYOND, value=round(end / 2), info=f"The second is {text}.")

    @errors_shown
    def blend(
        model: str, first: str | None, second: str | None, degrees: float, prompt: str, count: int, seed: int | None,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Any:  # fmt: skip
        seeds, done = range(seed or 0, (seed or 0) + count), iter(range(1, 3 * count + 1))
        one, other = read(first, second)
        progress(0, "Opening the model")
        with studio.models.opened(model or "") as pipe:
            drawn = draw_path(
                pipe, one, other, degrees, prompt, seeds,
                lambda: progress((next(done), 3 * count), "Generating", unit="images"),
            )  # fmt: skip
        return [(enlarged(image), caption) for image, caption in drawn]

    @errors_shown
    def keep(first: str | None, second: str | None, degrees: float, name: str) -> str:
        one, other = read(first, second)
        return f"Saved: {studio.shelf.keep(one.slerp(other, degrees=degrees), name.strip())}"

    own: dict[str, Any] = {"api_visibility": "private"}
    hidden: dict[str, Any] = {"show_progress": "hidden", **own}
    tab.select(lambda: [gr.Dropdown(choices=studio.shelf.choices())] * 2, None, [first, second], **hidden)
    gr.on([first.change, second.change], measure, [first, second], degrees, **hidden)
    fields = [model, first, second, degrees, prompt, count, seed]
    draw.click(blend, fields, images, concurrency_limit=1, concurrency_id="pipeline", **own)
    save.click(keep, [first, second, degrees, name], outcome, **hidden)
