"""A world's test subjects as files for the command `dti`, and the verifier as a metric for `dti evaluate`."""

import json
from collections.abc import Sequence
from pathlib import Path

import measure
import scenes
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from scenes import Bundle

from diffusers_dti.data.subjects import Subject


def name_of(bundle: Bundle) -> str:
    """Return the subject's name in files."""
    return "_".join([bundle.fill, bundle.shape, bundle.border, bundle.dot])


def write(folder: Path, bundles: Sequence[Bundle], pixels: int) -> Path:
    """Write five photos of each subject, and the JSON file of the subjects with their prompts. Returns the file's path."""
    entries = {}
    for bundle in bundles:
        own = folder / name_of(bundle)
        own.mkdir(parents=True, exist_ok=True)
        for number, photo in enumerate(scenes.photos(bundle, pixels=pixels)):
            photo.save(own / f"{number:02}.png")
        prompts = [p.text for p in measure.prompts(bundle, "{}")]
        entries[name_of(bundle)] = {"path": str(own), "class": bundle.shape, "prompts": prompts}
    file = folder / "subjects.json"
    file.write_text(json.dumps(entries, indent=2) + "\n")
    return file


def verify(pictures: Sequence[Image.Image], texts: Sequence[str], subject: Subject) -> dict[str, list[float]]:
    """Score each image of a subject by the verifier, as "subject" and "prompt": a metric for `dti evaluate`."""
    bundle = next(b for b in scenes.TEST_SUBJECTS if name_of(b) == subject.name)
    asked = {p.text: p for p in measure.prompts(bundle, subject.class_noun)}
    images = VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(list(pictures)))
    each = [measure.scores(image[None], [asked[text]]) for image, text in zip(images, texts, strict=True)]
    return {name: [scores[name] for scores in each] for name in ("subject", "prompt")}
