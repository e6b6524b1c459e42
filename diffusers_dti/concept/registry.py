"""The text encoders and model families that are known, one row each.

Files, model cards, inspection and conversion look everything up here. To add an encoder or a family, add its row.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

COMPONENTS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class TextEncoderKind:
    """A kind of text encoder.

    Args:
        model_type: of its configuration in transformers.
        width: of its embeddings.
        label: its name, with the models that have it.
    """

    model_type: str
    width: int
    label: str


# By the key that ComfyUI's files use, in the order in which pipelines have them.
TEXT_ENCODERS = {
    "clip_l": TextEncoderKind("clip_text_model", 768, "CLIP-L (Stable Diffusion 1, SDXL, SD3, Flux)"),
    "clip_h": TextEncoderKind("clip_text_model", 1024, "CLIP-H (Stable Diffusion 2)"),
    "clip_g": TextEncoderKind("clip_text_model", 1280, "CLIP bigG (SDXL, SD3)"),
    "t5xxl": TextEncoderKind("t5", 4096, "T5-XXL (Flux, SD3, PixArt)"),
    "umt5xxl": TextEncoderKind("umt5", 4096, "UMT5-XXL (Wan)"),
    "gemma2_2b": TextEncoderKind("gemma2", 2304, "Gemma 2 2B (SANA)"),
}


@dataclass(frozen=True)
class ModelFamily:
    """A family of models.

    Args:
        name: what concepts' files and the training family call it.
        encoders: the keys of its text encoders, by component; empty for a name that stands for several layouts.
        task: of its pipelines, as the Hub names it.
        tags: of its model cards besides.
        label: what `dti inspect` says for a concept of its encoders' widths whose file names no family; None for `name`.
        declares_encoders: whether the family's name alone says which encoders a concept is for, where the width does not.
    """

    name: str
    encoders: Mapping[str, str]
    task: Literal["text-to-image", "text-to-video"] = "text-to-image"
    tags: tuple[str, ...] = ()
    label: str | None = None
    declares_encoders: bool = False


_ROWS = (
    ModelFamily(
        "SDXL", {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}, tags=("stable-diffusion-xl",),
    ),
    ModelFamily("SDXL, its second encoder alone", {"text_encoder_2": "clip_g"}),
    ModelFamily("Stable Diffusion 1.5 and 2.x", {}, tags=("stable-diffusion",)),
    ModelFamily("Stable Diffusion 1.x", {"text_encoder": "clip_l"}),
    ModelFamily("Stable Diffusion 2.x", {"text_encoder": "clip_h"}),
    ModelFamily("SANA", {"text_encoder": "gemma2_2b"}, tags=("sana",), declares_encoders=True),
    ModelFamily(
        "Wan", {"text_encoder": "umt5xxl"}, "text-to-video", ("wan",), "Wan, or another with a T5-XXL or UMT5-XXL", True,
    ),
    ModelFamily("Flux", {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"}),
    ModelFamily(
        "Stable Diffusion 3", {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
    ),
)  # fmt: skip
MODEL_FAMILIES = {row.name: row for row in _ROWS}


def declared_encoders(components: Iterable[str], metadata: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the encoder key of each component as the concept's file or its family declares it; empty if neither does."""
    if metadata.get("encoders"):
        return dict(metadata["encoders"])
    family = MODEL_FAMILIES.get(str(metadata.get("family")))
    if family is None or not family.declares_encoders:
        return {}
    return {c: family.encoders.get(c) for c in components}


def infer_encoders(widths: Mapping[str, int], metadata: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the encoder key of each component as its file or family declares it, or by its width; None if nothing tells."""
    declared = declared_encoders(widths, metadata)
    several, found = set(widths) != {COMPONENTS[0]}, {}
    for component, width in widths.items():
        wide = [key for key, kind in TEXT_ENCODERS.items() if kind.width == width]  # both T5 and UMT5 for 4096
        by_place = "t5xxl" if wide else ("clip_l", "clip_g", "t5xxl")[COMPONENTS.index(component)]
        by_width = wide[0] if len(wide) == 1 else by_place if several else None
        found[component] = declared.get(component) or by_width
    return found


def encoder_label(key: str | None, width: int) -> str | None:
    """Name the encoder that rows are for, by their key and width; None if neither is known."""
    declared = TEXT_ENCODERS.get(key or "")
    labels = []
    for kind in TEXT_ENCODERS.values():
        if kind.width == width and (declared is None or declared.model_type == kind.model_type):
            labels.append(kind.label)
    return " or ".join(labels) or (declared.label if declared else None)


def infer_family(widths: Mapping[str, int]) -> str | None:
    """Name the family that a concept is most likely for, by its components and their widths; None if no family fits."""
    for family in MODEL_FAMILIES.values():
        if family.encoders and widths == {c: TEXT_ENCODERS[key].width for c, key in family.encoders.items()}:
            return family.label or family.name
    return None
