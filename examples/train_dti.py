# /// script
# requires-python = ">=3.10"
# dependencies = ["diffusers-dti", "diffusers>=0.40", "datasets>=4"]
#
# [tool.hf-jobs]
# flavor = "l40sx1"
# timeout = "1h"
# secrets = ["HF_TOKEN"]
# ///
"""Learn a concept from a folder of photos or a data set on the Hub, and push it: `uv run examples/train_dti.py --help`.

On Hugging Face Jobs, `hf jobs uv run` runs the same file: docs/cloud.md.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from diffusers import DiffusionPipeline

from diffusers_dti import DTITrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", help='folder of 3 to 6 photos, or the id of a data set with a column "image"')
    parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0", help="Hub id or folder of the pipeline")
    parser.add_argument("--placeholder_token", required=True, help="the concept's name in prompts, such as <dog>")
    parser.add_argument("--initializer_token", default="auto", help="a word for what the photos show, by default searched for")
    parser.add_argument("--resolution", type=int, help="side of the crops in pixels, by default the model's own")
    parser.add_argument("--max_train_steps", type=int, help="training steps (default: 100)")
    parser.add_argument("--validation_prompt", nargs="+", help='prompts with "{}", whose images the model card shows')
    parser.add_argument("--output_dir", type=Path, default=Path("out/dti"), help="folder for the results (default: out/dti)")
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="repository to push the concept to, such as user/dti-dog")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    args = vars(parser.parse_args())
    photos, model, repo_id, private = (args.pop(name) for name in ("photos", "model", "push_to_hub", "private"))

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype).to(device)
    trainer = DTITrainer(pipe, **args)
    trainer.fit(photos if Path(photos).is_dir() else load_dataset(photos, split="train"))
    print(f"Learned {args['placeholder_token']}, in {args['output_dir']}.")
    if repo_id:
        print(f"Pushed: {trainer.push_to_hub(repo_id, private=private)}")


if __name__ == "__main__":
    main()
