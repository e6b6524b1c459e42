"""The known text encoders and model families, one row each.

Files, model cards, inspection and conversion look everything up here. To add an encoder or a family, add its row.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

COMPONENTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


@dataclass(frozen=True)
class TextEncoderKind:
    """A kind of text encoder.

    Args:
        model_type: the `model_type` of its configuration in transformers; for models that also see images, of the text part's.
        width: the width of its embeddings.
        label: its name, and the models that have it.
    """

    model_type: str
    width: int
    label: str


# By the key in ComfyUI's files, in the order in which pipelines have them.
TEXT_ENCODERS = {
    "clip_l": TextEncoderKind("clip_text_model", 768, "CLIP-L (Stable Diffusion 1, SDXL, SD3, Flux)"),
    "clip_h": TextEncoderKind("clip_text_model", 1024, "CLIP-H (Stable Diffusion 2)"),
    "clip_g": TextEncoderKind("clip_text_model", 1280, "CLIP bigG (SDXL, SD3)"),
    "t5xxl": TextEncoderKind("t5", 4096, "T5-XXL (Flux, SD3, PixArt, Chroma, LTX-Video)"),
    "umt5xxl": TextEncoderKind("umt5", 4096, "UMT5-XXL (Wan)"),
    "gemma2_2b": TextEncoderKind("gemma2", 2304, "Gemma 2 2B (SANA, Lumina 2)"),
    "gemma3_12b": TextEncoderKind("gemma3_text", 3840, "Gemma 3 12B (LTX-2)"),
    "qwen3_4b": TextEncoderKind("qwen3", 2560, "Qwen3 4B (Z-Image, FLUX.2 klein 4B)"),
    "qwen3_8b": TextEncoderKind("qwen3", 4096, "Qwen3 8B (FLUX.2 klein 9B)"),
    "qwen25_7b": TextEncoderKind("qwen2_5_vl_text", 3584, "Qwen2.5-VL 7B (Qwen-Image)"),
    "llama": TextEncoderKind("llama", 4096, "Llama 3 8B (HiDream, HunyuanVideo)"),
    "mistral3_24b": TextEncoderKind("mistral", 5120, "Mistral Small 3 (FLUX.2 dev)"),
}


@dataclass(frozen=True)
class ModelFamily:
    """A family of models.

    Args:
        name: the family's name in files of concepts, and of its class in `families/`.
        encoders: the keys of its text encoders, by component; empty for a name that covers several layouts.
        task: the Hub's name for the task of its pipelines.
        tags: further tags for its model cards.
        label: how `dti inspect` describes a concept with these widths whose file names no family; None for `name`.
        declares_encoders: take `encoders` as declared by the family's name, because their widths are ambiguous.
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
    ModelFamily("Lumina 2", {"text_encoder": "gemma2_2b"}, tags=("lumina2",), declares_encoders=True),
    ModelFamily(
        "Wan", {"text_encoder": "umt5xxl"}, "text-to-video", ("wan",), "Wan, or another with a T5-XXL or UMT5-XXL", True,
    ),
    ModelFamily(
        "Flux", {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"}, tags=("flux",), declares_encoders=True,
    ),
    ModelFamily(
        "Stable Diffusion 3", {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
        tags=("sd3",), declares_encoders=True,
    ),
    ModelFamily(
        "HiDream", {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl", "text_encoder_4": "llama"},
    ),
    ModelFamily("HunyuanVideo", {"text_encoder": "llama", "text_encoder_2": "clip_l"}, "text-to-video"),
    ModelFamily(
        "Z-Image", {"text_encoder": "qwen3_4b"}, tags=("z-image",), label="Z-Image or FLUX.2 klein 4B", declares_encoders=True,
    ),
    # The 9B model has `qwen3_8b`, known by its width.
    ModelFamily(
        "FLUX.2 klein", {"text_encoder": "qwen3_4b"}, tags=("flux2", "flux2-klein"), label="Z-Image or FLUX.2 klein 4B",
        declares_encoders=True,
    ),
    ModelFamily("FLUX.2 dev", {"text_encoder": "mistral3_24b"}),
    ModelFamily("Qwen-Image", {"text_encoder": "qwen25_7b"}, tags=("qwen-image",), declares_encoders=True),
    ModelFamily(
        "PixArt", {"text_encoder": "t5xxl"}, tags=("pixart",), label="Wan, or another with a T5-XXL or UMT5-XXL",
        declares_encoders=True,
    ),
    ModelFamily("LTX-2", {"text_encoder": "gemma3_12b"}, "text-to-video"),
)  # fmt: skip
MODEL_FAMILIES = {row.name: row for row in _ROWS}


def declared_encoders(components: Iterable[str], metadata: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the encoder key of each component as the concept's file or its family declares it; empty if neither does."""
    if metadata.get("encoders"):
        return dict(metadata["encoders"])
    family = MODEL_FAMILIES.get(str(metadata.get("family")))
    if family is None or not family.declares_encoders:
        return {}
    # Loading may have moved the rows of a family's only encoder to another component of the pipeline.
    only = next(iter(family.encoders.values())) if len(family.encoders) == 1 else None
    return {component: family.encoders.get(component, only) for component in components}


def infer_encoders(widths: Mapping[str, int], metadata: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the encoder key of each component of a concept.

    Args:
        widths: the width of the rows by component.
        metadata: the concept's; what it declares takes precedence.

    Returns:
        The key in TEXT_ENCODERS by component, or None if neither the metadata nor the width determines it.
    """
    declared = declared_encoders(widths, metadata)
    found: dict[str, str | None] = {}
    for component, width in widths.items():
        key = declared.get(component)
        found[component] = _of_its_size(key, width) if key else _encoder_of_width(component, widths)
    return found


def _of_its_size(key: str, width: int) -> str:
    """Return the encoder of the same model type that is `width` wide, or else `key` itself.

    A family's name declares one size of its encoder, and its larger models have another.
    """
    declared = TEXT_ENCODERS.get(key)
    for other, kind in TEXT_ENCODERS.items():
        if declared is not None and (kind.model_type, kind.width) == (declared.model_type, width):
            return other
    return key


def _encoder_of_width(component: str, widths: Mapping[str, int]) -> str | None:
    """Return the encoder that the rows of a component are for, by their width and place and by the widths of the others."""
    candidates = [key for key, kind in TEXT_ENCODERS.items() if kind.width == widths[component]]
    if len(candidates) == 1:
        return candidates[0]
    for family in MODEL_FAMILIES.values():
        if family.encoders and family.label is None and widths == _widths_of(family):
            return family.encoders[component]
    if set(widths) == {COMPONENTS[0]}:
        return None
    if candidates:  # a pipeline with several encoders has T5, not UMT5, which is as wide
        return "t5xxl" if "t5xxl" in candidates else None
    # models of unknown widths are small ones for tests
    return ("clip_l", "clip_g", "t5xxl", "llama")[COMPONENTS.index(component)]


def _widths_of(family: ModelFamily) -> dict[str, int]:
    return {component: TEXT_ENCODERS[key].width for component, key in family.encoders.items()}


def encoder_label(key: str | None, width: int) -> str | None:
    """Name the encoders that rows may be for, by their key and width; None if neither is known."""
    declared = TEXT_ENCODERS.get(key or "")
    labels = []
    for kind in TEXT_ENCODERS.values():
        if kind.width == width and (declared is None or declared.model_type == kind.model_type):
            labels.append(kind.label)
    return " or ".join(labels) or (declared.label if declared else None)


def infer_family(widths: Mapping[str, int]) -> str | None:
    """Name the family that a concept is most likely for, by the widths of its components; None if no family fits."""
    for family in MODEL_FAMILIES.values():
        if family.encoders and widths == _widths_of(family):
            return family.label or family.name
    return None
