"""`dti train`: one subject from a folder, or many from a JSON file in the authors' format."""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from diffusers_dti import DirectionalInversion, DTIConfig, DTITrainer
from diffusers_dti.processes import processes
from diffusers_dti.subjects import Subject, read_subjects

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
        return {"type": lambda text: float(text) if re.fullmatch(r"[\d.e+-]+", text) else text}
    if any(getattr(kind, "__origin__", None) is Sequence for kind in kinds):
        return {"nargs": "+"}
    return {"type": next((kind for kind in (int, float) if kind in kinds), str)}


def run(args: argparse.Namespace) -> int:
    """Learn what is not learned yet; a subject that fails does not stop the others."""
    given = {f.name: getattr(args, f.name) for f in fields(DTIConfig) if hasattr(args, f.name)}
    if args.data.is_dir():
        subjects = [None]
    else:
        if "placeholder_token" in given or "initializer_token" in given:
            raise ValueError("With a JSON file placeholders are the subjects' names, and initializers are in the file.")
        subjects = read_subjects(args.data, args.instances)
    if given.get("output_dir") is None:
        raise ValueError("--output_dir says where to put what is learned.")
    config, pipe, failed = DTIConfig(**given), models.open_pipeline(args), {}
    for subject in subjects:
        name = args.data.name if subject is None else subject.name
        try:
            _learn(pipe, config, subject, args)
        except Exception as error:
            failed[name] = error
            _say(f"{name}: failed, {type(error).__name__}: {error}")
    _say(f"{len(subjects) - len(failed)} of {len(subjects)} learned" + (f"; failed: {', '.join(failed)}." if failed else "."))
    return 1 if failed else 0


def _learn(pipe: Any, config: DTIConfig, subject: Subject | None, args: argparse.Namespace) -> None:
    if subject is None:
        photos, captions, own, name = args.data, None, {}, args.data.name
    else:
        photos, captions, name = subject.files, subject.captions, subject.name
        initializer = subject.word if args.initialize_from == "class" else subject.initialization
        own = {
            "placeholder_token": subject.placeholder_token,
            "initializer_token": initializer,
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
    """Whether the trainer's folder has what it would learn.

    Raises:
        ValueError: where what is there was learned with other settings.
    """
    folder = Path(trainer.config.output_dir)
    if not any(folder.glob("learned_embeds*.safetensors")):
        return False
    before = DirectionalInversion.from_pretrained(folder).metadata.get("training")
    now = trainer.settings(trainer.config.placeholder_token or "<concept>")
    if before is None or (differing := sorted(k for k in now.keys() | before.keys() if now.get(k) != before.get(k))):
        other = "by another program" if before is None else f"with other settings ({', '.join(differing)})"
        raise ValueError(f"{folder} holds a concept that was learned {other}: choose another --output_dir.")
    return True


def _say(text: str) -> None:
    if processes().is_main_process:
        print(text, file=sys.stdout, flush=True)
