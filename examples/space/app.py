"""A Space on ZeroGPU: a few photos become a word of SDXL.

A GPU is lent for one call at a time, and each call runs in a process of its own. So training stops before its call ends, and
the next call goes on from the checkpoint. Only files pass from call to call.
"""

import hashlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import spaces  # before CUDA is used
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_dti import DTITrainer

MODEL, VARIANT = "stabilityai/stable-diffusion-xl-base-1.0", "fp16"
WORD = "<mine>"
CALL_SECONDS = 60  # what a visitor's quota must have left for a call
SECONDS = 35  # of training in a call; the rest is for moving the model and encoding the photos

pipe = DiffusionPipeline.from_pretrained(MODEL, dtype=torch.bfloat16, variant=VARIANT)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")


class OutOfTime(Exception):
    """The call's share of training is over."""


@spaces.GPU(duration=CALL_SECONDS)
def train_for_a_while(photos: list[str], initializer: str, folder: Path) -> int | None:
    """Train from the last checkpoint in `folder` until all steps are done or the time is over.

    Returns:
        The number of steps done, or None if the concept is learned.
    """
    end, done = time.monotonic() + SECONDS, 0

    def stop_in_time(trainer: DTITrainer, step: int) -> None:
        nonlocal done
        done = step
        if time.monotonic() > end:
            raise OutOfTime

    settings = {"placeholder_token": WORD, "initializer_token": initializer, "output_dir": folder}
    trainer = DTITrainer(pipe, **settings, resume_from_checkpoint="latest", gradient_checkpointing=True)
    try:
        trainer.fit(photos, callback_on_step_end=stop_in_time)
    except OutOfTime:  # `fit` has written a checkpoint
        return done
    return None


@spaces.GPU(duration=CALL_SECONDS)
def generate(prompt: str, folder: Path) -> Image.Image:
    """Generate an image with the concept in `folder`."""
    pipe.load_directional_inversion(folder, replace=True)
    return pipe(prompt, num_inference_steps=30).images[0]


def folder_for(photos: list[str], initializer: str) -> Path:
    """Return the folder of a run: the same photos and word go on where they stopped, as for want of quota."""
    digest = hashlib.sha256(initializer.encode())
    for photo in photos:
        digest.update(Path(photo).read_bytes())
    return Path(tempfile.gettempdir()) / "dti" / digest.hexdigest()


def concept_files(folder: Path) -> list[str]:
    """List the files of a learned concept."""
    return sorted(map(str, folder.glob("learned_embeds*.safetensors")))


def learn(photos: list[str] | None, initializer: str) -> Iterator[tuple[str, Path | None, list[str]]]:
    """Learn a concept in as many calls as it takes.

    Yields:
        What to show, the folder of the concept once it is learned, and its files.
    """
    initializer = initializer.strip()
    if not photos or not initializer:
        raise gr.Error('Drop 3 to 6 photos of one thing, and say what it is, such as "dog".')
    folder = folder_for(photos, initializer)
    yield "Training ...", None, []
    while not concept_files(folder) and (step := train_for_a_while(photos, initializer, folder)) is not None:
        yield f"Step {step}. The next call goes on from here ...", None, []
    yield f"Learned {WORD}. Write it in a prompt.", folder, concept_files(folder)


def draw(prompt: str, folder: Path | None) -> Image.Image:
    """Generate an image if there is a concept."""
    if folder is None:
        raise gr.Error("Train first.")
    return generate(prompt, folder)


with gr.Blocks(title="Directional Textual Inversion") as demo:
    gr.Markdown(f"# A few photos become a word\nDrop 3 to 6 photos of one thing. Prompts then know it as `{WORD}`.")
    concept = gr.State(None)
    with gr.Row():
        with gr.Column():
            photo_files = gr.File(label="Photos", file_count="multiple", file_types=["image"])
            noun = gr.Textbox(label="What is it?", placeholder="dog")
            train = gr.Button("Train", variant="primary")
            status = gr.Textbox(label="Training", interactive=False)
            results = gr.File(label="The word, one file for each text encoder", file_count="multiple", interactive=False)
        with gr.Column():
            text = gr.Textbox(label="Prompt", value=f"a {WORD} in a chef outfit, by the Eiffel Tower")
            button = gr.Button("Generate")
            image = gr.Image(label="Image")
    # One at a time, also where calls share a process.
    train.click(learn, [photo_files, noun], [status, concept, results], concurrency_id="gpu")
    button.click(draw, [text, concept], image, concurrency_id="gpu")

if __name__ == "__main__":
    demo.launch(show_error=True)
