"""The paper's protocol: every subject in its prompts, from several seeds, with a score for each image."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.subjects import Subject
from ..parsing import parse_json
from ..pipeline.protocols import Pipeline
from .generation import PlannedImage, concepts_loaded, generate_missing, read_provenance
from .metrics import Metric
from .progress import Bar, pass_over, progress_bar
from .prompts import LIVE_PROMPTS, OBJECT_PROMPTS, STYLE_PROMPTS, Kind, is_live
from .store import Store
from .summary import Record

BASELINES = ("class", "initialization", "description")
BUILT_IN_PROMPTS: dict[Kind, Sequence[str]] = {"object": OBJECT_PROMPTS, "live": LIVE_PROMPTS, "style": STYLE_PROMPTS}


@dataclass(frozen=True)
class Run:
    """A folder that `dti train` wrote, with a concept for each subject.

    Args:
        name: what tables call it.
        folder: where it is.
        token_scale: the scale to load its concepts with; by default the one they were saved with.
    """

    name: str
    folder: Path
    token_scale: str | float | None = None

    def folder_of(self, subject: Subject) -> Path:
        """Return the folder of a subject's concept.

        Raises:
            OSError: if the run has not learned the subject.
        """
        folder = self.folder / subject.name
        if not any(folder.glob("learned_embeds*.safetensors")):
            raise OSError(f"{self.folder} has not learned {subject.name}: `dti train` it first, or name others by --instances.")
        return folder


@dataclass(frozen=True)
class Baseline:
    """Words in place of a learned concept: what a run must surpass, or can at most reach.

    Args:
        name: the field of the subject that has the words, one of `BASELINES`; tables call it so.
    """

    name: str

    def words_for(self, subject: Subject) -> str:
        """Return the subject's words.

        Raises:
            ValueError: if it has no description.
        """
        fields = {"class": subject.class_noun, "initialization": subject.initializer, "description": subject.description}
        words = fields[self.name]
        if words is None:
            raise ValueError(
                f'{subject.name} has no "{self.name}" for the baseline: add the field to its entry in the JSON file, words for '
                'what it looks like, such as "brown corgi with a red collar".'
            )
        return words


def prompts_of(subject: Subject, given: Mapping[Kind, Sequence[str]] | None) -> Sequence[str]:
    """Choose the prompts for a subject.

    Args:
        subject: the subject.
        given: prompts by kind, from `read_prompts`, which take precedence.

    Returns:
        The given prompts of the subject's kind, or its own, or the built-in ones, with "{}" for the placeholder.

    Raises:
        ValueError: if prompts were given, but none for the subject's kind.
    """
    kind: Kind = "live" if is_live(subject.class_noun) else "object"
    if subject.learnable_property == "style":
        kind = "style"
    if given is None:
        return subject.prompts or BUILT_IN_PROMPTS[kind]
    if kind not in given:
        raise ValueError(
            f"The prompt file has no prompts for {subject.name}, which is a {kind}: give a text file with one on each line."
        )
    return given[kind]


def plan_images(
    run: Run | Baseline, subject: Subject, prompts: Sequence[str], seeds: Sequence[int], folder: Path
) -> list[PlannedImage]:
    """Plan an image for each prompt and seed, named by the prompt with the class noun in the placeholder's place.

    Raises:
        ValueError: if the subject lacks the words of a baseline.
    """
    shown = run.words_for(subject) if isinstance(run, Baseline) else subject.placeholder_token
    planned = []
    for seed in seeds:
        for number, prompt in enumerate(prompts):
            words = prompt.replace("{}", subject.class_noun)
            text = prompt.replace("{}", shown)
            planned.append(PlannedImage.named(folder / run.name / subject.name, number, words, text, seed))
    return planned


def generate_subject(
    pipe: Pipeline,
    run: Run | Baseline,
    subject: Subject,
    images: Sequence[PlannedImage],
    model: Mapping[str, Any],
    batch_size: int,
    call: Mapping[str, Any],
    bar: Bar | None = None,
) -> None:
    """Load a run's concept of a subject, generate its missing images, and unload the concept.

    Args:
        pipe: the pipeline, without the concept.
        run, subject: which concept; a baseline has none.
        images: from `plan_images`.
        model: what identifies the pipeline, as JSON values.
        batch_size, call, bar: see `generate_missing`.

    Raises:
        OSError: if the run has not learned the subject.
        ValueError: if the call does not have an argument.
    """
    sources, scale = ([run.folder_of(subject)], run.token_scale) if isinstance(run, Run) else ([], None)
    with concepts_loaded(pipe, sources, scale, subject.placeholder_token) as digest:
        generate_missing(pipe, images, {"concepts": digest, "model": model}, batch_size, call, bar)


def score(
    run: Run | Baseline,
    subject: Subject,
    images: Sequence[PlannedImage],
    metrics: Mapping[str, tuple[Metric, Store]],
    bar: Bar | None = None,
) -> list[Record]:
    """Score images by every metric. Scores that a store already has are not computed again.

    Args:
        run, subject: what the images show.
        images: from `plan_images`, generated.
        metrics: the metrics by what the user calls them, each with the store of its scores.
        bar: the bar to advance by each image and metric; by default one of its own.

    Returns:
        A record for each image, for `summarize`.

    Raises:
        OSError: if images are missing, or were generated from another prompt or seed. A missing image never counts as 0.
        ValueError: if a metric does not return a number for each image, or two metrics return the same score.
    """
    missing = [str(image.path) for image in images if not _is_generated(image)]
    if missing:
        raise OSError(f"{len(missing)} of {len(images)} images of {subject.name} are missing, the first is {missing[0]}.")
    texts = [image.words for image in images]
    settings = _score_settings(subject, images, texts)
    scores: list[dict[str, float]] = [{} for _ in images]
    with progress_bar(len(metrics) * len(images), "Scoring", bar) as bar:
        for spec, (metric, store) in metrics.items():
            found = _score_with_store(spec, metric, store, subject, images, texts, settings, bar)
            for collected, own in zip(scores, found, strict=True):
                twice = sorted(collected.keys() & own.keys())
                if twice:
                    raise ValueError(
                        f"{spec} returns the score {twice[0]!r}, and so does another metric: use only one of them."
                    )
                collected |= own
    records: list[Record] = []
    for image, text, values in zip(images, texts, scores, strict=True):
        records.append({"run": run.name, "subject": subject.name, "prompt": text, "seed": image.seed, "scores": values})
    return records


def _is_generated(image: PlannedImage) -> bool:
    """Return whether the file exists, and was generated from this prompt and seed."""
    try:
        found = parse_json(read_provenance(image.path) or "{}")
    except ValueError:  # another program's text
        return False
    return isinstance(found, dict) and found.get("prompt") == image.prompt and found.get("seed") == image.seed


def _score_settings(subject: Subject, images: Sequence[PlannedImage], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return what the scores of each image depend on, besides the metric."""
    photos = _digest([file for file in (*subject.files, *subject.masks) if file is not None])
    common = {"subject": subject.name, "photos": photos, "masks": [mask is not None for mask in subject.masks]}
    # "picture" is the name in stores that exist.
    return [common | {"picture": _digest([image.path]), "text": text} for image, text in zip(images, texts)]


def _score_with_store(
    spec: str,
    metric: Metric,
    store: Store,
    subject: Subject,
    images: Sequence[PlannedImage],
    texts: Sequence[str],
    settings: Sequence[dict[str, Any]],
    bar: Bar,
) -> list[dict[str, float]]:
    """Return the scores of each image by one metric, and compute and store those that the store lacks."""
    found = [store.get(own | {"metric": spec}) for own in settings]
    missing = [i for i, scores in enumerate(found) if scores is None]
    pass_over(bar, len(found) - len(missing))
    if missing:
        columns = metric([_open(images[i].path) for i in missing], [texts[i] for i in missing], subject)
        for i, scores in zip(missing, _split_columns(spec, columns, len(missing)), strict=True):
            found[i] = scores
            store.put(settings[i] | {"metric": spec}, scores)
        bar.update(len(missing))
    return [scores for scores in found if scores is not None]


def _split_columns(spec: str, columns: Any, count: int) -> list[dict[str, float]]:
    """Check what a metric returned, and split it by image."""
    good = isinstance(columns, Mapping) and columns and all(len(values) == count for values in columns.values())
    if not good or not all(math.isfinite(value) for values in columns.values() for value in values):
        raise ValueError(f"The metric {spec} must return a finite number for each of {count} images under each score's name.")
    return [{name: float(values[i]) for name, values in columns.items()} for i in range(count)]


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _digest(files: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
