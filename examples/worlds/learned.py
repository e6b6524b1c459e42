"""Learn a dev subject in a world, and paint it beside the word alone and the description: `python learned.py --world sana`.

The sheet shows four of the ten prompts. Its scores are those of all ten.
"""

import argparse
import sys
from pathlib import Path

import measure
import scenes
import torch
from gates import FOLDER, WORLDS, open_world, world_of

sys.path.insert(0, str(FOLDER.parent))

from quickstart import sheet

SHOWN = (0, 1, 3, 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="sdxl", choices=WORLDS, help="the world (default: sdxl)")
    parser.add_argument("--subject", type=int, default=0, help="which of the dev subjects, 0 to 5 (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("out/learned.png"), help="file for the sheet")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe, subject = open_world(args.world), scenes.DEV_SUBJECTS[args.subject]
    images, figures, _ = measure.learn(pipe, subject, seed=0)
    rows = [
        (f'the word "{subject.shape}" alone', *measure.in_words(pipe, subject, subject.shape, seed=0)),
        ("Directional Textual Inversion", images, figures),
        ("the description in words", *measure.in_words(pipe, subject, None, seed=0)),
    ]
    texts = [p.text for p in measure.prompts(subject, measure.TOKEN)]
    photos = scenes.photos(subject, pixels=world_of(pipe).pixels, seed=0)
    shown = [(name, own[list(SHOWN)], scores) for name, own, scores in rows]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(photos, [texts[i] for i in SHOWN], shown).save(args.out)
    for name, _, scores in rows:
        print(f"{name:32}subject {scores['subject']:.2f}  prompt {scores['prompt']:.2f}")


if __name__ == "__main__":
    main()
