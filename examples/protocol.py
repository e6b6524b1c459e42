"""The paper's protocol from end to end, by the command `dti`: `python examples/protocol.py`, some minutes on a CPU.

Photos of three subjects of the small SDXL world are written to files; `dti train` learns each by DTI and TI, `dti generate`
draws a contact sheet, `dti evaluate` draws and scores every prompt. The verifier's scores are real. DINOv2 and SigLIP are
here TINY RANDOM MODELS in the real ones' place, which no network is needed for: their scores mean nothing.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, BitImageProcessor, Dinov2Config, Dinov2Model, SiglipConfig, SiglipModel

sys.path.insert(0, str(Path(__file__).parent / "worlds"))

import dataset
import scenes
from gates import FOLDER

from diffusers_dti_cli import main as dti

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
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--subjects", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("out/protocol"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # more threads only wait for each other in a world as small as this
    model, bundles = ("--model", FOLDER / "sdxl"), scenes.TEST_SUBJECTS[: args.subjects]
    data = dataset.write(args.out / "data", bundles, pixels=32)
    dinov2, siglip = random_models(args.out / "models")
    for method, rate in (("dti", 0.01), ("ti", 0.02)):
        settings = ("--method", method, "--learning_rate", rate, "--resolution", 32, "--max_train_steps", args.steps)
        run("train", data, *model, *settings, "--output_dir", args.out / method)
    call = ("--seeds", *args.seeds, "--batch_size", 32, "--call", "num_inference_steps=12", "guidance_scale=3")
    first = dataset.name_of(bundles[0])
    prompts = (f"a large <{first}> on the left on a striped pink background", f"a small <{first}> at the top")
    concept = ("--concepts", args.out / "dti" / first)
    run("generate", *model, *concept, "--prompts", *prompts, "--output_dir", args.out / "pictures", *call)
    metrics = (f"dinov2={dinov2}", f"siglip={siglip}", f"{Path(dataset.__file__)}:verify")
    runs = (args.out / "dti", args.out / "ti", f"{args.out / 'ti'}@mean")
    run("evaluate", data, *model, "--runs", *runs, "--metrics", *metrics, "--output_dir", args.out / "evaluation", *call)
    print("The scores dinov2 and siglip are of tiny random models and mean nothing; subject and prompt are the verifier's.")


if __name__ == "__main__":
    main()
