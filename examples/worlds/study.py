"""Compare methods in the worlds: `python study.py` makes every run, and writes the tables and the figure of docs/study.md.

- `python study.py --parts main --worlds sdxl` makes the runs of one part in one world.
- `python study.py report` only writes the tables and the figure, from the runs that there are.

The store keeps every run, so that the study goes on where it was stopped. Several processes can share the work. measure.py
defines the scores, and rows.py says what is compared.
"""

import argparse
import math
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import report
import scenes
import torch
from asides import ASIDES
from captions import NOUNS
from diffusers import DiffusionPipeline
from gates import FOLDER, STUDIED, folder_of, open_world, world_of
from rows import CEILING, FLOOR, NEW, PARTS, RANDOM, TI_INFLATED, Row

import diffusers_dti
from diffusers_dti import DirectionalInversion, DTITrainer
from diffusers_dti.evaluation.store import Store


def more_subjects() -> list[scenes.Bundle]:
    """Return ten more held-out subjects to choose by: one of each shape, and four of colors and shapes on which walks fail."""
    taken = {*scenes.DEV_SUBJECTS, *scenes.TEST_SUBJECTS, *scenes.FRESH_SUBJECTS}
    free, rng = [bundle for bundle in scenes.HELD_BUNDLES if bundle not in taken], random.Random(11)
    drawn = [rng.choice([bundle for bundle in free if bundle.shape == shape]) for shape in scenes.SHAPES]
    hard = [b for b in free if b.shape in ("star", "cross", "pillar") and b.fill in ("yellow", "cyan") and b not in drawn]
    return drawn + hard[:4]


SUBJECTS = {
    "dev": scenes.DEV_SUBJECTS, "more": more_subjects(), "test": scenes.TEST_SUBJECTS, "fresh": scenes.FRESH_SUBJECTS,
}  # fmt: skip
SECONDS, SECONDS_PER_STEP = 6, 0.06  # for scores and for a step, on one core: to announce the time


@dataclass(frozen=True)
class Job:
    """A run of the study."""

    world: str
    split: str
    bundle: scenes.Bundle
    seed: int
    row: Row
    lengths: tuple[int, ...]

    @property
    def key(self) -> dict[str, Any]:
        """What the store finds the run by: parts share runs that are the same."""
        named = {"words": self.row.name} if self.row.name in (FLOOR, CEILING) else {"settings": dict(self.row.settings)}
        return named | {
            "study": "methods", "world": self.world, "subject": self.bundle.words(), "seed": self.seed,
            "lengths": list(self.lengths), "uses": {name: dict(use) for name, use in self.row.uses.items()},
            "start": self.row.start,
        }  # fmt: skip


def run(pipe: DiffusionPipeline, job: Job) -> dict[str, Any]:
    """Train, and score every use after each length.

    Returns:
        For each length, as text, the scores of each use, with the angle and the held-out loss of the run; and the "seconds" of
        CPU time of training, and what it started from.
    """
    row, bundle, seed = job.row, job.bundle, job.seed
    if row.name in (FLOOR, CEILING):
        _, scores = measure.in_words(pipe, bundle, bundle.shape if row.name == FLOOR else None, seed)
        return {str(length): {use: scores for use in row.uses} for length in job.lengths}
    start = random.Random(f"{bundle.words()} {seed}").choice(list(NOUNS)) if row.start == RANDOM else row.start or bundle.shape
    photos, every = scenes.photos(bundle, pixels=world_of(pipe).pixels, seed=seed), math.gcd(*job.lengths)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DTITrainer(
            pipe, placeholder_token=measure.TOKEN, initializer_token=start, seed=seed, resolution=photos[0].width,
            output_dir=folder, max_train_steps=max(job.lengths), checkpointing_steps=every, heldout_loss_steps=every,
            **row.settings,
        )  # fmt: skip
        began = time.process_time()
        trainer.fit(photos)
        pipe.unload_directional_inversion(measure.TOKEN)
        assert trainer.inversion is not None
        training = trainer.inversion.metadata["training"]
        found: dict[str, Any] = {"seconds": time.process_time() - began, "start": training["initializer_token"]}
        for length in job.lengths:
            (entry,) = (entry for entry in trainer.history if entry["step"] == length)
            concept = DirectionalInversion.from_pretrained(f"{folder}/checkpoint-{length}")
            own = {"angle": entry["angle"], "heldout_loss": entry["heldout_loss"]}
            found[str(length)] = {use: own | score(pipe, job, concept, how) for use, how in row.uses.items()}
        if trainer.adapter is not None:
            pipe.unload_lora_weights()
    return found


def score(pipe: DiffusionPipeline, job: Job, concept: DirectionalInversion, use: Mapping[str, Any]) -> dict[str, float]:
    """Score a concept by the verifier; its norm is in multiples of the vocabulary's mean norm."""
    pipe.load_directional_inversion(concept, token=measure.TOKEN, token_scale="mean")
    usual = pipe.directional_inversions[measure.TOKEN].scales
    pipe.unload_directional_inversion(measure.TOKEN)
    loaded = pipe.load_directional_inversion(concept, token=measure.TOKEN, **use)
    try:
        asked = measure.prompts(job.bundle, measure.TOKEN)
        scores = measure.scores(measure.generate(pipe, [p.text for p in asked], job.seed), asked)
        return scores | {"norm": torch.cat([loaded.scales[c] / usual[c] for c in usual]).mean().item()}
    finally:
        pipe.unload_directional_inversion(measure.TOKEN)


class Study:
    """The runs, in a store that knows the code that they depend on.

    Args:
        path: the store's file.
    """

    def __init__(self, path: Path):
        package = Path(diffusers_dti.__file__).parent
        code = [package / part for part in ("concept", "families", "pipeline", "training", "sphere.py")]
        code += [FOLDER / f"{name}.py" for name in ("scenes", "captions", "verifier", "gates", "measure")]
        self.stores = {w: Store(path, [*code, *folder_of(w).rglob("*.safetensors")]) for w in STUDIED}

    def jobs(self, part: str, worlds: Sequence[str], splits: Sequence[str], seeds: int) -> Iterator[Job]:
        """Yield the runs of a part, one seed after the other."""
        own = PARTS[part]
        for seed in range(min(seeds, own.seeds)):
            for world in worlds:
                for split in (split for split in own.splits if split in splits):
                    for bundle in SUBJECTS[split]:
                        for row in own.rows[world]:
                            for lengths in row.runs:
                                yield Job(world, split, bundle, seed, row, lengths)

    def result(self, job: Job) -> dict[str, Any] | None:
        """Return the result of a run, or None if it has not been made."""
        return self.stores[job.world].get(job.key)

    def aside(self, name: str, world: str, make: bool = False) -> list[list[str]] | None:
        """Return the table of one of `ASIDES` in a world; None if it has not been made."""
        key = {"study": "asides", "name": name, "world": world, "rows": [dict(NEW), TI_INFLATED[world]]}
        if make and self.stores[world].get(key) is None:
            print(f"{name}, {world}", flush=True)
            self.stores[world].put(key, {"table": ASIDES[name](world)})
        return (self.stores[world].get(key) or {}).get("table")

    def make(self, jobs: Sequence[Job]) -> None:
        """Make the runs that the store does not have, and say how long that will take."""
        missing = [job for job in jobs if self.result(job) is None]
        uses = sum(len(job.lengths) * len(job.row.uses) for job in missing)
        seconds = sum(SECONDS_PER_STEP * max(job.lengths) for job in missing) + SECONDS * uses
        print(f"{len(missing)} of {len(jobs)} runs to make, about {seconds / 60:.0f} minutes on one core.", flush=True)
        pipes: dict[str, DiffusionPipeline] = {}
        for job in missing:
            if self.result(job) is None:  # another process may have made it
                pipes[job.world] = pipes.get(job.world) or open_world(job.world)
                self.stores[job.world].put(job.key, run(pipes[job.world], job))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["all", "report"], default="all", help="what to do (default: all)")
    parser.add_argument(
        "--parts", nargs="+", default=[*PARTS, *ASIDES], choices=[*PARTS, *ASIDES], help="the parts to run (default: all)"
    )
    parser.add_argument("--worlds", nargs="+", default=list(STUDIED), choices=STUDIED, help="the worlds (default: all)")
    parser.add_argument("--splits", nargs="+", default=list(SUBJECTS), choices=SUBJECTS, help="the subjects (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="the greatest number of seeds (default: 3)")
    parser.add_argument("--results", type=Path, default=Path("out/study.jsonl"), help="store for the runs")
    root = FOLDER.parents[1]
    pages = [root / "docs" / "study.md"]
    parser.add_argument("--pages", type=Path, nargs="+", default=pages, help="the pages with tables to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(args.results)
    if args.what == "all":
        for part in (part for part in args.parts if part in ASIDES):
            for world in args.worlds:
                study.aside(part, world, make=True)
        for part in (part for part in args.parts if part in PARTS):
            study.make(list(study.jobs(part, args.worlds, args.splits, args.seeds)))
    report.write(study, args.pages)


if __name__ == "__main__":
    main()
