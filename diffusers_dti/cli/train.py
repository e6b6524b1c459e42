"""`dti train`: one subject from a folder, or many from a JSON file in the authors' format."""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, TextIO, get_args

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from .. import DirectionalInversion, DTIConfig, DTITrainer
from ..data.subjects import Subject, read_subjects, subject_names
from ..pipeline.text_encoders import find_text_encoders
from ..training.distributed import processes
from . import models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every field of `DTIConfig` is an option."""
    parser.add_argument("data", type=Path, help="a folder of 3 to 6 photos, or a JSON file of subjects")
    models.add_arguments(parser)
    parser.add_argument("--instances", nargs="+", help="of a JSON file: the subjects to learn, by default all")
    parser.add_argument(
        "--initialize_from", choices=["class", "initialization"], default="class",
        help="of a JSON file: which field has the initializer; the authors' launchers take the class",
    )  # fmt: skip
    settings = parser.add_argument_group("settings", "By default the authors' for the pipeline's family.")
    helps = _helps(DTIConfig.__doc__)
    for field in fields(DTIConfig):
        settings.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=helps[field.name], **_kind(field.type))


def _helps(doc: str) -> dict[str, str]:
    """What a docstring says of each argument; one entry may be about several."""
    found = {}
    for names, text in re.findall(r"^ {8}([\w, ]+): (.*?)(?=^ {8}\w|^ {4}\w|\Z)", doc + "\n", re.M | re.S):
        for name in names.split(", "):
            found[name] = " ".join(text.split()).replace("%", "%%")
    return found


def _kind(annotation: Any) -> dict[str, Any]:
    """How an option of a field's type is read."""
    kinds = set(get_args(annotation)) if isinstance(annotation, UnionType) else {annotation}
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    if float in kinds and str in kinds:
        return {"type": models.scale}
    if any(getattr(kind, "__origin__", None) is Sequence for kind in kinds):
        return {"nargs": "+"}
    return {"type": next((kind for kind in (int, float) if kind in kinds), str)}


def run(args: argparse.Namespace) -> int:
    """Learn what is not learned yet; a subject that fails does not stop the others."""
    given = {f.name: getattr(args, f.name) for f in fields(DTIConfig) if hasattr(args, f.name)}
    if args.data.is_dir():
        if args.instances:
            raise ValueError(f"--instances names subjects of a JSON file, and {args.data} is a folder of photos.")
        names = [args.data.resolve().name]
    elif args.data.is_file():
        if "placeholder_token" in given or "initializer_token" in given:
            raise ValueError("With a JSON file placeholders are the subjects' names, and initializers are in the file.")
        names = subject_names(args.data, args.instances)
    else:
        raise OSError(f"{args.data} is not there: give a folder of photos, or a JSON file of subjects.")
    if given.get("output_dir") is None:
        raise ValueError("--output_dir says where to put what is learned.")
    config, pipe, failed = DTIConfig(**given), models.open_pipeline(args), []
    for name in names:
        try:
            subject = read_subjects(args.data, [name])[0] if args.data.is_file() else None
            _learn(pipe, config, subject, name, args)
        except Exception as error:
            if processes().num_processes > 1:  # the others are not where this one is, and would take its next subject's part
                raise
            failed.append(name)
            _say(f"{name}: failed, {type(error).__name__}: {error}", sys.stderr)
    _say(f"{len(names) - len(failed)} of {len(names)} learned" + (f"; failed: {', '.join(failed)}." if failed else "."))
    return 1 if failed else 0


def _learn(pipe: Any, config: DTIConfig, subject: Subject | None, name: str, args: argparse.Namespace) -> None:
    photos, captions, own = args.data, None, {}
    if subject is not None:
        photos, captions = subject.files, subject.captions
        own = {
            "placeholder_token": subject.placeholder_token,
            "initializer_token": subject.class_noun if args.initialize_from == "class" else subject.initializer,
            "output_dir": Path(config.output_dir) / name,
        }
        if subject.templates:
            own["templates"] = subject.templates
    trainer = DTITrainer(pipe, config, **own)
    if finished(trainer):
        _say(f"{name}: is learned already, in {trainer.config.output_dir}.")
        return
    try:
        trainer.fit(photos, captions)
        processes().wait_for_everyone()  # the first process writes
        _say(f"{name}: learned, in {trainer.config.output_dir}.")
    finally:
        if trainer.adapter is not None and getattr(trainer.adapter.model, "peft_config", None):
            pipe.unload_lora_weights()
        if pipe.directional_inversions:
            pipe.unload_directional_inversion()


def finished(trainer: DTITrainer) -> bool:
    """Whether the trainer's folder has all that it would write. Photos are not compared.

    Raises:
        ValueError: where what is there was learned with other settings, or in another model.
    """
    config = trainer.config
    folder = Path(config.output_dir)
    if not any(folder.glob("learned_embeds*.safetensors")):
        return False
    concept = DirectionalInversion.from_pretrained(folder)
    now = trainer.metadata(config.placeholder_token or "<concept>")
    before = {"base_model": concept.metadata.get("base_model")} | concept.metadata.get("training", {})
    now = {"base_model": now["base_model"]} | now["training"]
    differing = sorted(k for k in now.keys() | before.keys() if now.get(k) != before.get(k))
    if (
        differing == ["max_train_steps"]
        and config.resume_from_checkpoint
        and config.max_train_steps > before["max_train_steps"]
    ):
        return False  # a run may be made longer
    if differing:
        other = f"with other settings ({', '.join(differing)})"
        raise ValueError(f"{folder} holds a concept that was learned {other}: choose another --output_dir.")
    return set(concept.directions) == set(find_text_encoders(trainer.pipe)) and (
        config.adapter is None or (folder / LORA_WEIGHT_NAME_SAFE).is_file()
    )


def _say(text: str, where: TextIO | None = None) -> None:
    if processes().is_main_process:
        print(text, file=where, flush=True)
