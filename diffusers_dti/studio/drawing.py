"""Images of prompts with concepts, always from the same seeds as without them."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from ..concept.inversion import DirectionalInversion
from ..evaluation.generation import concepts_loaded
from ..families import find_family
from ..families.base import Family
from ..pipeline.protocols import Pipeline
from ..training import validation

Sources = Sequence[str | DirectionalInversion]
Captioned = list[tuple[Image.Image, str]]


def draw_pairs(
    pipe: Pipeline, sources: Sources, prompt: str, seeds: Sequence[int], advance: Callable[[], Any] = lambda: None
) -> Captioned:
    """Generate a prompt from each seed twice: with concepts, and with their initializers' words instead.

    Args:
        pipe: the pipeline.
        sources: the concepts, or where they are.
        prompt: the prompt, with the concepts' placeholders, or "{}" for that of a single one.
        seeds: the seeds.
        advance: a function to call after each image.

    Returns:
        The images with their captions: each seed's image with the concepts, followed by the one without.

    Raises:
        ValueError: if no concept is in the prompt, or one does not fit the pipeline.
        OSError: if a source has no concept.
    """
    if not sources:
        raise ValueError("Choose a concept, or several.")
    with concepts_loaded(pipe, sources):
        concepts = pipe.directional_inversions
        text = prompt.replace("{}", next(iter(concepts))) if len(concepts) == 1 else prompt
        if not any(word in text for word in concepts):
            raise ValueError(f"The prompt shows no concept: put {' or '.join(concepts)} into it.")
        texts = {"with": text, "without": _without(text, concepts)}
        family, drawn = find_family(pipe), []
        size = _resolution(family, list(concepts.values()))
        for seed in seeds:
            for own in texts.values():
                drawn.append((validation.generate(family, [own], size, seed)[0], f"{own} · seed {seed}"))
                advance()
    return drawn


def draw_path(
    pipe: Pipeline,
    first: DirectionalInversion,
    second: DirectionalInversion,
    degrees: float,
    prompt: str,
    seeds: Sequence[int],
    advance: Callable[[], Any] = lambda: None,
) -> Captioned:
    """Generate a prompt from each seed with two concepts, and with one on the great circle through them.

    Args:
        pipe: the pipeline.
        first, second: the concepts.
        degrees: how far to move from the first one toward the second.
        prompt: the prompt, with "{}" for the concept.
        seeds: the seeds.
        advance: a function to call after each image.

    Returns:
        The images with their captions: for each seed the first concept, the one between, and the second.

    Raises:
        ValueError: if the prompt has no "{}", or the concepts do not fit each other or the pipeline.
    """
    if "{}" not in prompt:
        raise ValueError("The prompt needs {} where the concept goes.")
    points = {
        first.placeholder_token: first,
        f"{degrees:g}°": first.slerp(second, degrees=degrees),
        second.placeholder_token: second,
    }
    columns = []
    for label, concept in points.items():
        with concepts_loaded(pipe, [concept]):
            family, text = find_family(pipe), prompt.replace("{}", concept.placeholder_token)
            size, column = _resolution(family, [first, second]), []
            for seed in seeds:
                column.append((validation.generate(family, [text], size, seed)[0], f"{label} · seed {seed}"))
                advance()
            columns.append(column)
    return [image for row in zip(*columns) for image in row]


def _without(text: str, concepts: dict[str, DirectionalInversion]) -> str:
    """Return a prompt with words in place of placeholders."""
    for placeholder, concept in concepts.items():
        word = str(concept.metadata.get("initializer") or placeholder)
        text = text.replace(placeholder, re.sub(r"[^\w ]+", "", word))  # an initializer may itself be a placeholder
    return text


def _resolution(family: Family, concepts: Sequence[DirectionalInversion]) -> int:
    """Return the resolution that concepts were trained at, by default the family's."""
    found = (concept.metadata.get("training", {}).get("resolution") for concept in concepts)
    return next((value for value in found if isinstance(value, int)), family.defaults["resolution"])
