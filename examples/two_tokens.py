"""Train two concepts at once and use both in one prompt: `python examples/two_tokens.py`.

In the small world (examples/worlds), `<thing>` learns a subject from five photos. `<ground>` learns a background from five
photos of other objects on it, each with a caption file. The figure is the validation strip, with a column for each validation.
"""

import argparse
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "worlds"))

import scenes
import verifier
from gates import generate, open_world

from diffusers_dti import DTITrainer

BACKGROUND, PATTERN = "mint", "striped"


def ground_photos(folder: Path, count: int = 5) -> None:
    """Write photos of known objects on one background, with captions in which the placeholder stands for the background."""
    rng = random.Random(0)
    for i in range(count):
        scene = replace(scenes.random_scene(rng), background=BACKGROUND, pattern=PATTERN)
        scenes.to_pil(scenes.render(scene, 32)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {scene.bundle.words(scene.size)} {scene.place} on a {{}} background")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="training steps (default: 100)")
    parser.add_argument("--out", type=Path, default=Path("out/two_tokens"), help="folder for the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = open_world()
    subject = scenes.TEST_SUBJECTS[1]
    asked = [scenes.Scene(subject, size, place, BACKGROUND, PATTERN) for size in scenes.SIZES for place in scenes.PLACES]
    prompts = [f"a {s.size} <thing> {s.place} on a <ground> background" for s in asked]
    with tempfile.TemporaryDirectory() as folder:
        ground_photos(Path(folder))
        trainer = DTITrainer(
            pipe,
            initializer_token={"<thing>": subject.shape, "<ground>": "gray"},
            resolution=32,
            max_train_steps=args.steps,
            output_dir=args.out,
            validation_prompt=prompts[:3],
            validation_steps=max(1, args.steps // 8),
        )
        trainer.fit({"<thing>": scenes.photos(subject), "<ground>": folder})
    found = verifier.read(generate(pipe, prompts))
    print(f"The subject: a {subject.words()}. The background: {PATTERN} {BACKGROUND}.")
    print(f"Share of {len(prompts)} prompts with both placeholders for which the image has the right attribute:")
    for attribute in asked[0].attributes():
        right = sum(f[attribute] == s.attributes()[attribute] for f, s in zip(found, asked)) / len(asked)
        print(f"{attribute:12}{right:5.2f}")
    print(f"See {args.out / 'validation.png'}; the losses of each concept are in {args.out / 'train_log.jsonl'}.")


if __name__ == "__main__":
    main()
