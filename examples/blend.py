"""Blend two subjects along the sphere and along a straight line: `python examples/blend.py`.

The script learns two subjects of the small SDXL world (examples/worlds) that differ in every attribute, from five photos each.
It mixes the two concepts at seven points, on the sphere (`slerp`) and on the straight line between the embeddings, and
generates images of each mixture for 36 prompts. A verifier measures how much of either subject, and of everything else in the
prompts, the images show.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent / "worlds"))

import measure
import scenes
from gates import open_world
from mixtures import Point, measure_mixture, prompt_scenes, straight

from diffusers_dti import DirectionalInversion

POINTS = 7
SHOWN = 2  # prompts in the figure
TILE, LABEL, SCORES = 96, 150, 54


def sheet(ways: dict[str, list[Point]]) -> Image.Image:
    """Paint a block for each way, with a row for each prompt shown, and a column for each point with its numbers below."""
    block = SHOWN * TILE + SCORES
    canvas = Image.new("RGB", (LABEL + POINTS * TILE, 24 + len(ways) * (block + 14)), "white")
    draw, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(15), ImageFont.load_default(11)
    for column in range(POINTS):
        draw.text((LABEL + column * TILE, 4), f"t = {column / (POINTS - 1):.2f}", "black", small)
    for number, (name, points) in enumerate(ways.items()):
        y = 24 + number * (block + 14)
        draw.multiline_text((8, y + 8), name, "black", font)
        draw.multiline_text((8, y + SHOWN * TILE + 1), "of subject a / b\nof the scene\nnorm", "black", small)
        for column, point in enumerate(points):
            x, f = LABEL + column * TILE, point.figures
            for row in range(SHOWN):
                image = scenes.to_pil(point.images[row * 17])
                canvas.paste(image.resize((TILE - 6, TILE - 6), Image.Resampling.NEAREST), (x, y + row * TILE))
            lines = f"{f['a']:.2f} / {f['b']:.2f}\n{f['scene']:.2f}\n{f['norm']:.2f}"
            draw.multiline_text((x, y + SHOWN * TILE + 1), lines, "black", small)
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, nargs=2, default=[0, 3], help="two of the test subjects, 0 to 5 (default: 0 3)")
    parser.add_argument("--steps", type=int, help="training steps (default: 100)")
    parser.add_argument("--out", type=Path, default=Path("out/blend"), help="folder for the concepts and the figure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = open_world()
    first, second = (scenes.TEST_SUBJECTS[i] for i in args.subjects)
    a, b = (measure.learn(pipe, s, 0, max_train_steps=args.steps)[2] for s in (first, second))
    a.save_pretrained(args.out / "a")
    b.save_pretrained(args.out / "b")
    ways: dict[str, Callable[[float], DirectionalInversion]] = {
        "along the\nsphere": lambda t: a.slerp(b, t),
        "along the\nstraight line": lambda t: straight(a, b, t),
    }
    print(f"a: {first.words()}; b: {second.words()}. Each row shows the shares found in {len(prompt_scenes())} images.")
    points: dict[str, list[Point]] = {name: [] for name in ways}
    for name, mix in ways.items():
        print(f"{' '.join(name.split()):24}      a      b  neither  scene   norm")
        for t in (i / (POINTS - 1) for i in range(POINTS)):
            point = measure_mixture(pipe, mix(t), first, second)
            points[name].append(point)
            f = point.figures
            print(f"  t = {t:.2f}{'':16}{f['a']:7.2f}{f['b']:7.2f}{f['neither']:9.2f}{f['scene']:7.2f}{f['norm']:7.2f}")
    sheet(points).save(args.out / "blend.png")
    print(f"See {args.out / 'blend.png'}.")


if __name__ == "__main__":
    main()
