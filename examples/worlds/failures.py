"""Make typical mistakes in SDXL's small world, and paint each one above its cure: `python examples/worlds/failures.py`.

The sheets are those of docs/failures.md. One dev subject, one seed, one run for each row: some minutes on one core.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure
import scenes
import torch
from diffusers import DiffusionPipeline
from gates import FOLDER, generate, open_world
from PIL import Image
from scenes import PLACES, SIZES, Scene

from diffusers_dti import DTITrainer
from diffusers_dti.figures import SheetRow, paint_sheet

SUBJECT, SEED, PIXELS = scenes.DEV_SUBJECTS[3], 0, 32
TILE = 64  # pixels
# Photos that differ in the size and the place of the subject alone.
ALIKE = [Scene(SUBJECT, list(SIZES)[i % 2], place, "pink", "striped") for i, place in enumerate(PLACES)]
SHARED = {"images": [scenes.to_pil(scenes.render(scene, PIXELS)) for scene in ALIKE]}


def mask(scene: Scene) -> Image.Image:
    """Return where the subject is in a scene."""
    covered = scenes.masks(scene.bundle.shape, SIZES[scene.size], scene.place, PIXELS).sum(0)
    return Image.fromarray((covered * 255).round().byte().numpy())


@dataclass(frozen=True)
class Run:
    """A row of a sheet.

    Args:
        label: what it shows; no two different runs have the same.
        settings: settings of the trainer, beyond the defaults.
        data: arguments of `fit`, instead of five photos that have nothing in common but the subject.
        token_scale: the norm to load the concept with.
    """

    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=lambda: {"images": scenes.photos(SUBJECT, pixels=PIXELS, seed=SEED)})
    token_scale: str | None = None


CURED = Run(f'the defaults: five photos, the word "{SUBJECT.shape}", 100 steps')
INFLATED = {"method": "ti", "learning_rate": 0.03, "lr_scheduler": "constant", "max_train_steps": 400}
CASES: dict[str, Sequence[Run]] = {
    "one_photo": (Run("one photo", data={"images": scenes.photos(SUBJECT, count=1, pixels=PIXELS, seed=SEED)}), CURED),
    "background": (
        Run("one background in all photos", data=SHARED),
        Run("... named in the captions", data=SHARED | {"captions": ["a {} on a striped pink background"] * len(ALIKE)}),
        Run("... masked", data=SHARED | {"masks": [mask(scene) for scene in ALIKE]}),
    ),
    "initializer": (
        Run('initializer "background"', {"initializer_token": "background"}),
        Run('initializer "auto"', {"initializer_token": "auto"}),
        CURED,
    ),
    "rate": (Run("rate 1, constant", {"learning_rate": 1.0, "lr_scheduler": "constant", "max_train_steps": 100}), CURED),
    "steps": (Run("5 steps", {"max_train_steps": 5}), CURED),
    "norm": (
        Run("TI, rate .03, 400 steps", INFLATED),
        Run('... loaded with token_scale "mean"', INFLATED, token_scale="mean"),
        CURED,
    ),
    "scale": (
        Run("token_scale 20", {"token_scale": 20.0}),
        Run("token_scale .03", {"token_scale": 0.03}),
        CURED,
    ),
    "prior": (Run("kappa 1", {"kappa": 1.0}), CURED),
}


def learn(pipe: DiffusionPipeline, run: Run) -> tuple[torch.Tensor, dict[str, float]]:
    """Learn the subject and generate its ten prompts. Return the images, and the scores with the norm."""
    settings = {"initializer_token": SUBJECT.shape, **run.settings}
    trainer = DTITrainer(pipe, placeholder_token=measure.TOKEN, resolution=PIXELS, seed=SEED, **settings)
    concept = trainer.fit(**run.data)
    if run.token_scale:
        concept = pipe.load_directional_inversion(concept, token_scale=run.token_scale, replace=True)
    asked = measure.prompts(SUBJECT, measure.TOKEN)
    images = generate(pipe, [prompt.text for prompt in asked], SEED)
    pipe.unload_directional_inversion(measure.TOKEN)
    return images, measure.scores(images, asked) | {"norm": torch.cat(list(concept.scales.values())).mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, help="what to paint (default: all)")
    folder = FOLDER.parents[1] / "docs" / "failures"
    parser.add_argument("--out", type=Path, default=folder, help="folder for the sheets (default: docs/failures)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe, learned = open_world("sdxl"), {}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.cases:
        rows = []
        for run in CASES[name]:
            images, figures = learned[run.label] = learned.get(run.label) or learn(pipe, run)
            print(f"{name:12} {run.label:54}" + "  ".join(f"{score} {value:.3f}" for score, value in figures.items()))
            note = "\n".join(f"{score} {value:.2f}" for score, value in figures.items())
            rows.append(SheetRow([scenes.to_pil(image) for image in images], run.label, note))
        paint_sheet(rows, tile_width=TILE).quantize().save(args.out / f"{name}.png", optimize=True)  # less than half the size


if __name__ == "__main__":
    main()
