"""The paper's protocol: every subject in its prompts, from some seeds, each picture scored once (method: paper, section 5)."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import logging
from PIL import Image

from ..pictures import Picture, draw
from ..store import Store
from ..subjects import Subject
from .metrics import Metric
from .prompts import LIVE_PROMPTS, OBJECT_PROMPTS, is_live


@dataclass(frozen=True)
class Run:
    """A folder with a concept for each subject, as `dti train` writes it, and the scale to load them at."""

    name: str
    folder: Path
    token_scale: str | float | None

    @classmethod
    def parse(cls, text: str) -> "Run":
        """From "out/ti", or "out/ti@mean" to bring its norms to the vocabulary's mean; "@min", "@max" and numbers likewise."""
        folder, _, scale = text.partition("@")
        number = scale.replace(".", "", 1).isdigit()
        name = Path(folder).resolve().name
        return cls(f"{name}@{scale}" if scale else name, Path(folder), float(scale) if number else scale or None)


def prompts_of(subject: Subject, given: Mapping[str, Sequence[str]] | None) -> Sequence[str]:
    """The subject's own prompts, those given for its kind ("object" or "live"), or the built-in ones."""
    if subject.prompts is not None:
        return subject.prompts
    live = is_live(subject.word)
    if given is not None:
        return given["live" if live else "object"]
    return LIVE_PROMPTS if live else OBJECT_PROMPTS


def planned(run: Run, subject: Subject, prompts: Sequence[str], seeds: Sequence[int], folder: Path) -> list[Picture]:
    """The pictures of a run and subject; their prompts have the "{}" still."""
    return [
        Picture.named(folder / run.name / subject.name, number, prompt.replace("{}", subject.word), prompt, seed)
        for seed in seeds
        for number, prompt in enumerate(prompts)
    ]


@contextmanager
def loaded(pipe: Any, sources: Sequence[str | Path], token_scale: str | float | None) -> Iterator[dict[str, Any]]:
    """Concepts in a pipeline for a while, with the adapters that lie beside them; gives what tells them from others.

    Args:
        pipe: the pipeline.
        sources: folders or Hub ids.
        token_scale: see `load_directional_inversion`.

    Raises:
        OSError: where there is no concept.
    """
    words, adapters, digest = [], [], hashlib.sha256()
    try:
        for source in sources:
            concept = pipe.load_directional_inversion(source, token_scale=token_scale)
            words.append(concept.placeholder_token)
            for component, rows in concept.embeddings.items():
                digest.update(f"{words[-1]} {component}".encode() + rows.numpy().tobytes())
            file = Path(source) / LORA_WEIGHT_NAME_SAFE
            if file.is_file():
                adapters.append(f"adapter{len(adapters)}")
                pipe.load_lora_weights(source, weight_name=file.name, adapter_name=adapters[-1])
                digest.update(file.read_bytes())
        if len(adapters) > 1:
            pipe.set_adapters(adapters)  # loading one leaves it alone active
        yield {"concepts": digest.hexdigest()}
    finally:
        if words:
            pipe.unload_directional_inversion(words)
        if adapters:
            pipe.unload_lora_weights()


def generate(
    pipe: Any, run: Run, subject: Subject, pictures: Sequence[Picture], batch_size: int, call: Mapping[str, Any]
) -> None:
    """Draw what is not there yet.

    Raises:
        OSError: where the run has not learned the subject.
    """
    with loaded(pipe, [run.folder / subject.name], run.token_scale) as origin:
        (word,) = pipe.directional_inversions
        draw(pipe, [p.of(word) for p in pictures], origin, batch_size, call)


def score(
    run: Run, subject: Subject, pictures: Sequence[Picture], metrics: Mapping[str, Metric], store: Store
) -> list[dict[str, Any]]:
    """Records for `summarise`, one a picture; what the store has is not computed again.

    Args:
        run, subject: what the pictures are of.
        pictures: from `planned`, drawn.
        metrics: by what the user calls them, which is part of what a score is stored under.
        store: of scores.

    Raises:
        OSError: for pictures that are missing; none counts as zero.
    """
    if missing := [str(p.path) for p in pictures if not p.path.is_file()]:
        raise OSError(f"{len(missing)} of {len(pictures)} pictures of {subject.name} are missing, the first is {missing[0]}.")
    texts = [p.prompt.replace("{}", subject.word) for p in pictures]
    photos = _digest(subject.files, subject.mask_folder)
    scores: list[dict[str, float]] = [{} for _ in pictures]
    for spec, metric in metrics.items():
        keys = [
            {"picture": _digest([p.path]), "text": text, "subject": subject.name, "photos": photos, "metric": spec}
            for p, text in zip(pictures, texts)
        ]
        found = [store.get(key) for key in keys]
        todo = [i for i, values in enumerate(found) if values is None]
        if todo:
            images = [_open(pictures[i].path) for i in logging.tqdm(todo, desc=f"{subject.name}, {spec}", leave=False)]
            columns = metric(images, [texts[i] for i in todo], subject)
            for place, i in enumerate(todo):
                found[i] = {name: values[place] for name, values in columns.items()}
                store.put(keys[i], found[i])
        for values, new in zip(scores, found, strict=True):
            values |= new
    return [
        {"run": run.name, "subject": subject.name, "prompt": p.prompt, "seed": p.seed, "scores": values}
        for p, values in zip(pictures, scores, strict=True)
    ]


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _digest(files: Sequence[Path], masks: Path | None = None) -> str:
    found = sorted(masks.rglob("*.png")) if masks else []
    return hashlib.sha256(b"".join(file.read_bytes() for file in (*files, *found))).hexdigest()
