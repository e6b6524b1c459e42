"""`dti blend`: generate images along the path from one concept to another, and a strip of them."""

import argparse
from pathlib import Path

from . import arguments

EXAMPLE = (
    "dti blend user/dti-cat user/dti-dog --model stabilityai/stable-diffusion-xl-base-1.0"
    ' --steps 7 --prompts "a {} on the beach" "a red {}" --seeds 0 1 --output_dir out/blend --save_concepts'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `dti blend`."""
    parser.add_argument("first", help="Hub id, folder or file of the concept where the path starts")
    parser.add_argument("second", help="Hub id, folder or file of the concept where the path ends")
    arguments.add_model(parser)
    parser.add_argument("--steps", type=int, default=7, help="number of points on the path, including both ends; by default 7")
    parser.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        metavar="PROMPT",
        help='prompts with {} for the concept, such as "a {} on the beach"',
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        help="folder for strip.png and the images, <position on the path>/<seed>/<number>_<words>.png",
    )
    parser.add_argument("--save_concepts", action="store_true", help="save the concept of each point next to its images")
    arguments.add_generation(parser, seeds=[0])


def run(args: argparse.Namespace) -> int:
    """Generate the images that do not exist yet, and write the strip."""
    from .. import DirectionalInversion
    from ..evaluation.generation import PlannedImage, concepts_loaded, generate_missing, grid
    from ..evaluation.progress import progress_bar
    from .open_pipeline import open_pipeline, pipeline_identity

    if args.steps < 2:
        raise ValueError(f"--steps must be at least 2, for the two ends, got {args.steps}.")
    for prompt in args.prompts:
        if "{}" not in prompt:
            raise ValueError(f"Every prompt needs {{}} where the concept goes; {prompt!r} does not have it.")
    first, second = (DirectionalInversion.from_pretrained(source) for source in (args.first, args.second))
    points: dict[str, DirectionalInversion] = {}
    for i in range(args.steps):  # errors come before the model is opened, which takes longer
        t = i / (args.steps - 1)
        points[f"{t:.3f}"] = first.slerp(second, t)
    pipe = open_pipeline(args)
    rows: dict[str, dict[str, Path]] = {}
    with progress_bar(len(points) * len(set(args.prompts)) * len(set(args.seeds)), "Generating") as bar:
        for position, concept in points.items():
            folder = args.output_dir / position
            plan = {}
            for number, prompt in enumerate(args.prompts):
                text = prompt.replace("{}", concept.placeholder_token)
                for seed in args.seeds:
                    plan[f"{prompt}\nseed {seed}"] = PlannedImage.named(folder, number, prompt, text, seed)
            with concepts_loaded(pipe, [concept], None) as digest:
                origin = {"concepts": digest, "model": pipeline_identity(args)}
                generate_missing(pipe, list(plan.values()), origin, args.batch_size, dict(args.call), bar)
            if args.save_concepts:
                concept.save_pretrained(folder)
            for label, image in plan.items():
                rows.setdefault(label, {})[f"t = {position}"] = image.path
    strip = args.output_dir / "strip.png"
    grid(rows).save(strip)
    print(f"See {strip}.")
    return 0
