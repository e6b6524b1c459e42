"""Learn a world's dev subjects one by one and many at a time: `python examples/benchmarks/subjects.py sdxl --at_a_time 1 2 6`.

Each number of subjects at a time has a process of its own. The table has the CPU time of a step for each subject, the subjects
that an hour of CPU time learns, photos and held-out losses included, the peak of the memory, the angle in degrees of the
learned directions to those of the first row, mean and greatest, and the verifier's scores.

The last row is the first one again, with each direction turned by 1e-7 before the first step: what rounding alone changes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[1] / "worlds"))
import measure
import scenes
from gates import WORLDS, open_world, world_of

from diffusers_dti import DirectionalInversion, DTITrainer
from diffusers_dti.sphere import angle
from diffusers_dti.training import together


def learn(
    pipe: DiffusionPipeline, count: int, at_a_time: int, seed: int, turned: float = 0.0, **settings: Any
) -> tuple[list[DirectionalInversion], dict[str, float]]:
    """Learn the first dev subjects of a world, and unload them again.

    Args:
        pipe: the world's pipeline.
        count: the number of subjects.
        at_a_time: the number of subjects that share the calls of the models.
        seed: the seed of photos and training.
        turned: the angle in radians by which directions are turned before the first step.
        settings: further settings of the trainers.

    Returns:
        The concepts, and the CPU "seconds" of everything and of the "steps" alone.
    """
    original, spent = together.take_together, 0.0

    def timed(steppers: Any, steps: Any) -> Any:
        nonlocal spent
        if turned and steps[0] == 0:
            for stepper in steppers:
                for rows in stepper.concepts[0].rows.values():
                    turn(rows.direction.data, turned)
        start = time.process_time()
        losses = original(steppers, steps)
        spent += time.process_time() - start
        return losses

    together.take_together = timed
    concepts: list[DirectionalInversion] = []
    start = time.process_time()
    try:
        for first in range(0, count, at_a_time):
            trainers, photos = [], []
            for number, bundle in enumerate(scenes.DEV_SUBJECTS[first : min(first + at_a_time, count)], first):
                photos.append(scenes.photos(bundle, pixels=world_of(pipe).pixels, seed=seed))
                own = {"placeholder_token": f"<s{number}>", "initializer_token": bundle.shape, "seed": seed}
                trainers.append(DTITrainer(pipe, resolution=world_of(pipe).pixels, **own, **settings))
            for result in together.fit_together(trainers, photos):
                if isinstance(result, Exception):
                    raise result
                concepts.append(result)
            pipe.unload_directional_inversion()
    finally:
        together.take_together = original
    return concepts, {"seconds": time.process_time() - start, "steps": spent}


def turn(directions: torch.Tensor, by: float) -> None:
    """Turn unit rows by an angle in radians, each in a random direction."""
    tangent = torch.randn(directions.shape, generator=torch.Generator().manual_seed(0))
    tangent -= (tangent * directions).sum(-1, keepdim=True) * directions
    directions.add_(by * normalize(tangent, dim=-1))


def score(pipe: DiffusionPipeline, concepts: list[DirectionalInversion], seed: int) -> dict[str, float]:
    """Return the mean "subject" and "prompt" scores of concepts, which are the first dev subjects."""
    found = []
    for concept, bundle in zip(concepts, scenes.DEV_SUBJECTS):
        pipe.load_directional_inversion(concept, token=measure.TOKEN)
        asked = measure.prompts(bundle, measure.TOKEN)
        found.append(measure.scores(measure.generate(pipe, [p.text for p in asked], seed), asked))
        pipe.unload_directional_inversion(measure.TOKEN)
    return {key: sum(scores[key] for scores in found) / len(found) for key in ("subject", "prompt")}


def angles(concepts: list[DirectionalInversion], others: list[DirectionalInversion]) -> torch.Tensor:
    """Return the angles between the directions of concepts and those of others, in degrees."""
    found = []
    for concept, other in zip(concepts, others, strict=True):
        found += [angle(v, other.directions[component]) for component, v in concept.directions.items()]
    return torch.cat(found).rad2deg()


def peak() -> float:
    """Return the greatest size of this process's memory so far in MB, on Linux."""
    # Not `resource.getrusage`, which begins with the size of the process that started this one.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=list(WORLDS), help="the world")
    parser.add_argument("--at_a_time", nargs="+", type=int, default=[1, 2, 6], help="subjects at a time (default: 1 2 6)")
    parser.add_argument("--subjects", type=int, default=6, help="the number of subjects, up to 6 (default)")
    parser.add_argument("--steps", type=int, default=100, help="steps of training (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="the seed of photos, training and images (default: 0)")
    parser.add_argument("--turned", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)  # of the process of one column
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.out is not None:
        run = (open_world(args.world), args.subjects, *args.at_a_time, args.seed, args.turned)
        concepts, figures = learn(*run, max_train_steps=args.steps)
        for number, concept in enumerate(concepts):
            concept.save_pretrained(args.out / str(number))
        figures["peak"] = peak()
        (args.out / "figures.json").write_text(json.dumps(figures))
        return
    pipe, reference = open_world(args.world), list[DirectionalInversion]()
    print(
        "| at a time | CPU ms a step, each | subjects an hour | peak MB | angle: mean, greatest | subject / prompt |",
        flush=True,
    )
    print("|---|---|---|---|---|---|", flush=True)
    for at_a_time, turned in [*((number, 0.0) for number in args.at_a_time), (args.at_a_time[0], 1e-7)]:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, args.world, "--at_a_time", at_a_time, "--subjects", args.subjects]
            command += ["--steps", args.steps, "--seed", args.seed, "--turned", turned, "--out", folder]
            subprocess.run([str(part) for part in command], check=True)
            figures = json.loads(Path(folder, "figures.json").read_text())
            concepts = [DirectionalInversion.from_pretrained(Path(folder, str(n))) for n in range(args.subjects)]
        reference = reference or concepts
        scores = score(pipe, concepts, args.seed)
        each, hourly = 1000 * figures["steps"] / args.steps / args.subjects, 3600 * args.subjects / figures["seconds"]
        apart = angles(concepts, reference)
        cells = [
            f"{at_a_time}, turned" if turned else str(at_a_time),
            f"{each:.1f}",
            f"{hourly:,.0f}",
            f"{figures['peak']:,.0f}",
        ]
        cells += [f"{apart.mean():.2g}, {apart.max():.2g}", f"{scores['subject']:.3f} / {scores['prompt']:.3f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
