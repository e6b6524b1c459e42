"""Learn a placeholder for a subject from five photos, and use it in ten prompts: `python examples/quickstart.py`.

Everything is small: a Stable Diffusion XL pipeline of 4 M parameters, pretrained on rendered scenes (examples/worlds).
Pretraining never showed or named the subject. The prompts ask for places and backgrounds, and some change the subject itself.
A verifier reads each image, so you can compare the rows by their scores too.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "worlds"))

import measure
import scenes
from diffusers import DiffusionPipeline
from gates import open_world, world_of
from rows import FINAL, TI_BEST

from diffusers_dti import DirectionalInversion
from diffusers_dti.figures import SheetRow, paint_sheet
from diffusers_dti.training.defaults import STEPS

TILE = 128  # pixels


def sheet(photos: list[Image.Image], prompts: list[str], rows: list[tuple[str, torch.Tensor, dict[str, float]]]) -> Image.Image:
    """Paint the photos, and below them a row for each method with its scores, a column for each prompt."""
    shown = []
    for name, images, figures in rows:
        scores = [f"{score} {figures[score]:.2f}" for score in ("subject", "prompt", "norm") if score in figures]
        shown.append(SheetRow([scenes.to_pil(image) for image in images], name, "\n".join(scores)))
    above = paint_sheet([SheetRow(photos, f"{len(photos)} photos, all that is learned from")], tile_width=TILE)
    below = paint_sheet(shown, prompts, TILE)
    both = Image.new("RGB", (below.width, above.height + below.height), "white")
    both.paste(above, (0, 0))
    both.paste(below, (0, above.height))
    return both


def compare(world: str, number: int, steps: int | None, out: Path) -> tuple[DiffusionPipeline, DirectionalInversion]:
    """Learn a test subject in a world by TI and by DTI, save the sheet of images and print the scores.

    Args:
        world: the name of the world.
        number: which of the test subjects, 0 to 5.
        steps: training steps of both. None takes DTI's default, and as many as the authors for TI.
        out: the file for the sheet.

    Returns:
        The world's pipeline, and the concept that DTI learned.
    """
    torch.set_num_threads(1)  # the world is so small that more threads are slower
    pipe = open_world(world)
    subject = scenes.TEST_SUBJECTS[number]
    print(f"The subject: a {subject.words()}.")
    classic_steps, own_steps = steps or FINAL[world], steps or STEPS
    ti = {"method": "ti", **TI_BEST[world]}  # the best rate and schedule on other subjects
    *classic, _ = measure.learn(pipe, subject, 0, max_train_steps=classic_steps, **ti)
    *directional, concept = measure.learn(pipe, subject, 0, max_train_steps=own_steps)
    rows = [
        (f'the word "{subject.shape}" alone', *measure.in_words(pipe, subject, subject.shape, seed=0)),
        ("the description in words", *measure.in_words(pipe, subject, None, seed=0)),
        (f"Textual Inversion, {classic_steps} steps", *classic),
        (f"Directional Textual Inversion, {own_steps} steps", *directional),
    ]  # fmt: skip
    print(f"{'':42}subject  prompt  norm")
    for name, _, figures in rows:
        print(f"{name:42}{figures['subject']:7.2f} {figures['prompt']:7.2f} {figures['norm']:5.2f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    texts = [p.text for p in measure.prompts(subject, measure.TOKEN)]
    sheet(scenes.photos(subject, pixels=world_of(pipe).pixels, seed=0), texts, rows).save(out)
    print(f"See {out}.")
    return pipe, concept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subject", type=int, default=3, help="which of the test subjects, 0 to 5 (default: 3)")
    parser.add_argument("--steps", type=int, help="training steps of both methods (default: 400 of TI, 100 of DTI)")
    parser.add_argument("--out", type=Path, default=Path("out/quickstart.png"), help="file for the sheet")
    args = parser.parse_args()
    compare("sdxl", args.subject, args.steps, args.out)


if __name__ == "__main__":
    main()
