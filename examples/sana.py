"""Train a concept on SANA: `python examples/sana.py`, on a CPU, in a small world of rendered scenes (examples/worlds).

With a GPU and your own photos, run:

    python examples/sana.py --model Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers --photos photos/dog --initializer dog
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

sys.path.insert(0, str(Path(__file__).parent / "worlds"))

from gates import load_pipeline
from quickstart import compare

from diffusers_dti import DTITrainer

PLACEHOLDER = "<mine>"


def parse_arguments(description: str) -> argparse.Namespace:
    """Parse the command line of this example and of wan.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint's Hub id or folder (default: the small world)")
    parser.add_argument("--photos", help="folder of 3 to 6 photos, for --model")
    parser.add_argument("--initializer", default="object", help="a word for what the photos show (default: object)")
    parser.add_argument(
        "--prompt", default="a {} in a chef outfit, by the Eiffel Tower", help='prompt with "{}" for the placeholder'
    )
    parser.add_argument("--subject", type=int, default=3, help="which of the world's test subjects, 0 to 5 (default: 3)")
    parser.add_argument("--steps", type=int, help="training steps (default: 100, and 500 for the TI of the small world)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results (default: out)")
    args = parser.parse_args()
    if args.model and not args.photos:
        parser.error("--model needs --photos")
    return args


def learn(args: argparse.Namespace) -> DiffusionPipeline:
    """Train a concept on the checkpoint from the photos, and return the pipeline with the concept loaded."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_pipeline(args.model, torch.bfloat16).to(device)
    settings = {"placeholder_token": PLACEHOLDER, "initializer_token": args.initializer, "max_train_steps": args.steps}
    DTITrainer(pipe, **settings, output_dir=args.out / "mine").fit(args.photos)
    return pipe


def main() -> None:
    args = parse_arguments(__doc__)
    if args.model is None:
        compare("sana", args.subject, args.steps, args.out / "sana.png")
    else:
        learn(args)(args.prompt.replace("{}", PLACEHOLDER)).images[0].save(args.out / "sana.png")


if __name__ == "__main__":
    main()
