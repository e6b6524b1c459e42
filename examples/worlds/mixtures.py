"""Mix two concepts, and measure how much of either subject the images show."""

from dataclasses import dataclass
from itertools import product

import scenes
import torch
import verifier
from diffusers import DiffusionPipeline
from gates import generate

from diffusers_dti import DirectionalInversion


@dataclass(frozen=True)
class Point:
    """The images of a mixture, and the shares that the verifier found in them."""

    images: torch.Tensor
    figures: dict[str, float]


def straight(a: DirectionalInversion, b: DirectionalInversion, t: float) -> DirectionalInversion:
    """Mix the embeddings themselves. The norms are not corrected."""
    rows = {c: torch.lerp(e, b.embeddings[c], t) for c, e in a.embeddings.items()}
    return DirectionalInversion.from_embeddings(a.placeholder_token, rows)


def prompt_scenes() -> list[scenes.Scene]:
    """Return a scene for every size, place and background, with the patterns in turn. Its bundle is a stand-in."""
    made = []
    settings = product(scenes.SIZES, list(scenes.PLACES)[:3], scenes.BACKGROUNDS)
    for i, (size, place, background) in enumerate(settings):
        made.append(scenes.Scene(scenes.TEST_SUBJECTS[0], size, place, background, scenes.PATTERNS[i % 3]))
    return made


def measure_mixture(
    pipe: DiffusionPipeline, mixture: DirectionalInversion, first: scenes.Bundle, second: scenes.Bundle
) -> Point:
    """Generate images of a mixture for all prompts and read them. Every other prompt has the placeholder at its end."""
    wanted = prompt_scenes()
    pipe.load_directional_inversion(mixture)
    try:
        captions = [s.caption(mixture.placeholder_token, late=i % 2 == 1) for i, s in enumerate(wanted)]
        images = generate(pipe, captions)
    finally:
        pipe.unload_directional_inversion(mixture.placeholder_token)
    counts: dict[str, list[bool]] = {"a": [], "b": [], "neither": [], "scene": []}
    for found, scene in zip(verifier.read(images), wanted, strict=True):
        for attribute, truth in scene.attributes().items():
            if attribute not in scenes.SUBJECT_ATTRIBUTES:
                counts["scene"].append(found[attribute] == truth)
                continue
            is_first = found[attribute] == getattr(first, attribute)
            is_second = found[attribute] == getattr(second, attribute)
            counts["a"].append(is_first)
            counts["b"].append(is_second)
            counts["neither"].append(not (is_first or is_second))
    norms = torch.cat(list(mixture.scales.values()))
    return Point(images, {k: sum(v) / len(v) for k, v in counts.items()} | {"norm": norms.mean().item()})
