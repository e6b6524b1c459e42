"""Compare methods in a world.

- `python study.py dev` runs every method at three rates on the dev subjects.
- `python study.py test` runs all methods on the test subjects, each at its best rate, and TI at every rate.
- `python study.py ablations` varies kappa and the scale on the test subjects.

Each row of the table is the mean of two scores over subjects and seeds; measure.py defines them. A store keeps the results. A
run is not repeated as long as the code that it depends on stays the same.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import scenes
import torch
from diffusers import DiffusionPipeline
from gates import FOLDER, WORLDS, folder_of, open_world

from diffusers_dti.evaluation import summary
from diffusers_dti.evaluation.store import Store

ADAPTER_RATES: dict[str, tuple[float, ...]] = {"adapter_learning_rate": (5e-5, 5e-4, 5e-3)}
RATES: dict[str, tuple[float, ...]] = {"learning_rate": (0.001, 0.005, 0.02)}  # before `scale_lr` multiplies them
# Each method's settings, and the rates to choose from. DTI has the authors' rate.
METHODS: dict[str, tuple[dict[str, Any], dict[str, tuple[float, ...]]]] = {
    "DTI": ({}, {}),
    "TI": ({"method": "ti"}, RATES),
    "CrossInit": ({"method": "crossinit"}, RATES),
    "AdamW on the direction": ({"optimizer": "adamw"}, RATES),
    "DTI, trained magnitude": ({"train_magnitude": True}, {}),
    "DTI + LoRA (pivotal tuning)": ({"adapter": "lora", "max_train_steps": 250}, ADAPTER_RATES),
    "DCO + DTI": ({"method": "dco"}, ADAPTER_RATES),
    "OFT + DTI": ({"method": "oft"}, ADAPTER_RATES),
}
# The best rate on the dev subjects of the first worlds: the one with the highest sum of subject and prompt score.
CHOSEN = {
    "sdxl": {
        "TI": 0.005,
        "CrossInit": 0.02,
        "AdamW on the direction": 0.001,
        "DTI + LoRA (pivotal tuning)": 5e-5,
        "DCO + DTI": 5e-5,
        "OFT + DTI": 5e-5,
    },
    "sana": {"TI": 0.02},
    "wan": {"TI": 0.02},
}
ABLATIONS = {f"kappa {kappa:g}": {"kappa": kappa} for kappa in (0.0, 5e-4, 5e-3, 5e-2)} | {
    f"scale {scale}": {"token_scale": scale} for scale in ("min", "max", "initializer", 5.0)
}

# The settings of a training run. Without training: "initializer" for that word, or None for the subject's description.
Job = dict[str, Any] | str | None


def jobs(split: str, world: str) -> Iterator[tuple[str, Job]]:
    """Yield the name and the job of each row of the table, in order."""
    yield "initializer word", "initializer"
    yield "description in words", None
    if split == "ablations":
        yield "DTI: kappa 0.0001, scale mean", {}
        yield from ABLATIONS.items()
        return
    for name, (settings, rates) in METHODS.items():
        if not rates:
            yield name, settings
        for field, values in rates.items():
            for rate in values:
                # Every rate of TI is reported, because TI is the baseline for all others.
                if split == "test" and name != "TI" and rate != CHOSEN[world].get(name):
                    continue
                yield f"{name}, rate {rate:g}", settings | {field: rate}


def run_job(pipe: DiffusionPipeline, bundle: scenes.Bundle, seed: int, job: Job) -> dict[str, Any]:
    """Run a job for a subject and a seed, and return its scores."""
    if isinstance(job, dict):
        _, learned, _ = measure.learn(pipe, bundle, seed, **job)
        return learned
    _, described = measure.in_words(pipe, bundle, job and bundle.shape, seed)
    return dict(described)


def result_rows(name: str, figures: dict[str, Any], subject: str, seed: int) -> list[dict[str, Any]]:
    """Return the table's results of a job: its own, and those of the rescaled concept if there are any."""
    rows = {name: figures}
    if "rescaled" in figures:
        rows[f"{name}, rescaled"] = figures["rescaled"]
    results = []
    for row, own in rows.items():
        scores = {score: own[score] for score in ("subject", "prompt", "norm")}
        results.append({"run": row, "subject": subject, "prompt": "", "seed": seed, "scores": scores})
    return results


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Results of all jobs, as `summarize` takes them."""
    pipe = open_world(args.world)
    # Results depend on all of the package that training and loading use, and on what scores are made of.
    others = ("diffusers_dti.evaluation", "diffusers_dti.figures")
    code = [Path(m.__file__) for n, m in sys.modules.items() if n.startswith("diffusers_dti.") and not n.startswith(others)]
    code += [FOLDER / f"{name}.py" for name in ("scenes", "verifier", "gates", "measure")]
    store = Store(args.results, [*code, FOLDER / "captions.py", *folder_of(args.world).rglob("*.safetensors")])
    subjects = (scenes.DEV_SUBJECTS if args.split == "dev" else scenes.TEST_SUBJECTS)[: args.subjects]
    results: list[dict[str, Any]] = []
    for bundle in subjects:
        for seed in range(args.seeds):
            for name, job in jobs(args.split, args.world):
                if args.methods and name.partition(", rate")[0] not in args.methods:
                    continue
                if isinstance(job, dict) and args.steps:
                    job = job | {"max_train_steps": args.steps}
                key = {"world": args.world, "subject": bundle.words(), "seed": seed, "job": job}
                figures = store.get(key)
                if figures is None:
                    figures = run_job(pipe, bundle, seed, job)
                    store.put(key, figures)
                results += result_rows(name, figures, bundle.words(), seed)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", choices=["dev", "test", "ablations"], help="the study to run")
    parser.add_argument("--world", default="sdxl", choices=WORLDS, help="the world to run it in (default: sdxl)")
    parser.add_argument("--results", type=Path, default=Path("out/results.jsonl"), help="store for the results of all studies")
    parser.add_argument("--subjects", type=int, default=6, help="number of subjects (default: 6)")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds (default: 2)")
    parser.add_argument("--steps", type=int, help="training steps (default: those of the method and the pipeline's family)")
    parser.add_argument("--methods", nargs="+", help="run only these methods, by their names in the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = summary.summarize(run(args))
    print(f"{args.world}, {args.split}: means over subjects, with 95 % bootstrap intervals")
    print(summary.markdown(results).split("\n\n")[0].replace(" pictures |", " runs |"))
    plot = args.results.parent / f"{args.world}-{args.split}.png"
    methods = {name: r for name, r in results.items() if name not in ("initializer word", "description in words")}
    summary.figure(methods or results, "prompt", "subject", plot)  # the floor and the ceiling would crowd the others
    print(f"See {plot}.")


if __name__ == "__main__":
    main()
