"""Measure how the cost of training grows: `python examples/benchmarks/growth.py`.

One thing is changed at a time: photos, batch, vectors, concepts, vocabulary, or resolution. The runs are short, in turns, on
one thread, with the small pipelines of the other benchmarks. What comes until the first step is done: the photos are encoded,
the placeholder is put into tokenizer and table, and the step itself.
"""

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
from pipelines import FAMILIES, VOCABULARY, build
from steps import SKIPPED, Case, spread

from diffusers_dti import DTITrainer

VALUES = {
    "photos": (1, 4, 16), "batch": (1, 2, 4, 8), "vectors": (1, 2, 4, 8), "concepts": (1, 2, 4),
    "vocabulary": (16_000, 64_000, 256_000), "resolution": (128, 256, 512),
}  # fmt: skip


def run(case: Case, what: str, value: int, steps: int) -> tuple[float, list[float]]:
    """Return the CPU time until the first step is done, in seconds, and of further steps, in milliseconds."""
    settings: dict[str, Any] = {"max_train_steps": steps + SKIPPED}
    if what in ("batch", "vectors", "resolution"):
        settings[{"batch": "train_batch_size", "vectors": "num_vectors"}.get(what, what)] = value
    if what == "concepts":
        settings["placeholder_token"] = None
    pipe = build(case.family, vocabulary=value if what == "vocabulary" else VOCABULARY[case.family])
    photos = case.photos(value if what == "photos" else 4)
    images = {f"<dog{number}>": photos for number in range(value)} if what == "concepts" else photos
    ends = [time.process_time()]

    def note(trainer: DTITrainer, step: int) -> None:
        ends.append(time.process_time())

    case.trainer(pipe, **settings).fit(images, callback_on_step_end=note)
    times = [(end - start) * 1000 for start, end in itertools.pairwise(ends)]
    return times[0] / 1000, times[SKIPPED:]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", choices=FAMILIES, default="sana", help="the family (default: sana)")
    parser.add_argument("--what", nargs="+", choices=VALUES, default=list(VALUES), help="what to change (default: each)")
    parser.add_argument("--steps", type=int, default=10, help="steps of a run (default: 10)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each value (default: 3)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    case = Case(args.family)
    run(case, "photos", 1, 1)  # what a process does only once
    print(f"| {args.family} | CPU ms a step | CPU s until the first |\n|---|---|---|")
    for what in args.what:
        first: dict[int, list[float]] = {value: [] for value in VALUES[what]}
        times: dict[int, list[float]] = {value: [] for value in VALUES[what]}
        for _ in range(args.repeat):
            for value in VALUES[what]:
                torch.manual_seed(0)
                start, steps = run(case, what, value, args.steps)
                first[value].append(start)
                times[value] += steps
        for value in VALUES[what]:
            print(f"| {what} {value:,} | {spread(times[value])} | {statistics.median(first[value]):.2f} |", flush=True)


if __name__ == "__main__":
    main()
