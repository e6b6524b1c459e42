"""What a run in a world is worth: a subject learned, drawn in eight prompts, and read by the verifier."""

from dataclasses import dataclass, replace

import scenes
import torch
import verifier
from gates import encoders_of, generate, world_of
from scenes import SUBJECT_ATTRIBUTES, Bundle, Scene

from diffusers_dti import DirectionalInversion, DTITrainer

TOKEN = "<thing>"
# size, place, background, pattern, whether the token comes late, and which of the subject's attributes the prompt changes:
# the chef outfit of this world. Two changes at once were never in a caption of pretraining.
PROMPTS = (
    ("large", "on the left", "pink", "striped", False, ()),
    ("small", "on the right", "teal", "plain", False, ("fill",)),
    ("large", "at the top", "mint", "checkered", False, ()),
    ("small", "at the bottom", "tan", "striped", False, ("border",)),
    ("small", "on the left", "gray", "checkered", True, ("dot",)),
    ("large", "in the middle", "brown", "plain", True, ("fill", "border")),
    ("small", "at the top", "pink", "striped", True, ("fill", "dot")),
    ("large", "on the right", "teal", "checkered", True, ("border", "dot")),
)


@dataclass(frozen=True)
class Prompt:
    """A text, the scene it asks for, and which attributes of the subject it changes."""

    text: str
    scene: Scene
    edits: tuple[str, ...]


def prompts(bundle: Bundle, subject: str | None) -> list[Prompt]:
    """The eight prompts with `subject` in the subject's place (None: its full description)."""
    made = []
    for size, place, background, pattern, late, edits in PROMPTS:
        other_fill = scenes.FILLS[scenes.FILLS.index(bundle.fill) - 2]
        changes = {edit: other_fill if edit == "fill" else "no" for edit in edits}
        scene = Scene(replace(bundle, **changes), size, place, background, pattern)
        made.append(Prompt(scene.caption(subject and scenes.edited(subject, changes), late), scene, edits))
    return made


def scores(images: torch.Tensor, asked: list[Prompt]) -> dict[str, float]:
    """Shares found: of the subject's attributes, and of all else that the prompts name, changes to the subject included."""
    found = {"subject": [], "prompt": []}
    for read, prompt in zip(verifier.read(images), asked, strict=True):
        for attribute, truth in prompt.scene.attributes().items():
            of_subject = attribute in SUBJECT_ATTRIBUTES and attribute not in prompt.edits
            found["subject" if of_subject else "prompt"].append(read[attribute] == truth)
    return {k: sum(v) / len(v) for k, v in found.items()}


def norm_of(pipe, word: str) -> float:
    """Mean over the encoders of a word's norm."""
    norms = []
    for tokenizer, encoder in encoders_of(pipe).values():
        (id,) = tokenizer(word, add_special_tokens=False).input_ids
        norms.append(encoder.get_input_embeddings().weight[id].norm().item())
    return sum(norms) / len(norms)


def in_words(pipe, bundle: Bundle, subject: str | None, seed: int) -> tuple[torch.Tensor, dict[str, float]]:
    """Without any learning: the initializer word alone (the floor), or the full description (the ceiling)."""
    asked = prompts(bundle, subject)
    images = generate(pipe, [p.text for p in asked], seed)
    return images, scores(images, asked) | {"norm": norm_of(pipe, subject or bundle.shape)}


def learned(pipe, bundle: Bundle, seed: int, **settings) -> tuple[torch.Tensor, dict, DirectionalInversion]:
    """Learn the subject from five photos, draw it in the prompts, and take it out again.

    What methods without a fixed norm have learned is drawn once more at the vocabulary's mean: figures["rescaled"].
    """
    photos = scenes.photos(bundle, pixels=world_of(pipe).pixels, seed=seed)
    trainer = DTITrainer(
        pipe, placeholder_token=TOKEN, initializer_token=bundle.shape, resolution=photos[0].width, seed=seed, **settings
    )
    concept, asked = trainer.fit(photos), prompts(bundle, TOKEN)

    def draw() -> tuple[torch.Tensor, dict[str, float]]:
        images = generate(pipe, [p.text for p in asked], seed)
        norms = torch.cat(list(pipe.directional_inversions[TOKEN].scales.values()))
        pipe.unload_directional_inversion(TOKEN)
        return images, scores(images, asked) | {"norm": norms.mean().item()}

    try:
        images, figures = draw()
        figures["angle"] = trainer.history[-1]["angle"]
        if trainer.config.raw:
            pipe.load_directional_inversion(concept, token_scale="mean")
            _, figures["rescaled"] = draw()
    finally:
        if TOKEN in pipe.directional_inversions:
            pipe.unload_directional_inversion(TOKEN)
        if trainer.adapter is not None:
            pipe.unload_lora_weights()
    return images, figures, concept
