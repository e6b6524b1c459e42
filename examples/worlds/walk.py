"""Compare ways to walk on the sphere, on dev subjects, by successive halving.

- `python walk.py 1` trains every walk for 100 steps: three subjects, one seed.
- `python walk.py 2` trains the best eight for 25 to 400 steps.
- `python walk.py 3` trains the best three of those, and the authors' walk, on six subjects with three seeds.
- `python walk.py report` prints what there is so far, and plots it.

A store keeps every run, so that each command resumes where it was stopped. Several processes can share the work: give them the
worlds in different orders. A walk's score is the mean of its subject and prompt scores over worlds, subjects and seeds.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import measure
import scenes
import torch
from diffusers import DiffusionPipeline
from gates import FOLDER, STUDIED, WORLDS, folder_of, open_world, world_of
from walks import CEILING, FLOOR, WALKS, variant

import diffusers_dti
from diffusers_dti import DirectionalInversion, DTITrainer
from diffusers_dti.evaluation.store import Store

LENGTHS = (25, 50, 100, 200, 400)
AUTHORS = "rsgd constant 0.01"
STAGES = {1: ((100,), 3, 1), 2: (LENGTHS, 3, 1), 3: (LENGTHS, 6, 3)}  # lengths, subjects, seeds
SECONDS_PER_STEP = 0.08  # on one core, to announce the time


def score(pipe: DiffusionPipeline, bundle: scenes.Bundle, seed: int, concept: DirectionalInversion) -> dict[str, float]:
    """Score a concept by the verifier."""
    pipe.load_directional_inversion(concept, token=measure.TOKEN)
    try:
        asked = measure.prompts(bundle, measure.TOKEN)
        return measure.scores(measure.generate(pipe, [p.text for p in asked], seed), asked)
    finally:
        pipe.unload_directional_inversion(measure.TOKEN)


def run(pipe: DiffusionPipeline, bundle: scenes.Bundle, seed: int, name: str, lengths: Sequence[int]) -> dict[str, Any]:
    """Train a walk for the greatest of `lengths`, and score it after each of them.

    Returns:
        For each length, as text, the scores with the angle and the held-out loss; and the "seconds" of CPU time of training.
    """
    if name in (FLOOR, CEILING):
        _, scores = measure.in_words(pipe, bundle, bundle.shape if name == FLOOR else None, seed)
        return {str(length): scores for length in lengths}
    walk, photos = WALKS[name], scenes.photos(bundle, pixels=world_of(pipe).pixels, seed=seed)
    with tempfile.TemporaryDirectory() as folder, variant(walk.variant):
        trainer = DTITrainer(
            pipe, placeholder_token=measure.TOKEN, initializer_token=bundle.shape, seed=seed,
            resolution=photos[0].width, output_dir=folder, max_train_steps=max(lengths), checkpointing_steps=5,
            heldout_loss_steps=math.gcd(*lengths), **walk.settings,
        )  # fmt: skip
        start = time.process_time()
        trainer.fit(photos)
        pipe.unload_directional_inversion(measure.TOKEN)
        found: dict[str, Any] = {"seconds": time.process_time() - start}
        for length in lengths:
            (entry,) = (entry for entry in trainer.history if entry["step"] == length)
            steps = range(max(10 * (length // 20), 5), length + 1, 5) if walk.average else (length,)
            path = [DirectionalInversion.from_pretrained(f"{folder}/checkpoint-{step}") for step in steps]
            concept = DirectionalInversion.mean(path) if walk.average else path[0]
            figures = {key: entry[key] for key in ("angle", "norm", "heldout_loss")}
            found[str(length)] = score(pipe, bundle, seed, concept) | figures
    return found


class Study:
    """The runs of all worlds, in a store.

    Args:
        path: the store's file.
        worlds: the worlds, in the order in which runs are made.
    """

    def __init__(self, path: Path, worlds: Sequence[str]):
        package = Path(diffusers_dti.__file__).parent
        code = [package / part for part in ("concept", "families", "pipeline", "training", "sphere.py")]
        code += [FOLDER / f"{name}.py" for name in ("scenes", "captions", "verifier", "gates", "measure", "walks")]
        self.stores = {w: Store(path, [*code, *folder_of(w).rglob("*.safetensors")]) for w in WORLDS}
        self.worlds = worlds

    def jobs(self, names: Sequence[str], stage: int) -> Iterator[tuple[dict[str, Any], str, scenes.Bundle]]:
        """Yield the settings of each run, with its world and subject. A rate that falls needs a run for each length."""
        lengths, subjects, seeds = STAGES[stage]
        for world in self.worlds:
            for bundle in scenes.DEV_SUBJECTS[:subjects]:
                for seed in range(seeds):
                    for name in names:
                        falls = WALKS[name].settings.get("lr_scheduler", "constant") != "constant"
                        for own in [(length,) for length in lengths] if falls else [lengths]:
                            yield {
                                "study": "walk", "world": world, "subject": bundle.words(), "seed": seed, "walk": name,
                                "lengths": list(own),
                            }, world, bundle  # fmt: skip

    def make(self, names: Sequence[str], stage: int) -> None:
        """Make the runs that the store does not have, and say how long that will take."""
        missing = [j for j in self.jobs(names, stage) if self.stores[j[1]].get(j[0]) is None]
        seconds = sum(SECONDS_PER_STEP * max(settings["lengths"]) + 4 for settings, _, _ in missing)
        print(f"Stage {stage}: {len(names)} walks, {len(missing)} runs to make, about {seconds / 60:.0f} minutes.", flush=True)
        pipes: dict[str, DiffusionPipeline] = {}
        for settings, world, bundle in missing:
            if self.stores[world].get(settings) is None:  # another process may have made it
                if world not in pipes:
                    pipes = {world: open_world(world)}
                result = run(pipes[world], bundle, settings["seed"], settings["walk"], settings["lengths"])
                self.stores[world].put(settings, result)

    def table(self, names: Sequence[str], stage: int) -> dict[str, dict[int, dict[str, list[dict[str, float]]]]]:
        """Return the scores of each walk at each length in each world, one for each subject and seed."""
        found: dict[str, dict[int, dict[str, list[dict[str, float]]]]] = {}
        for settings, world, _ in self.jobs(names, stage):
            result = self.stores[world].get(settings) or {}
            for length in settings["lengths"]:
                if str(length) in result:
                    at = found.setdefault(settings["walk"], {}).setdefault(length, {})
                    at.setdefault(world, []).append(result[str(length)])
        return found

    def best(self, names: Sequence[str], stage: int, count: int, length: int = 100) -> list[str]:
        """Return the best walks at a length, best first. Textual inversion is ranked by itself: one of it in four."""
        table = self.table(names, stage)
        ranked = sorted(names, key=lambda name: -overall(table.get(name, {}).get(length, {})))
        classic = [name for name in ranked if name.startswith("ti ")][: max(count // 4, 1)]
        ours = [name for name in ranked if not name.startswith("ti ") and name not in (FLOOR, CEILING)][:count]
        return list(dict.fromkeys([*ours, AUTHORS, *classic, FLOOR, CEILING]))


def mean_of(results: Sequence[Mapping[str, float]], key: str) -> float:
    """Return the mean of a score."""
    return statistics.mean(result[key] for result in results)


def overall(worlds: Mapping[str, Sequence[Mapping[str, float]]]) -> float:
    """Return the mean of both scores over worlds; -1 if a world is missing."""
    if not worlds.keys() >= set(STUDIED):
        return -1.0
    return statistics.mean(
        (mean_of(found, "subject") + mean_of(found, "prompt")) / 2 for found in (worlds[name] for name in STUDIED)
    )


def report(study: Study, stage: int, names: Sequence[str]) -> None:
    """Print the subject / prompt scores of every walk at every length."""
    table = study.table(names, stage)
    lengths = STAGES[stage][0]
    columns = [(world, length) for world in study.worlds for length in lengths]
    print(f"\nStage {stage}: subject / prompt")
    print("| walk | " + " | ".join(f"{world} {length}" for world, length in columns) + " | all |")
    print("|---" * (len(columns) + 2) + "|")
    for name in sorted(table, key=lambda name: -overall(table[name].get(100, {}))):
        cells = []
        for world, length in columns:
            found = table[name].get(length, {}).get(world)
            cells.append(f"{mean_of(found, 'subject'):.3f} / {mean_of(found, 'prompt'):.3f}" if found else "-")
        print(f"| {name} | " + " | ".join(cells) + f" | {overall(table[name].get(100, {})):.3f} |")


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the rank correlation of pairs, NaN if one side never changes; ties have their mean rank."""
    columns = torch.tensor(pairs, dtype=torch.float64).T
    above, equal = (columns[:, :, None] > columns[:, None]).sum(-1), (columns[:, :, None] == columns[:, None]).sum(-1)
    return torch.corrcoef(above + equal / 2)[0, 1].item()


def report_heldout(study: Study, stage: int, names: Sequence[str]) -> None:
    """Print how the held-out loss goes with the score, from -1 if it predicts it perfectly."""
    runs: dict[str, dict[tuple[Any, ...], list[tuple[float, float]]]] = {}
    for settings, world, _ in study.jobs([name for name in names if name not in (FLOOR, CEILING)], stage):
        for length in settings["lengths"]:
            result = (study.stores[world].get(settings) or {}).get(str(length))
            if result:
                pair = (result["heldout_loss"], (result["subject"] + result["prompt"]) / 2)
                subject = (settings["subject"], settings["seed"])
                for what, group in (("steps of a walk", (subject, settings["walk"])), ("walks at a step", (subject, length))):
                    runs.setdefault(f"{world}, {what}", {}).setdefault(group, []).append(pair)
    print("\nRank correlation of held-out loss and score, mean over subjects and seeds:")
    for what, groups in runs.items():
        found = [
            spearman(pairs) for pairs in groups.values() if min(len({x for x, _ in pairs}), len({y for _, y in pairs})) > 1
        ]
        if found:
            print(f"- {what}: {statistics.mean(found):.2f} ({len(found)} groups, {sum(r < 0 for r in found)} of them negative)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["1", "2", "3", "report"], help="the stage to run")
    parser.add_argument("--worlds", nargs="+", default=list(STUDIED), choices=WORLDS, help="the worlds, in order")
    parser.add_argument("--walks", nargs="+", default=list(WALKS), choices=WALKS, help="the walks (default: all)")
    parser.add_argument("--results", type=Path, default=Path("out/walk.jsonl"), help="store for the runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study, names = Study(args.results, args.worlds), args.walks
    if args.stage == "1":
        study.make(names, 1)
    everywhere = Study(args.results, list(dict.fromkeys([*STUDIED, *args.worlds])))
    eight = everywhere.best(names, 1, 8)
    if args.stage == "2":
        study.make(eight, 2)
    three = everywhere.best(eight, 2, 3)
    if args.stage == "3":
        study.make(three, 3)
    for stage, own in ((1, names), (2, eight), (3, three)):
        report(everywhere, stage, own)
        report_heldout(everywhere, stage, own)


if __name__ == "__main__":
    main()
