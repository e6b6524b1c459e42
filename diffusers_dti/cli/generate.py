"""`dti generate`: generate images of prompts with learned concepts, and a contact sheet of them."""

import argparse
import sys
from pathlib import Path

from .. import DirectionalInversion
from ..data.text_files import read_text
from . import arguments

EXAMPLE = (
    "dti generate --model stabilityai/stable-diffusion-xl-base-1.0"
    ' --concepts out/dog --prompts "a <dog> on the beach" --seeds 0 1 --output_dir out/images'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `dti generate`."""
    arguments.add_model(parser)
    parser.add_argument(
        "--concepts",
        nargs="+",
        required=True,
        metavar="CONCEPT",
        help='files, folders or Hub ids of concepts, also with another placeholder as "out/dog=<rex>"; an adapter saved in the '
        "same folder or repository is loaded as well",
    )
    parser.add_argument(
        "--lora",
        nargs="+",
        default=[],
        metavar="LORA",
        help="files of LoRAs to load as well, or folders or Hub ids with a pytorch_lora_weights.safetensors; by default none",
    )
    parser.add_argument(
        "--token_scale",
        type=arguments.scale,
        help='norm of the embeddings: "mean", "min" or "max" of the encoder\'s vocabulary, or a number; by default as stored',
    )
    parser.add_argument(
        "--scheduler",
        metavar="NAME",
        help="scheduler of diffusers to generate with, such as EulerDiscreteScheduler; by default the model's own",
    )
    parser.add_argument(
        "--offload",
        choices=["none", "model", "sequential"],
        default="none",
        help="how to save memory on the GPU, by default none: move each model there when it is needed, or each of its layers",
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompts",
        nargs="+",
        metavar="PROMPT",
        help='prompts, such as "a <dog> on the beach"; with a single concept {} stands for its placeholder',
    )
    prompts.add_argument(
        "--prompt_file", type=Path, help="text file with one prompt per line; lines that start with # are skipped"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        help="folder for sheet.png and the images, <seed>/<number>_<words>.png",
    )
    arguments.add_generation(parser, seeds=[0])


def run(args: argparse.Namespace) -> int:
    """Generate the images that do not exist yet, and write the contact sheet."""
    from ..evaluation.generation import PlannedImage, concepts_loaded, contact_sheet, generate_missing
    from .open_pipeline import open_pipeline, pipeline_identity, set_scheduler

    templates = _read_prompts(args.prompts, args.prompt_file)
    concepts, loras = _read_concepts(args.concepts)
    pipe = open_pipeline(args, offload=args.offload)
    if args.scheduler is not None:
        set_scheduler(pipe, args.scheduler)
    with concepts_loaded(pipe, concepts, args.token_scale, loras=[*args.lora, *loras]) as digest:
        prompts = _fill_in(templates, list(pipe.directional_inversions))
        images = []
        for seed in dict.fromkeys(args.seeds):
            for number, prompt in enumerate(prompts):
                images.append(PlannedImage.named(args.output_dir, number, prompt, prompt, seed))
        origin = {"concepts": digest, "model": pipeline_identity(args)}
        if args.scheduler is not None:  # only then, so that earlier images are still known
            origin["scheduler"] = args.scheduler
        generate_missing(pipe, images, origin, args.batch_size, dict(args.call))
    sheet = args.output_dir / "sheet.png"
    contact_sheet(images).save(sheet)
    print(f"See {sheet}.")
    return 0


def _read_concepts(texts: list[str]) -> tuple[list[str | DirectionalInversion], list[Path]]:
    """Read the concepts that get another placeholder, and find the adapters next to them; other texts stay as they are.

    Raises:
        OSError: if a source has no concept.
        ValueError: if a placeholder is not a word.
    """
    from ..evaluation.generation import find_adapter

    concepts: list[str | DirectionalInversion] = []
    adapters = []
    for text in texts:
        source, _, placeholder = text.rpartition("=")
        if not (source and placeholder) or Path(text).exists():
            concepts.append(text)
            continue
        concepts.append(DirectionalInversion.from_pretrained(source, placeholder))
        adapter = find_adapter(source)
        if adapter is not None:
            adapters.append(adapter)
    return concepts, adapters


def _read_prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """Return the prompts of the command line or of the file, without blank lines and comments.

    Raises:
        ValueError: if no prompt is left.
        OSError: if the file does not exist.
    """
    lines = given or []
    if file is not None:
        lines = read_text(file).splitlines()
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise ValueError("There are no prompts: give some, or a file with one on each line.")
    return prompts


def _fill_in(templates: list[str], placeholders: list[str]) -> list[str]:
    """Replace {} by the placeholder of the only concept, and warn about the first prompt without any concept.

    Raises:
        ValueError: if several concepts are loaded and a prompt contains {}.
    """
    if len(placeholders) > 1 and any("{}" in template for template in templates):
        raise ValueError(f"{{}} could stand for any of {', '.join(placeholders)}: write the placeholder out.")
    prompts = [template.replace("{}", placeholders[0]) for template in templates]
    for prompt in prompts:
        if not any(placeholder in prompt for placeholder in placeholders):
            print(f"dti generate: {prompt!r} does not contain {' or '.join(placeholders)}.", file=sys.stderr)
            break
    return prompts
