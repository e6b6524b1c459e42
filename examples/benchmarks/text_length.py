"""Measure the gain of encoding prompts at their real length: `python examples/benchmarks/text_length.py wan`.

The script measures a training step of the same model in two ways, each in its own process, alternating: with prompts as the
trainer encodes them, and with prompts padded to 300 or 512 positions, as the pipeline encodes them. The models have random
weights. They have the widths, heads and vocabularies of SANA 1.5 1.6B and Wan 2.1 1.3B with their text encoders, and a share
of their layers (use `--share 1` for all layers, on a GPU). The latents have the size of the authors' resolutions.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from pipelines import FULL, SMALL
from pipelines import build as build_pipeline

from diffusers_dti.families import find_family
from diffusers_dti.families.base import Batch
from diffusers_dti.pipeline.text_encoders import find_text_encoders
from diffusers_dti.training.trainable import TrainableRows

PROMPT, WORD = "a photo of a dog on the beach", "dog"
LATENTS = {"sana": (1, 32, 32, 32), "wan": (1, 16, 1, 64, 64)}


def build(family: str, share: float, device: str) -> DiffusionPipeline:
    """Build the pipeline with a share of its layers, and a tiny VAE, because a training step does not use it."""
    encoder, transformer = FULL[family]["text_encoder"], FULL[family]["transformer"]
    layers = "num_hidden_layers" if family == "sana" else "num_layers"
    configs = {
        "text_encoder": encoder | {layers: round(encoder[layers] * share)},
        "transformer": transformer | {"num_layers": round(transformer["num_layers"] * share)},
        "vae": SMALL[family]["vae"],
    }
    return build_pipeline(family, {family: configs}, device, torch.float32 if device == "cpu" else torch.bfloat16)


def measure(family: str, how: str, share: float, device: str, steps: int) -> dict[str, float]:
    """Measure training steps: the median seconds, the memory and the last gradient's norm."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pipe = build(family, share, device)
    for module in (pipe.text_encoder, pipe.transformer, pipe.vae):
        module.eval().requires_grad_(False)
    rows = TrainableRows(
        [pipe.tokenizer.convert_tokens_to_ids(WORD)],
        torch.nn.functional.normalize(torch.randn(1, pipe.text_encoder.config.hidden_size)), torch.ones(1),
    ).to(device)  # fmt: skip
    latents = torch.randn(LATENTS[family], device=device)
    batch = Batch(latents, latents.flip(-1), None, torch.tensor([500], device=device), [PROMPT], [], [], (0, 0), [0])
    module = find_family(pipe)

    def condition() -> dict[str, Any]:
        """Encode the prompt."""
        if how == "real":
            return module.encode_prompts(batch.prompts, batch.zero_pads)
        if family == "sana":
            states, mask = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, device=device)[:2]
            return {"context": states, "mask": mask}
        return {"context": pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=512)[0]}

    def memory() -> float:
        """Return the peak memory of the process so far, in GB."""
        if device != "cpu":
            return torch.cuda.max_memory_allocated() / 1e9
        (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(peak) * 1024 / 1e9

    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which came from building the model (Linux)
    before, seconds = memory(), []
    with rows.swapped_in(find_text_encoders(pipe)["text_encoder"]):
        for _ in range(steps):
            start = time.perf_counter()
            module.loss(batch, condition()).backward()
            gradient = rows.direction.grad.norm().item()  # also waits for the device
            rows.direction.grad = None
            seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "GB above the weights": memory() - before, "gradient": gradient}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=["sana", "wan"], help="the model family")
    parser.add_argument("--share", type=float, default=1 / 6, help="share of the layers (default: 1/6)")
    parser.add_argument("--steps", type=int, default=3, help="steps; the first one is not counted (default: 3)")
    parser.add_argument("--device", default="cpu", help="the device (default: cpu)")
    parser.add_argument("--repeat", type=int, default=2, help="processes of each kind (default: 2)")
    parser.add_argument("--how", choices=["real", "padded"], help=argparse.SUPPRESS)  # for the measuring processes
    args = parser.parse_args()
    if args.how:
        print(json.dumps(measure(args.family, args.how, args.share, args.device, args.steps)))
        return
    found: dict[str, list[dict[str, float]]] = {"real": [], "padded": []}
    for _ in range(args.repeat):
        for how, runs in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--how", how]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs.append(json.loads(output.splitlines()[-1]))
            print(how, runs[-1], flush=True)
    for key in ("seconds", "GB above the weights"):
        real, padded = (statistics.median(r[key] for r in found[how]) for how in ("real", "padded"))
        print(f"{args.family}, {key}: real length {real:.2f}, padded {padded:.2f}, ratio {real / padded:.2f}")


if __name__ == "__main__":
    main()
