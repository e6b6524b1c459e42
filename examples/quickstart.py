"""Learn a placeholder for a subject from five photos, and use it in eight prompts: `python examples/quickstart.py`.

Everything is small: a Stable Diffusion XL pipeline of 4 M parameters, pretrained on rendered scenes (examples/worlds).
Pretraining never showed or named the subject. The prompts ask for places and backgrounds, and some change the subject itself.
A verifier reads each image, so you can compare the rows by their scores too.
"""

import argparse
import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent / "worlds"))

import measure
import scenes
import study
from diffusers import DiffusionPipeline
from gates import open_world, world_of

from diffusers_dti import DirectionalInversion

TILE, LABEL, SCORES, HEADER = 108, 150, 130, 112


def tile(image: Image.Image) -> Image.Image:
    return image.resize((TILE - 8, TILE - 8), Image.Resampling.NEAREST)


def sheet(photos: list[Image.Image], prompts: list[str], rows: list[tuple[str, torch.Tensor, dict[str, float]]]) -> Image.Image:
    """Photos on top, then a row per method with its scores, one column per prompt."""
    width, height = LABEL + len(prompts) * TILE + SCORES, (len(rows) + 1) * TILE + HEADER + 8
    picture = Image.new("RGB", (width, height), "white")
    draw, font, small = ImageDraw.Draw(picture), ImageFont.load_default(15), ImageFont.load_default(11)

    def place(column: int, y: int, image: Image.Image) -> None:
        picture.paste(tile(image), (LABEL + column * TILE, y))

    draw.multiline_text((8, 12), f"{len(photos)} photos,\nall that is\nlearned from", "black", font)
    for column, photo in enumerate(photos):
        place(column, 8, photo)
    for column, text in enumerate(prompts):
        draw.multiline_text((LABEL + column * TILE, TILE + 12), textwrap.fill(text, 16), "black", small, spacing=2)
    for number, (name, images, figures) in enumerate(rows):
        y = TILE + HEADER + number * TILE
        draw.multiline_text((8, y + 12), textwrap.fill(name, 16), "black", font)
        for column, image in enumerate(images):
            place(column, y, scenes.to_pil(image))
        lines = "\n".join(f"{k} {v:.2f}" for k, v in figures.items() if k in ("subject", "prompt", "norm"))
        draw.multiline_text((width - SCORES + 4, y + 12), lines, "black", font)
    return picture


def compare(world: str, number: int, steps: int | None, out: Path) -> tuple[DiffusionPipeline, DirectionalInversion]:
    """Learn a test subject in a world by TI and by DTI, save the sheet of images and print the scores.

    Args:
        world: the name of the world.
        number: which of the test subjects, 0 to 5.
        steps: training steps. None uses the default of the model family.
        out: the file for the sheet.

    Returns:
        The world's pipeline, and the concept that DTI learned.
    """
    torch.set_num_threads(1)  # the world is so small that more threads are slower
    pipe = open_world(world)
    subject = scenes.TEST_SUBJECTS[number]
    print(f"The subject: a {subject.words()}.")
    ti = {"method": "ti", "learning_rate": study.CHOSEN[world]["TI"]}  # TI's best rate of three
    *classic, _ = measure.learn(pipe, subject, 0, max_train_steps=steps, **ti)
    *directional, concept = measure.learn(pipe, subject, 0, max_train_steps=steps)
    rows = [
        (f'the word "{subject.shape}" alone', *measure.in_words(pipe, subject, subject.shape, seed=0)),
        ("the description in words", *measure.in_words(pipe, subject, None, seed=0)),
        ("Textual Inversion", *classic),
        ("Directional Textual Inversion", *directional),
    ]  # fmt: skip
    print(f"{'':32}subject  prompt  norm")
    for name, _, figures in rows:
        print(f"{name:32}{figures['subject']:7.2f} {figures['prompt']:7.2f} {figures['norm']:5.2f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    texts = [p.text for p in measure.prompts(subject, measure.TOKEN)]
    sheet(scenes.photos(subject, pixels=world_of(pipe).pixels, seed=0), texts, rows).save(out)
    print(f"See {out}.")
    return pipe, concept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subject", type=int, default=3, help="which of the test subjects, 0 to 5 (default: 3)")
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: 400)")
    parser.add_argument("--out", type=Path, default=Path("out/quickstart.png"), help="file for the sheet")
    args = parser.parse_args()
    compare("sdxl", args.subject, args.steps, args.out)


if __name__ == "__main__":
    main()
