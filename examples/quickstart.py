"""Five photos of a subject, a new word for it, and the word in eight prompts: `python examples/quickstart.py`.

Everything is small: a Stable Diffusion XL pipeline of 4 M parameters, pretrained on drawn scenes (examples/worlds). The
subject was never drawn nor named in pretraining. Prompts ask for places and backgrounds, and some change the subject
itself. A verifier reads each picture, so that the rows can be compared by figures too.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "worlds"))

import measure
import scenes
import study
from diffusers import DiffusionPipeline
from gates import open_world, world_of

from diffusers_dti import DirectionalInversion
from diffusers_dti.figures import SheetRow, paint_sheet

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
    """Learn a test subject in a world, by TI and DTI; write the picture and print the scores.

    Returns:
        The world's pipeline, and what DTI has learned.
    """
    torch.set_num_threads(1)  # more threads only wait for each other in a world as small as this
    pipe = open_world(world)
    subject = scenes.TEST_SUBJECTS[number]
    print(f"The subject: a {subject.words()}.")
    ti = {"method": "ti", "learning_rate": study.CHOSEN[world]["TI"]}  # the best of three for it
    *classic, _ = measure.learned(pipe, subject, 0, max_train_steps=steps, **ti)
    *directional, concept = measure.learned(pipe, subject, 0, max_train_steps=steps)
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
    parser.add_argument("--subject", type=int, default=3, help="which of the test subjects, 0 to 5")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("out/quickstart.png"))
    args = parser.parse_args()
    compare("sdxl", args.subject, args.steps, args.out)


if __name__ == "__main__":
    main()
