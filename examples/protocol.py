"""Run the paper's comparison from end to end with the command `dti`: `python examples/protocol.py`, some minutes on a CPU.

The script writes photos of three subjects of the small SDXL world to files. `dti train` learns each subject by every method,
`dti generate` generates a contact sheet, and `dti evaluate` generates and scores every prompt. The verifier's scores are real.
In place of the real DINOv2 and SigLIP, the script uses TINY RANDOM MODELS, which need no network: their scores mean nothing.

With a GPU, and after `dti data dreambooth`, run all of the paper's comparison on SDXL:

    python examples/protocol.py --model stabilityai/stable-diffusion-xl-base-1.0 --data data/dreambooth.json
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, BitImageProcessor, Dinov2Config, Dinov2Model, SiglipConfig, SiglipModel

sys.path.insert(0, str(Path(__file__).parent / "worlds"))

import dataset
import scenes
from gates import FOLDER

from diffusers_dti.cli import main as dti

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def random_models(folder: Path) -> tuple[Path, Path]:
    """Write a DINOv2 and a SigLIP with random weights, and return their folders."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "sdxl" / "tokenizer")
    text = TINY | {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    dinov2 = Dinov2Model(Dinov2Config(**TINY | {"image_size": 32, "patch_size": 8}))
    siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=TINY | {"image_size": 32, "patch_size": 8}))
    processor = BitImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    for name, model in (("random-dinov2", dinov2), ("random-siglip", siglip)):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "random-siglip")
    return folder / "random-dinov2", folder / "random-siglip"


def run(*arguments: object) -> None:
    """Run a command of `dti`, and exit if it fails."""
    print("\n$ dti", *arguments)
    if status := dti([str(a) for a in arguments]):
        raise SystemExit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a real pipeline; needs --data")
    parser.add_argument("--data", type=Path, help="JSON file of subjects; needs --model")
    parser.add_argument("--methods", nargs="+", default=["dti", "ti", "crossinit", "dco", "oft"], help="methods to compare")
    parser.add_argument("--steps", type=int, help="training steps (default: those of the method)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="seeds of the images (default: 0 1 2 3)")
    parser.add_argument("--out", type=Path, default=Path("out/protocol"), help="folder for everything that is written")
    args = parser.parse_args()
    if (args.model is None) != (args.data is None):
        parser.error("pass both --model and --data, or neither")
    model, data, small, metrics, call = args.model, args.data, [], [], ["--seeds", *args.seeds]
    if model is None:
        torch.set_num_threads(1)  # the world is so small that more threads are slower
        model, data = FOLDER / "sdxl", dataset.write(args.out / "data", scenes.TEST_SUBJECTS[:3], pixels=32)
        dinov2, siglip = random_models(args.out / "models")
        small = ["--resolution", 32]
        metrics = ["--metrics", f"dinov2={dinov2}", f"siglip={siglip}", f"{Path(dataset.__file__)}:verify"]
        call += ["--batch_size", 32, "--call", "num_inference_steps=12", "guidance_scale=3"]
    if args.steps:
        small += ["--max_train_steps", args.steps]
    for method in args.methods:
        run("train", data, "--model", model, "--method", method, *small, "--output_dir", args.out / method)
    name, entry = next(iter(json.loads(data.read_text()).items()))
    prompts = [p.replace("{}", f"<{name}>") for p in entry.get("prompts", ["a {} on the beach", "a red {}"])]
    concept = ("--concepts", args.out / args.methods[0] / name)
    run("generate", "--model", model, *concept, "--prompts", *prompts, "--output_dir", args.out / "images", *call)
    runs = [args.out / method for method in args.methods]
    runs += [f"{args.out / 'ti'}@mean"] if "ti" in args.methods else []
    run("evaluate", data, "--model", model, "--runs", *runs, *metrics, "--output_dir", args.out / "evaluation", *call)
    if metrics:
        print(
            "The scores dinov2 and siglip are from tiny random models and mean nothing. Subject and prompt are the verifier's."
        )


if __name__ == "__main__":
    main()
