"""`dti train`: learn one concept from a folder of photos, or many from a JSON file in the authors' format."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers.utils import logging

from .. import DirectionalInversion, DTIConfig
from ..concept import formats
from ..data.subjects import lists_subjects, subject_names
from ..pipeline.protocols import Pipeline
from ..training.distributed import Reunion, alone, processes
from ..training.together import check_together, fit_together
from ..training.token_settings import AUTO, Initializer
from . import arguments
from .open_pipeline import open_pipeline
from .settings import add_settings, given_settings
from .train_job import Job, report, report_failure

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
    parser.add_argument(
        "--subjects_per_batch",
        type=arguments.count,
        metavar="N",
        help="subjects of a JSON file that are learned at a time, with one call of the models for a step of all of them; over "
        "several processes, each takes its own subjects. By default all processes share one subject after the other",
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
    if args.subjects_per_batch is None:
        failed = _learn_each(pipe, config, names, args)
    else:
        reunion, process = Reunion(), processes()
        if not process.is_main_process:
            logging.disable_progress_bar()
        with alone():
            own = names[process.process_index :: process.num_processes]
            learn = _learn_each if args.subjects_per_batch == 1 else _learn_batches
            failed = [name for each in reunion.gather(learn(pipe, config, own, args)) for name in each]
    summary = f"{len(names) - len(failed)} of {len(names)} learned"
    report(f"{summary}; failed: {', '.join(failed)}." if failed else f"{summary}.")
    return 1 if failed else 0


def _learn_each(pipe: Pipeline, config: DTIConfig, names: Sequence[str], args: argparse.Namespace) -> list[str]:
    """Learn subjects one by one, and return the names of those that failed."""
    failed = []
    for name in names:
        try:
            job = Job(pipe, config, name, args)
            if job.is_waiting():
                job.learn()
        except Exception as error:
            # The other processes did not fail: they would start on this subject while this one starts on the next.
            if processes().num_processes > 1:
                raise
            failed.append(name)
            report_failure(name, error)
    return failed


def _learn_batches(pipe: Pipeline, config: DTIConfig, names: Sequence[str], args: argparse.Namespace) -> list[str]:
    """Learn subjects `--subjects_per_batch` at a time, and return the names of those that failed.

    Raises:
        ValueError: if the settings are not for several subjects at a time.
    """
    waiting: list[Job] = []
    failed: list[str] = []

    def fail(name: str, error: Exception) -> None:
        failed.append(name)
        report_failure(name, error)

    for name in names:
        try:
            job = Job(pipe, config, name, args)
            if job.is_waiting():
                waiting.append(job)
        except Exception as error:
            fail(name, error)
    if waiting:
        check_together([job.trainer for job in waiting])
    for first in range(0, len(waiting), args.subjects_per_batch):
        batch = waiting[first : first + args.subjects_per_batch]
        results: Sequence[DirectionalInversion | Exception]
        try:
            results = fit_together([j.trainer for j in batch], [j.photos for j in batch], [j.captions for j in batch])
        except Exception as error:  # of the models, as for want of memory
            results = [error] * len(batch)
        for job, result in zip(batch, results):
            try:
                if isinstance(result, Exception):
                    raise result
                job.finish(result)
            except Exception as error:
                fail(job.name, error)
        words = [word for job in batch for word in job.trainer.inversions]
        if loaded := [word for word in words if word in pipe.directional_inversions]:
            pipe.unload_directional_inversion(loaded)
    return failed


def _subject_names(args: argparse.Namespace, settings: dict[str, Any]) -> list[str]:
    """Return the names of what is to be learned.

    Raises:
        ValueError: if options do not apply to this kind of data.
        OSError: if there is no data.
    """
    if args.subjects_per_batch is not None and not lists_subjects(args.data):
        raise ValueError("--subjects_per_batch is for the subjects of a JSON file.")
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
