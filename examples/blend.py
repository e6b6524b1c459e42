"""From one subject to another, along the sphere and along a straight line: `python examples/blend.py`.

In the small SDXL world (examples/worlds) two subjects that differ in every attribute are learned from five photos each. At
seven points between them, on the sphere (`slerp`) and on the straight line between the same two embeddings, both words'
mixture is drawn in 36 prompts. A verifier reads how much of either subject, and of what else the prompt names, is there.
"""

import argparse
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent / "worlds"))

import measure
import scenes
import verifier
from diffusers import DiffusionPipeline
from gates import generate, open_world

from diffusers_dti import DirectionalInversion

POINTS = 7
SHOWN = 2  # prompts in the picture
TILE, LABEL, SCORES = 96, 150, 54


@dataclass(frozen=True)
class Point:
    """One mixture: its pictures, and the shares that were found in them."""

    images: torch.Tensor
    figures: dict[str, float]


def straight(a: DirectionalInversion, b: DirectionalInversion, t: float) -> DirectionalInversion:
    """The mixture of the embeddings themselves, norms as they come out."""
    rows = {c: torch.lerp(e, b.embeddings[c], t) for c, e in a.embeddings.items()}
    return DirectionalInversion.from_embeddings(a.placeholder_token, rows)


def asked() -> list[scenes.Scene]:
    """Every size, place and background, the patterns in turn; the bundle is a stand-in."""
    everywhere = product(scenes.SIZES, list(scenes.PLACES)[:3], scenes.BACKGROUNDS)
    return [scenes.Scene(scenes.TEST_SUBJECTS[0], *x, scenes.PATTERNS[i % 3]) for i, x in enumerate(everywhere)]


def measured(pipe: DiffusionPipeline, mixture: DirectionalInversion, first: scenes.Bundle, second: scenes.Bundle) -> Point:
    """Draw a mixture in all prompts, every other one with the word at its end, and read the pictures."""
    wanted = asked()
    pipe.load_directional_inversion(mixture)
    try:
        captions = [s.caption(mixture.placeholder_token, late=i % 2 == 1) for i, s in enumerate(wanted)]
        images = generate(pipe, captions)
    finally:
        pipe.unload_directional_inversion(mixture.placeholder_token)
    counts: dict[str, list[bool]] = {"a": [], "b": [], "neither": [], "scene": []}
    for found, scene in zip(verifier.read(images), wanted, strict=True):
        for attribute, truth in scene.attributes().items():
            if attribute in scenes.SUBJECT_ATTRIBUTES:
                of_a, of_b = (found[attribute] == getattr(x, attribute) for x in (first, second))
                for name, is_so in (("a", of_a), ("b", of_b), ("neither", not (of_a or of_b))):
                    counts[name].append(is_so)
            else:
                counts["scene"].append(found[attribute] == truth)
    norms = torch.cat(list(mixture.scales.values()))
    return Point(images, {k: sum(v) / len(v) for k, v in counts.items()} | {"norm": norms.mean().item()})


def sheet(ways: dict[str, list[Point]]) -> Image.Image:
    """A block for each way: a row for each prompt shown, a column for each point, its figures below."""
    block = SHOWN * TILE + SCORES
    picture = Image.new("RGB", (LABEL + POINTS * TILE, 24 + len(ways) * (block + 14)), "white")
    draw, font, small = ImageDraw.Draw(picture), ImageFont.load_default(15), ImageFont.load_default(11)
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
                picture.paste(image.resize((TILE - 6, TILE - 6), Image.Resampling.NEAREST), (x, y + row * TILE))
            lines = f"{f['a']:.2f} / {f['b']:.2f}\n{f['scene']:.2f}\n{f['norm']:.2f}"
            draw.multiline_text((x, y + SHOWN * TILE + 1), lines, "black", small)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, nargs=2, default=[0, 3], help="which two of the test subjects, 0 to 5")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("out/blend"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = open_world()
    first, second = (scenes.TEST_SUBJECTS[i] for i in args.subjects)
    a, b = (measure.learned(pipe, s, 0, max_train_steps=args.steps)[2] for s in (first, second))
    a.save_pretrained(args.out / "a")
    b.save_pretrained(args.out / "b")
    ways = {"along the\nsphere": a.slerp, "along the\nstraight line": lambda other, t: straight(a, other, t)}
    print(f"a: {first.words()}; b: {second.words()}. Shares found in {len(asked())} pictures a row.")
    drawn: dict[str, list[Point]] = {}
    for name, way in ways.items():
        print(f"{' '.join(name.split()):24}      a      b  neither  scene   norm")
        for t in (i / (POINTS - 1) for i in range(POINTS)):
            point = measured(pipe, way(b, t), first, second)
            drawn.setdefault(name, []).append(point)
            print(
                f"  t = {t:.2f}{'':16}{{a:7.2f}}{{b:7.2f}}{{neither:9.2f}}{{scene:7.2f}}{{norm:7.2f}}".format(**point.figures)
            )
    sheet(drawn).save(args.out / "blend.png")
    print(f"See {args.out / 'blend.png'}.")


if __name__ == "__main__":
    main()
