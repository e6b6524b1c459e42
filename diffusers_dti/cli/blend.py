"""`dti blend`: the way from one learned word to another, as a strip of pictures."""

import argparse
from pathlib import Path

from . import generate, models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two concepts, and what to draw."""
    for name in ("first", "second"):
        parser.add_argument(name, help="the folder, file or Hub id of a learned word")
    models.add_arguments(parser)
    parser.add_argument("--steps", type=int, default=7, help="points on the way, both ends among them, by default 7")
    parser.add_argument(
        "--prompts", nargs="+", required=True, metavar="PROMPT", help='with {} for the word: "a {} on the beach"'
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True,
        help="strip.png comes here, and the pictures as <share of the way>/<seed>/<number>_<words>.png",
    )  # fmt: skip
    parser.add_argument("--save_concepts", action="store_true", help="keep the word of each point beside its pictures")
    generate.add_drawing(parser, seeds=[0])


def run(args: argparse.Namespace) -> int:
    """Draw what is not there yet, and the strip."""
    from .. import DirectionalInversion
    from ..evaluation.generation import PlannedImage, concepts_loaded, generate_missing, grid

    if args.steps < 2:
        raise ValueError(f"--steps must be 2 or more, the two ends, got {args.steps}.")
    if wordless := [p for p in args.prompts if "{}" not in p]:
        raise ValueError(f"--prompts need {{}} where the word goes: {wordless[0]!r} has none.")
    first, second = (DirectionalInversion.from_pretrained(source) for source in (args.first, args.second))
    shares = [i / (args.steps - 1) for i in range(args.steps)]
    mixtures = {f"{t:.3f}": first.slerp(second, t) for t in shares}  # before the model is opened, which takes longer
    pipe = models.open_pipeline(args)
    rows: dict[str, dict[str, Path]] = {}
    for name, mixture in mixtures.items():
        folder, word = args.output_dir / name, mixture.placeholder_token
        plan = {
            f"{prompt}\nseed {seed}": PlannedImage.named(folder, i, prompt, prompt.replace("{}", word), seed)
            for i, prompt in enumerate(args.prompts)
            for seed in args.seeds
        }
        with concepts_loaded(pipe, [mixture], None) as digest:
            origin = {"concepts": digest, "model": models.pipeline_identity(args)}
            generate_missing(pipe, list(plan.values()), origin, args.batch_size, dict(args.call))
        if args.save_concepts:
            mixture.save_pretrained(folder)
        for label, picture in plan.items():
            rows.setdefault(label, {})[f"t = {name}"] = picture.path
    strip = args.output_dir / "strip.png"
    grid(rows).save(strip)
    print(f"See {strip}.")
    return 0
