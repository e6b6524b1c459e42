"""Compare whole training runs with other programs: `python examples/benchmarks/peers.py sdxl --model FOLDER --photos FOLDER`.

Each program is run as a process of its own, for two numbers of steps, in strict alternation. What a step costs is the
difference between the two; the rest is loading, encoding of photos, and saving. The scripts are given by the folders of their
repositories, of which nothing is in this one: `--authors` (github.com/kunheek/dti) and `--diffusers`
(github.com/huggingface/diffusers). All programs get the same model, photos, resolution and batch size, and learn one vector in
float32, without checkpoints and images. They differ in what they encode: the scripts pad prompts to 300 (SANA) or 512 (Wan)
tokens, and encode photos at every step.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

TOKEN, WORD = "<zog>", "dog"
Command = Callable[[int, str], list[str]]  # for a number of steps, and a folder to write to


def commands(args: argparse.Namespace) -> dict[str, Command]:
    """Return the programs' commands by name, without the interpreter."""
    theirs = [
        f"--pretrained_model_name_or_path={args.model}", f"--train_data_dir={args.photos}", "--learnable_property=object",
        f"--placeholder_token={TOKEN}", f"--initializer_token={WORD}", f"--resolution={args.resolution}",
        f"--train_batch_size={args.batch}", "--gradient_accumulation_steps=1", "--mixed_precision=no", "--save_steps=1000000",
        "--seed=0", "--learning_rate=0.01",
    ]  # fmt: skip
    found: dict[str, Command] = {}

    def ours(steps: int, folder: str) -> list[str]:
        """Train by the command line."""
        return [
            "-m", "diffusers_dti.cli", "train", str(args.photos), "--model", str(args.model), "--placeholder_token", TOKEN,
            "--initializer_token", WORD, "--output_dir", folder, "--max_train_steps", str(steps),
            "--resolution", str(args.resolution), "--train_batch_size", str(args.batch), "--gradient_accumulation_steps", "1",
            "--heldout_loss_steps", "0",
        ]  # fmt: skip

    found["diffusers-dti"] = ours
    if args.authors:
        script = args.authors / "scripts" / f"train_{args.family}.py"
        own = ["--validation_steps=1000000", "--validation_prompt=", "--init_method=token", "--token_scale=mean", "--beta=0.0"]
        found["the paper's authors"] = lambda steps, folder: [
            str(script), *theirs, *own, f"--output_dir={folder}", f"--max_train_steps={steps}", *args.authors_options
        ]  # fmt: skip
    if args.diffusers and args.family == "sdxl":
        script_of_diffusers = args.diffusers / "examples" / "textual_inversion" / "textual_inversion_sdxl.py"
        found["diffusers' script"] = lambda steps, folder: [
            str(script_of_diffusers), *theirs, f"--output_dir={folder}", f"--max_train_steps={steps}"
        ]  # fmt: skip
    return found


def run(command: list[str]) -> tuple[float, float]:
    """Run a command in a process of its own, and return its CPU time in seconds and its peak memory in MB.

    Raises:
        RuntimeError: if it fails.
    """
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    output = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command[0]} failed:\n{output.decode(errors='replace')[-2000:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def check_learned(folder: Path) -> None:
    """Check that a program has learned one vector for each encoder.

    Raises:
        RuntimeError: if it has not.
    """
    files = sorted(folder.rglob("learned_embeds*.safetensors"))
    sizes = [len(torch.atleast_2d(rows)) for file in files for rows in load_file(file).values()]
    if set(sizes) != {1}:
        raise RuntimeError(f"{folder} has {sizes} vectors in {len(files)} files, not one in each.")


Programs = dict[str, list[tuple[float, float, float]]]  # milliseconds a step, seconds of the rest, peak MB of each run


def measure(args: argparse.Namespace) -> Programs:
    """Run the programs in alternation, and return what each run took."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    programs, few, many = commands(args), *args.steps
    measured: Programs = {name: [] for name in programs}
    for _ in range(args.repeat):
        for name, command in programs.items():
            with tempfile.TemporaryDirectory() as folder:
                (short, _), (long, memory) = (run(command(steps, f"{folder}/{steps}")) for steps in (few, many))
                check_learned(Path(folder) / str(many))
            step = (long - short) / (many - few)
            measured[name].append((step * 1000, short - few * step, memory))
    return measured


def step_cell(measured: Programs, name: str) -> str:
    """Return the median of a program's steps, with their range and how many times ours it is."""
    steps = [step for step, _, _ in measured[name]]
    base = statistics.median(step for step, _, _ in measured["diffusers-dti"])
    middle = statistics.median(steps)
    return f"{middle:.1f} [{min(steps):.1f}, {max(steps):.1f}] | {middle / base:.2f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which programs are run, and how long."""
    parser.add_argument("--photos", type=Path, help="folder of square photos")
    parser.add_argument("--authors", type=Path, help="folder of the paper's repository")
    parser.add_argument("--authors_options", nargs="*", default=[], help="further options of its script")
    parser.add_argument("--diffusers", type=Path, help="folder of diffusers' repository")
    parser.add_argument("--batch", type=int, default=1, help="batch size (default: 1)")
    parser.add_argument("--steps", type=int, nargs=2, default=[10, 160], help="the two numbers of steps (default: 10 160)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each (default: 3)")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=["sdxl", "sana", "wan"])
    parser.add_argument("--model", type=Path, required=True, help="folder of a pipeline, small enough for this machine")
    parser.add_argument("--resolution", type=int, default=128, help="pixels (default: 128)")
    add_arguments(parser)
    args = parser.parse_args()
    if args.photos is None:
        parser.error("the programs need --photos")
    measured = measure(args)
    print("| program | CPU ms a step | times ours | CPU s of the rest | peak MB |\n|---|---|---|---|---|")
    for name, values in measured.items():
        _, rest, memory = (statistics.median(column) for column in zip(*values))
        print(f"| {name} | {step_cell(measured, name)} | {rest:.1f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
