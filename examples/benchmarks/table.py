"""Print all of what training and loading cost, in one table: `python examples/benchmarks/table.py`.

Each measurement is one of the other scripts, which say what it is. Times that depend on what the process has done before are
taken in processes of their own. The rows of full-size models need a GPU, and those of other programs their paths: see
`--models`. Without them they read "not measured".
"""

import argparse
import multiprocessing
import re
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import many_words
import peers
import torch
from pipelines import FAMILIES, RESOLUTION
from steps import FULL_CASES, Case, Times, measure, ratio, since, spread

from diffusers_dti import DTITrainer
from diffusers_dti.training import checkpoint

IMPORTS = (
    "import diffusers_dti",
    "from diffusers import DiffusionPipeline, ModularPipeline; from diffusers.loaders import TextualInversionLoaderMixin",
)
Rows = dict[str, str]  # a family's cells by the row's name


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns that runs in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def step_rows(case: Case, steps: int) -> Rows:
    """Measure steps beside their floor."""
    times: Times = measure(case, steps)
    rows = {}
    for kind, unit in enumerate(("CPU ms", "wall ms")):
        for name in ("ours", "floor"):
            rows[f"step, {name}, {unit}"] = spread([value[kind] for value in times[name]])
        rows[f"step, ours / floor, {unit.split()[0]}"] = f"{ratio(times, 'floor', kind):.3f}"
    return rows


def run_rows(case: Case, steps: int) -> Rows:
    """Measure a whole run: its memory, the time to the first step, and checkpoints."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pipe, photos = case.build(), case.photos()
    first: list[tuple[float, float]] = []
    saved: list[tuple[float, float]] = []
    save = checkpoint.save

    def saving(*args: Any) -> None:
        saved.append(case.timed(lambda: save(*args)))

    def note(trainer: DTITrainer, step: int) -> None:
        if step == 1:
            first.append(since(began, case.clock()))

    with tempfile.TemporaryDirectory() as folder, patch.object(checkpoint, "save", saving):
        trainer = case.trainer(pipe, max_train_steps=steps, checkpointing_steps=1, output_dir=folder)
        before = memory(case.device, reset=True)
        began = case.clock()
        trainer.fit(photos, callback_on_step_end=note)
    return {
        "peak memory above the pipeline, MB": f"{memory(case.device) - before:.0f}",
        "time to the first step, s, CPU / wall": " / ".join(f"{value / 1000:.2f}" for value in first[0]),
        "a checkpoint, CPU ms": spread([cpu for cpu, _ in saved]),
        "a checkpoint, wall ms": spread([wall for _, wall in saved]),
    }


def memory(device: str, reset: bool = False) -> float:
    """Return the peak memory in MB since the last reset; with `reset`, that in use now."""
    if device != "cpu":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 1e6
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # Linux
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak) * 1024 / 1e6


def word_rows(family: str, count: int) -> Rows:
    """Measure loading and unloading."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        times = many_words.measure(many_words.build(family), count, Path(folder))
    chosen = ("copy of the tables", "load the 1st to 5th", "unload one of 50", f"load {count:,} in one call")
    return {f"{name}, CPU ms a concept": f"{times[name]:.1f}" for name in (*chosen, f"unload {count:,} in one call")}


def import_rows(repeat: int) -> Rows:
    """Measure imports in pairs: ours, and what it builds on."""
    seconds: list[list[float]] = [[], []]
    for _ in range(repeat):
        for found, code in zip(seconds, IMPORTS):
            found.append(peers.run(["-c", code])[0])
    names = ("import, CPU s", "import of diffusers' classes, CPU s")
    return {name: f"{statistics.median(found):.2f}" for name, found in zip(names, seconds)}


def program_rows(family: str, args: argparse.Namespace) -> Rows:
    """Measure whole runs of other programs beside ours."""
    settings = vars(args) | {"family": family, "model": args.models / family, "resolution": RESOLUTION[family]}
    measured = peers.measure(argparse.Namespace(**settings))
    rows = {}
    for name in measured:
        step, times = peers.step_cell(measured, name).split(" | ")
        rows[f"a process, {name}, CPU ms a step"] = step if name == "diffusers-dti" else f"{step}, {times} times ours"
    return rows


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="few of each, to see that it works")
    parser.add_argument("--models", type=Path, help="folder of small pipelines, sdxl, sana and wan, for the other programs")
    peers.add_arguments(parser)
    args = parser.parse_args()
    if args.models and not args.photos:
        parser.error("the other programs need --photos")
    torch.set_num_threads(1)
    steps, saves, count, repeat = (2, 2, 60, 1) if args.quick else (100, 8, 1000, 3)
    table: dict[str, Rows] = {}
    for family in args.families:
        rows = step_rows(Case(family), steps) | in_new_process(run_rows, Case(family), saves)
        rows |= in_new_process(word_rows, family, count)
        rows |= program_rows(family, args) if args.models else {"other programs": "not measured"}
        (full,) = (case for case in FULL_CASES if case.family == family)
        if torch.cuda.is_available():
            measured = in_new_process(step_rows, full, steps // 4 + 1) | in_new_process(run_rows, full, saves)
            rows |= {f"full size: {name}": cell for name, cell in measured.items()}
        else:
            rows |= {"full size, on a GPU": "not measured"}
        table[family] = rows
    imports = import_rows(repeat)
    print(f"| | {' | '.join(table)} |\n|---|{'---|' * len(table)}")
    names = dict.fromkeys(name for rows in table.values() for name in rows)
    for name in names:
        print(f"| {name} | {' | '.join(rows.get(name, '') for rows in table.values())} |")
    for name, cell in imports.items():
        print(f"| {name} | {' | '.join([cell] * len(table))} |")


if __name__ == "__main__":
    main()
