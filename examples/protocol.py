"""The systems of the paper from end to end, by the command `dti`: `python examples/protocol.py`, some minutes on a CPU.

Photos of three subjects of the small SDXL world are written to files; `dti train` learns each by every method, `dti generate`
draws a contact sheet, `dti evaluate` draws and scores every prompt. The verifier's scores are real. DINOv2 and SigLIP are
here TINY RANDOM MODELS in the real ones' place, which no network is needed for: their scores mean nothing.

With a GPU, after `dti data dreambooth`, all of the paper's comparison on SDXL:

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
    """Folders of a DINOv2 and a SigLIP that have learned nothing."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "sdxl" / "tokenizer")
    text = TINY | {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    dinov2 = Dinov2Model(Dinov2Config(**TINY | {"image_size": 32, "patch_size": 8}))
    siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=TINY | {"image_size": 32, "patch_size": 8}))
    processor = BitImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    for name, model in (("random-dinov2", dinov2), ("random-siglip", siglip)):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "random-siglip")
    return folder / "random-dinov2", folder / "random-siglip"


def run(*arguments: object) -> None:
    print("\n$ dti", *arguments)
    if status := dti([str(a) for a in arguments]):
        raise SystemExit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a real pipeline, with --data")
    parser.add_argument("--data", type=Path, help="its subjects")
    parser.add_argument("--methods", nargs="+", default=["dti", "ti", "crossinit", "dco", "oft"])
    parser.add_argument("--steps", type=int, help="of training; by default the method's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("out/protocol"))
    args = parser.parse_args()
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together")
    model, data, small, metrics, call = args.model, args.data, [], [], ["--seeds", *args.seeds]
    if model is None:
        torch.set_num_threads(1)  # more threads only wait for each other in a world as small as this
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
    run("generate", "--model", model, *concept, "--prompts", *prompts, "--output_dir", args.out / "pictures", *call)
    runs = [args.out / method for method in args.methods]
    runs += [f"{args.out / 'ti'}@mean"] if "ti" in args.methods else []
    run("evaluate", data, "--model", model, "--runs", *runs, *metrics, "--output_dir", args.out / "evaluation", *call)
    if metrics:
        print("The scores dinov2 and siglip are of tiny random models and mean nothing; subject and prompt are the verifier's.")


if __name__ == "__main__":
    main()
