"""SANA learns a word: `python examples/sana.py`, on a CPU, in a small world of drawn scenes (examples/worlds).

With a GPU and photos of your own:

    python examples/sana.py --model Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers --photos photos/dog --initializer dog
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from quickstart import compare

from diffusers_dti import DTITrainer

WORD = "<mine>"


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint's name or folder; without it, the small world")
    parser.add_argument("--photos", help="a folder of 3 to 6, for --model")
    parser.add_argument("--initializer", default="object", help="a word for what they show")
    parser.add_argument("--prompt", default="a {} in a chef outfit, by the Eiffel Tower")
    parser.add_argument("--subject", type=int, default=3, help="which of the world's test subjects, 0 to 5")
    parser.add_argument("--steps", type=int, help="of training; 500 by default")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    if args.model and not args.photos:
        parser.error("--model needs --photos")
    return args


def learn(args: argparse.Namespace) -> DiffusionPipeline:
    """The checkpoint, after it has learned the photos' subject as WORD."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
    settings = {"placeholder_token": WORD, "initializer_token": args.initializer, "max_train_steps": args.steps}
    DTITrainer(pipe, **settings, output_dir=args.out / "mine").fit(args.photos)
    return pipe


def main() -> None:
    args = arguments(__doc__)
    if args.model is None:
        compare("sana", args.subject, args.steps, args.out / "sana.png")
    else:
        learn(args)(args.prompt.replace("{}", WORD)).images[0].save(args.out / "sana.png")


if __name__ == "__main__":
    main()
