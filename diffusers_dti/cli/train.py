"""`dti train`: learn one concept from a folder of photos, or many from a JSON file in the authors' format."""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from .. import DirectionalInversion, DTIConfig, DTITrainer
from ..concept import formats
from ..data.photo_record import write_record
from ..data.subjects import Subject, lists_subjects, read_subjects, subject_names
from ..pipeline.protocols import Pipeline
from ..pipeline.text_encoders import find_text_encoders
from ..training.distributed import processes
from ..training.token_settings import AUTO, Initializer
from . import arguments
from .open_pipeline import open_pipeline
from .settings import add_settings, given_settings

EXAMPLE = (
    "dti train photos/dog --model stabilityai/stable-diffusion-xl-base-1.0"
    ' --placeholder_token "<dog>" --initializer_token dog --output_dir out/dog'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `dti train`."""
    parser.add_argument("data", type=Path, help="folder of 3 to 6 photos, JSON file of subjects, or folder of DreamBench++")
    arguments.add_model(parser)
    parser.add_argument(
        "--instances", nargs="+", metavar="NAME", help="subjects of the JSON file to learn, by default all in the file"
    )
    parser.add_argument(
        "--initialize_from",
        choices=["class", "initialization"],
        default="class",
        help="field of the JSON file to take the initializer from, by default class, as in the authors' launchers",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="learn finished concepts anew that were learned with other settings or in another model, by default an error; "
        "their files are replaced when the new concept is whole",
    )
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Learn what has not been learned yet; a subject that fails does not stop the others."""
    settings = given_settings(args)
    names = _subject_names(args, settings)
    if settings.get("output_dir") is None:
        raise ValueError("--output_dir is needed: the folder to write the learned concepts to.")
    if args.overwrite and settings.get("resume_from_checkpoint") is not None:
        raise ValueError("--overwrite learns anew, and --resume_from_checkpoint goes on with an earlier run: give one of them.")
    if "initializer_token" in settings:
        settings["initializer_token"] = [_read_initializer(text) for text in settings["initializer_token"]]
    config, pipe = DTIConfig(**settings), open_pipeline(args)
    failed = []
    for name in names:
        try:
            subject = None
            if lists_subjects(args.data):
                (subject,) = read_subjects(args.data, [name], learnable_property=config.learnable_property)
            _learn(pipe, config, subject, name, args)
        except Exception as error:
            # The other processes did not fail: they would start on this subject while this one starts on the next.
            if processes().num_processes > 1:
                raise
            failed.append(name)
            _print(f"{name}: failed, {type(error).__name__}: {error}", sys.stderr)
    summary = f"{len(names) - len(failed)} of {len(names)} learned"
    _print(f"{summary}; failed: {', '.join(failed)}." if failed else f"{summary}.")
    return 1 if failed else 0


def _subject_names(args: argparse.Namespace, settings: dict[str, Any]) -> list[str]:
    """Return the names of what is to be learned.

    Raises:
        ValueError: if options do not apply to this kind of data.
        OSError: if there is no data.
    """
    if args.data.is_dir() and not lists_subjects(args.data):
        if args.instances:
            raise ValueError(f"--instances selects subjects of a JSON file, but {args.data} is a folder of photos.")
        return [args.data.resolve().name]
    if not lists_subjects(args.data):
        raise OSError(f"{args.data} does not exist: give a folder of photos, or a JSON file of subjects.")
    if "placeholder_token" in settings or settings.get("initializer_token", [AUTO]) != [AUTO]:
        raise ValueError(
            f'With a JSON file, placeholders are the subjects\' names, and initializers come from the file, or are "{AUTO}".'
        )
    return subject_names(args.data, args.instances)


def _read_initializer(text: str) -> Initializer:
    """Return a concept for a path or a Hub id, and any other text as it is: a word, also beside a folder of that name.

    Raises:
        ValueError: if the text is a mapping.
        OSError: if the path has no concept.
    """
    if text.startswith("{"):
        raise ValueError("--initializer_token takes words and concepts: a mapping from placeholders is for `DTITrainer`.")
    if {"/", os.sep} & set(text) or text.endswith(formats.SUFFIX):
        return DirectionalInversion.from_pretrained(text)
    return text


def _learn(pipe: Pipeline, config: DTIConfig, subject: Subject | None, name: str, args: argparse.Namespace) -> None:
    """Learn one subject, unless its folder is complete, and leave the pipeline without its concept and adapter."""
    photos, captions = args.data, None
    overrides: dict[str, Any] = {}
    if subject is not None:
        photos, captions = subject.files, subject.captions
        overrides |= {"placeholder_token": subject.placeholder_token, "learnable_property": subject.learnable_property}
        if config.initializer_token is None:
            overrides["initializer_token"] = subject.class_noun if args.initialize_from == "class" else subject.initializer
        overrides["output_dir"] = Path(args.output_dir) / name
        if subject.templates:
            overrides["templates"] = subject.templates
    trainer = DTITrainer(pipe, config, **overrides)
    folder = Path(str(trainer.config.output_dir))
    if is_complete(trainer, args.overwrite):
        _print(f"{name}: already learned, in {folder}.")
        return
    earlier = _stored_concept(folder)
    try:
        concept = trainer.fit(photos, captions)
        processes().wait_for_everyone()  # only the first process writes
        if processes().is_main_process and not is_complete(trainer, args.overwrite):
            trainer.save_pretrained(elsewhere := tempfile.mkdtemp(prefix="dti-"))
            raise OSError(f"{folder} could not be written to. What was learned is in {elsewhere}.")
        if processes().is_main_process and subject is not None:
            write_record(folder, subject.files)
        had_adapter = earlier is not None and earlier.metadata.get("training", {}).get("adapter") is not None
        if processes().is_main_process and had_adapter and trainer.adapter is None:
            (folder / LORA_WEIGHT_NAME_SAFE).unlink(missing_ok=True)  # the other verbs would load it with the new concept
        count = concept.num_vectors
        if count > 1 and config.num_vectors is None:  # which nobody asked for
            initializer = concept.metadata["initializer"]
            unit = "tokens" if initializer in trainer.config.initializers_for(concept.placeholder_token) else "vectors"
            _print(f"{name}: {initializer!r} has {count} {unit}: the concept has {count} vectors.")
        _print(f"{name}: learned, in {folder}.")
    finally:
        if trainer.adapter is not None and getattr(trainer.adapter.model, "peft_config", None):
            pipe.unload_lora_weights()
        if loaded := [word for word in trainer.inversions if word in pipe.directional_inversions]:
            pipe.unload_directional_inversion(loaded)


def _stored_concept(folder: Path) -> DirectionalInversion | None:
    """Return the concept that a folder holds already, if there is one."""
    return DirectionalInversion.from_pretrained(folder) if any(folder.glob("learned_embeds*.safetensors")) else None


def is_complete(trainer: DTITrainer, overwrite: bool = False) -> bool:
    """Check whether the trainer's folder already holds everything that it would write. Photos are not compared.

    Args:
        trainer: a trainer with an `output_dir`.
        overwrite: whether a concept that was learned in another way may be replaced: the folder is then not complete.

    Raises:
        ValueError: if the concept in the folder was learned with other settings, or in another model.
    """
    config = trainer.config
    folder = Path(str(config.output_dir))
    concept = _stored_concept(folder)
    if concept is None:
        return False
    placeholder = config.placeholder_token or "<concept>"
    metadata = trainer.metadata(placeholder)
    now = {"base_model": metadata["base_model"]} | metadata["training"]
    before = {"base_model": concept.metadata.get("base_model")} | concept.metadata.get("training", {})
    differing = sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))
    several = len(config.initializers_for(placeholder)) > 1 or config.num_starts > 1
    if several or config.initializers_for(placeholder) == [AUTO]:  # the run has chosen its start
        differing = [key for key in differing if key not in ("initializer_token", "initializer_context")]
    made_longer = differing == ["max_train_steps"] and now["max_train_steps"] > before["max_train_steps"]
    if differing and (overwrite or (made_longer and config.resume_from_checkpoint)):
        return False
    if differing:
        raise ValueError(
            f"{folder} holds a concept that was learned with other settings ({', '.join(differing)}): choose another "
            "--output_dir, or learn it anew with --overwrite."
        )
    has_adapter = config.adapter is None or (folder / LORA_WEIGHT_NAME_SAFE).is_file()
    return has_adapter and set(concept.directions) == set(find_text_encoders(trainer.pipe))


def _print(text: str, file: TextIO | None = None) -> None:
    """Print in the first process only."""
    if processes().is_main_process:
        print(text, file=file, flush=True)
