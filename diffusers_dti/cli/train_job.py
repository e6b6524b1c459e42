"""A subject that `dti train` learns: its trainer, its folder, and what is left to do when it is learned."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from .. import DirectionalInversion, DTIConfig, DTITrainer
from ..data.photo_record import write_record
from ..data.subjects import lists_subjects, read_subjects
from ..pipeline.protocols import Pipeline
from ..pipeline.text_encoders import find_text_encoders
from ..training.distributed import processes
from ..training.photos import Captions, Images
from ..training.token_settings import AUTO


class Job:
    """A subject to learn.

    Args:
        pipe: the pipeline.
        config: the settings of the command.
        name: the subject's name, in the JSON file if there is one.
        args: the options of the command.

    Raises:
        ValueError: if the subject's entry or its settings cannot be used.
        OSError: if its photos are not there.
    """

    def __init__(self, pipe: Pipeline, config: DTIConfig, name: str, args: argparse.Namespace):
        self.pipe, self.name, self.overwrite = pipe, name, args.overwrite
        self.photos: Images = args.data
        self.captions: Captions | None = None
        self.subject = None
        overrides: dict[str, Any] = {}
        if lists_subjects(args.data):
            (subject,) = read_subjects(args.data, [name], learnable_property=config.learnable_property)
            self.subject, self.photos, self.captions = subject, subject.files, subject.captions
            overrides |= {"placeholder_token": subject.placeholder_token, "learnable_property": subject.learnable_property}
            if config.initializer_token is None:
                overrides["initializer_token"] = subject.class_noun if args.initialize_from == "class" else subject.initializer
            overrides["output_dir"] = Path(args.output_dir) / name
            if subject.templates:
                overrides["templates"] = subject.templates
        self.num_vectors = config.num_vectors
        self.trainer = DTITrainer(pipe, config, **overrides)
        self.folder = Path(str(self.trainer.config.output_dir))

    def is_waiting(self) -> bool:
        """Return whether the subject is still to be learned, and say so if it is not.

        Raises:
            ValueError: see `is_complete`.
        """
        if is_complete(self.trainer, self.overwrite):
            report(f"{self.name}: already learned, in {self.folder}.")
            return False
        self.earlier = _stored_concept(self.folder)
        return True

    def learn(self) -> None:
        """Learn the subject, and leave the pipeline without its concept and adapter."""
        try:
            concept = self.trainer.fit(self.photos, self.captions)
            processes().wait_for_everyone()  # only the first process writes
            self.finish(concept)
        finally:
            self.clear()

    def finish(self, concept: DirectionalInversion) -> None:
        """Complete the folder of a subject that was learned, and say that it was.

        Raises:
            OSError: if the concept could not be saved there, naming where it is instead.
        """
        folder, trainer, is_main_process = self.folder, self.trainer, processes().is_main_process
        if is_main_process and not is_complete(trainer, self.overwrite):
            trainer.save_pretrained(elsewhere := tempfile.mkdtemp(prefix="dti-"))
            raise OSError(f"{folder} could not be written to. What was learned is in {elsewhere}.")
        if is_main_process and self.subject is not None:
            write_record(folder, self.subject.files)
        had_adapter = self.earlier is not None and self.earlier.metadata.get("training", {}).get("adapter") is not None
        if is_main_process and had_adapter and trainer.adapter is None:
            (folder / LORA_WEIGHT_NAME_SAFE).unlink(missing_ok=True)  # the other verbs would load it with the new concept
        count = concept.num_vectors
        if count > 1 and self.num_vectors is None:  # which nobody asked for
            initializer = concept.metadata["initializer"]
            unit = "tokens" if initializer in trainer.config.initializers_for(concept.placeholder_token) else "vectors"
            report(f"{self.name}: {initializer!r} has {count} {unit}: the concept has {count} vectors.")
        report(f"{self.name}: learned, in {folder}.")

    def clear(self) -> None:
        """Take the adapter and the concept out of the pipeline."""
        if self.trainer.adapter is not None and getattr(self.trainer.adapter.model, "peft_config", None):
            self.pipe.unload_lora_weights()
        if loaded := [word for word in self.trainer.inversions if word in self.pipe.directional_inversions]:
            self.pipe.unload_directional_inversion(loaded)


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


def report(text: str, file: TextIO | None = None) -> None:
    """Print in the first process only."""
    if processes().is_main_process:
        print(text, file=file, flush=True)


def report_failure(name: str, error: Exception) -> None:
    """Say that a subject failed."""
    report(f"{name}: failed, {type(error).__name__}: {error}", sys.stderr)
