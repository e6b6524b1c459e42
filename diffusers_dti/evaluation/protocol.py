"""The paper's protocol: every subject in its prompts, from some seeds, each picture scored once."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import logging
from PIL import Image

from ..concept.hub import hub_errors
from ..concept.inversion import DirectionalInversion
from ..data.subjects import Subject
from . import generation
from .generation import PlannedImage, read_provenance
from .metrics import Metric
from .prompts import LIVE_PROMPTS, OBJECT_PROMPTS, is_live
from .store import Store


@dataclass(frozen=True)
class Run:
    """A folder with a concept for each subject, as `dti train` writes it, and the scale to load them at."""

    name: str
    folder: Path
    token_scale: str | float | None = None

    def folder_of(self, subject: Subject) -> Path:
        """Where the subject's concept is.

        Raises:
            OSError: where the run has not learned it.
        """
        folder = self.folder / subject.name
        if not any(folder.glob("learned_embeds*.safetensors")):
            raise OSError(f"{self.folder} has not learned {subject.name}: `dti train` it first, or name others by --instances.")
        return folder


def prompts_of(subject: Subject, given: Mapping[str, Sequence[str]] | None) -> Sequence[str]:
    """Those given for the subject's kind ("object" or "live"), its own, or the built-in ones."""
    kind = "live" if is_live(subject.word) else "object"
    if given is not None:
        return given[kind]
    return subject.prompts or {"live": LIVE_PROMPTS, "object": OBJECT_PROMPTS}[kind]


def planned(run: Run, subject: Subject, prompts: Sequence[str], seeds: Sequence[int], folder: Path) -> list[PlannedImage]:
    """The pictures of a run and subject, named by their texts."""
    own = folder / run.name / subject.name
    return [
        PlannedImage.named(
            own, number, prompt.replace("{}", subject.word), prompt.replace("{}", subject.placeholder_token), seed
        )
        for seed in seeds
        for number, prompt in enumerate(prompts)
    ]


@contextmanager
def loaded(
    pipe: Any,
    sources: Sequence[str | Path | DirectionalInversion],
    token_scale: str | float | None,
    token: str | None = None,
) -> Iterator[str]:
    """Concepts in a pipeline for a while, with the adapters that lie beside them; gives what tells them from others.

    Args:
        pipe: the pipeline.
        sources: folders, Hub ids, or concepts.
        token_scale, token: see `load_directional_inversion`.

    Raises:
        OSError: where there is no concept.
    """
    words, adapters, digest = [], [], hashlib.sha256()
    try:
        for source in sources:
            concept = pipe.load_directional_inversion(source, token=token, token_scale=token_scale)
            words.append(concept.placeholder_token)
            for component, rows in concept.embeddings.items():
                digest.update(f"{words[-1]} {component}".encode() + rows.numpy().tobytes())
            file = None if isinstance(source, DirectionalInversion) else _adapter_of(source)
            if file is not None:
                adapters.append(f"adapter{len(adapters)}")
                pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=adapters[-1])
                digest.update(file.read_bytes())
        if len(adapters) > 1:
            pipe.set_adapters(adapters)  # loading one leaves it alone active
        yield digest.hexdigest()
    finally:
        if words:
            pipe.unload_directional_inversion(words)
        if adapters:
            pipe.unload_lora_weights()


def _adapter_of(source: str | Path) -> Path | None:
    """The adapter's file beside a concept, in a folder or on the Hub; None where there is none."""
    if Path(source).exists():
        file = Path(source) / LORA_WEIGHT_NAME_SAFE
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError

    try:
        with hub_errors(str(source)):
            return Path(hf_hub_download(str(source), LORA_WEIGHT_NAME_SAFE))
    except EntryNotFoundError:
        return None


def generate(
    pipe: Any,
    run: Run,
    subject: Subject,
    pictures: Sequence[PlannedImage],
    model: Mapping[str, Any],
    batch_size: int,
    call: Mapping[str, Any],
) -> None:
    """Draw what is not there yet, from this concept, `model` (what tells pipelines apart) and call."""
    with loaded(pipe, [run.folder_of(subject)], run.token_scale, subject.placeholder_token) as concepts:
        generation.generate(pipe, pictures, {"concepts": concepts, "model": model}, batch_size, call)


def score(
    run: Run, subject: Subject, pictures: Sequence[PlannedImage], metrics: Mapping[str, tuple[Metric, Store]]
) -> list[dict[str, Any]]:
    """Records for `summarise`, one a picture; what a store has is not computed again.

    Args:
        run, subject: what the pictures are of.
        pictures: from `planned`, drawn.
        metrics: by what the user calls them, each with a store of its scores.

    Raises:
        OSError: for pictures that are missing, or were drawn from another prompt or seed; none counts as zero.
        ValueError: for metrics that give no number for each picture, or two that give the same score.
    """
    if missing := [str(p.path) for p in pictures if not _is(p)]:
        raise OSError(f"{len(missing)} of {len(pictures)} pictures of {subject.name} are missing, the first is {missing[0]}.")
    texts = [p.prompt.replace(subject.placeholder_token, subject.word) for p in pictures]
    photos = _digest([file for file in (*subject.files, *subject.masks) if file is not None])
    common = {"subject": subject.name, "photos": photos, "masks": [mask is not None for mask in subject.masks]}
    parts = [common | {"picture": _digest([p.path]), "text": text} for p, text in zip(pictures, texts)]
    scores: list[dict[str, float]] = [{} for _ in pictures]
    for spec, (metric, store) in metrics.items():
        found = [store.get(part | {"metric": spec}) for part in parts]
        todo = [i for i, values in enumerate(found) if values is None]
        if todo:
            images = [_open(pictures[i].path) for i in logging.tqdm(todo, desc=f"{subject.name}, {spec}", leave=False)]
            new = _checked(spec, metric(images, [texts[i] for i in todo], subject), len(todo))
            for i, values in zip(todo, new, strict=True):
                found[i] = values
                store.put(parts[i] | {"metric": spec}, values)
        for values, own in zip(scores, found, strict=True):
            if twice := values.keys() & own.keys():
                raise ValueError(
                    f"{spec} gives the score {sorted(twice)[0]!r}, as another metric does: evaluate with one of them."
                )
            values |= own
    return [
        {"run": run.name, "subject": subject.name, "prompt": text, "seed": p.seed, "scores": values}
        for p, text, values in zip(pictures, texts, scores, strict=True)
    ]


def _is(picture: PlannedImage) -> bool:
    key = read_provenance(picture.path)
    return key is not None and {"prompt": picture.prompt, "seed": picture.seed}.items() <= json.loads(key).items()


def _checked(spec: str, columns: Any, count: int) -> list[dict[str, float]]:
    """A metric's answer, picture by picture."""
    good = isinstance(columns, Mapping) and columns and all(len(values) == count for values in columns.values())
    if not good or not all(math.isfinite(value) for values in columns.values() for value in values):
        raise ValueError(f"The metric {spec} must give a finite number for each of {count} pictures under each score's name.")
    return [{name: float(values[i]) for name, values in columns.items()} for i in range(count)]


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _digest(files: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
