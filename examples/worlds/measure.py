"""Measure a method in a world: learn a subject, generate ten prompts, and read the images with the verifier."""

from dataclasses import dataclass, replace
from typing import Any

import scenes
import torch
import verifier
from captions import edited
from diffusers import DiffusionPipeline
from gates import encoders_of, generate, world_of
from scenes import SUBJECT_ATTRIBUTES, Bundle, Scene

from diffusers_dti import DirectionalInversion, DTITrainer

TOKEN = "<thing>"
# Size, place, background, pattern, whether the placeholder comes last, the subject's attributes that the prompt changes, and
# whether there is a second object. A change is this world's chef outfit. No caption of pretraining has two changes at once.
PROMPTS = (
    ("large", "on the left", "pink", "striped", False, (), False),
    ("small", "on the right", "teal", "plain", True, ("fill",), False),
    ("large", "in the middle", "brown", "checkered", False, ("fill", "border"), False),
    ("small", "on the left", "mint", "checkered", False, (), True),
    ("small", "at the top", "tan", "striped", True, (), True),
    ("small", "on the right", "gray", "plain", False, ("border",), True),
    ("small", "at the bottom", "pink", "checkered", True, ("dot",), True),
    ("small", "on the left", "teal", "striped", True, ("fill",), True),
    ("small", "at the bottom", "brown", "plain", False, ("fill", "dot"), True),
    ("small", "on the right", "mint", "striped", True, ("border", "dot"), True),
)


@dataclass(frozen=True)
class Prompt:
    """A text, the scene that it describes, and the attributes of the subject that it changes."""

    text: str
    scene: Scene
    edits: tuple[str, ...]


def prompts(bundle: Bundle, subject: str | None) -> list[Prompt]:
    """Return the ten prompts for a subject.

    Args:
        bundle: the subject.
        subject: the word for it, such as a placeholder. None uses its full description.
    """
    other_fill = scenes.FILLS[scenes.FILLS.index(bundle.fill) - 2]
    shapes = [shape for shape in scenes.SECOND_SHAPES if shape != bundle.shape]
    fills = [fill for fill in scenes.FILLS if fill not in (bundle.fill, other_fill)]
    made = []
    for i, (size, place, background, pattern, late, edits, has_second) in enumerate(PROMPTS):
        changes = {}
        for edit in edits:
            trim = "black" if getattr(bundle, edit) == "no" else "no"
            changes[edit] = other_fill if edit == "fill" else trim
        second = (shapes[i % len(shapes)], fills[i % len(fills)]) if has_second else ()
        scene = Scene(replace(bundle, **changes), size, place, background, pattern, *second)
        made.append(Prompt(scene.caption(subject and edited(subject, changes), late), scene, edits))
    return made


def scores(images: torch.Tensor, asked: list[Prompt]) -> dict[str, float]:
    """Score images by the shares of attributes that the verifier finds.

    Args:
        images: one for each prompt, (n, 3, side, side) in [0, 1].
        asked: the prompts.

    Returns:
        "subject", the share of the subject's attributes, and "prompt", the share of everything else that the prompts name,
        including changes to the subject.
    """
    found: dict[str, list[bool]] = {"subject": [], "prompt": []}
    for read, prompt in zip(verifier.read(images), asked, strict=True):
        for attribute, truth in prompt.scene.attributes().items():
            of_subject = attribute in SUBJECT_ATTRIBUTES and attribute not in prompt.edits
            found["subject" if of_subject else "prompt"].append(read[attribute] == truth)
    return {k: sum(v) / len(v) for k, v in found.items()}


def norm_of(pipe: DiffusionPipeline, word: str) -> float:
    """Return the norm of a word's row, averaged over the encoders."""
    norms = []
    for tokenizer, encoder in encoders_of(pipe).values():
        (token_id,) = tokenizer(word, add_special_tokens=False).input_ids
        norms.append(encoder.get_input_embeddings().weight[token_id].norm().item())
    return sum(norms) / len(norms)


def in_words(pipe: DiffusionPipeline, bundle: Bundle, subject: str | None, seed: int) -> tuple[torch.Tensor, dict[str, float]]:
    """Generate and score the prompts without learning anything.

    Args:
        pipe: the world's pipeline.
        bundle: the subject.
        subject: the initializer alone (the floor), or None for the full description (the ceiling).
        seed: the seed of the images.

    Returns:
        The images, and the scores with the "norm" of the word.
    """
    asked = prompts(bundle, subject)
    images = generate(pipe, [p.text for p in asked], seed)
    return images, scores(images, asked) | {"norm": norm_of(pipe, subject or bundle.shape)}


def learn(
    pipe: DiffusionPipeline, bundle: Bundle, seed: int, **settings: Any
) -> tuple[torch.Tensor, dict[str, Any], DirectionalInversion]:
    """Learn a subject from five photos, generate and score its prompts, and unload it again.

    Args:
        pipe: the world's pipeline.
        bundle: the subject.
        seed: the seed of photos, training and images.
        settings: further settings of the trainer.

    Returns:
        The images, the scores with "norm" and "angle", and the concept. If the method does not fix the norm, the entry
        "rescaled" has the scores of the same concept at the vocabulary's mean norm.
    """
    photos = scenes.photos(bundle, pixels=world_of(pipe).pixels, seed=seed)
    trainer = DTITrainer(
        pipe, placeholder_token=TOKEN, initializer_token=bundle.shape, resolution=photos[0].width, seed=seed, **settings
    )
    concept, asked = trainer.fit(photos), prompts(bundle, TOKEN)
    assert isinstance(concept, DirectionalInversion)  # a single concept is trained

    def generate_and_unload() -> tuple[torch.Tensor, dict[str, Any]]:
        images = generate(pipe, [p.text for p in asked], seed)
        norms = torch.cat(list(pipe.directional_inversions[TOKEN].scales.values()))
        pipe.unload_directional_inversion(TOKEN)
        return images, scores(images, asked) | {"norm": norms.mean().item()}

    try:
        images, figures = generate_and_unload()
        figures["angle"] = trainer.history[-1]["angle"]
        if trainer.config.raw:
            pipe.load_directional_inversion(concept, token_scale="mean")
            _, figures["rescaled"] = generate_and_unload()
    finally:
        if TOKEN in pipe.directional_inversions:
            pipe.unload_directional_inversion(TOKEN)
        if trainer.adapter is not None:
            pipe.unload_lora_weights()
    return images, figures, concept
