"""Write the model card: what a concept is, how to use it, and how it was made. User text stays text in it."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import ModelCard, ModelCardData

from . import formats
from .concept import Concept
from .hub import REPO_ID
from .methods import METHODS
from .registry import MODEL_FAMILIES, ModelFamily, infer_encoders

# `ModelCard.from_template` renders it with Jinja2, which torch depends on.
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")

IMAGES = "images"  # the folder of the samples
# Encoders of pipelines that have the stock `load_textual_inversion`; None is an unknown encoder.
STOCK_ENCODERS = {"clip_l", "clip_h", "clip_g", None}
SCALE_RULES = {
    "mean": "the mean of the encoder's vocabulary",
    "min": "the smallest of the encoder's vocabulary",
    "max": "the largest of the encoder's vocabulary",
    "initializer": "that of the initializer",
    "learned": 'learned with the direction (`token_scale="mean"` loads it at the norm of a word)',
}


def escaped(value: Any) -> str:
    """Turn a value into one line of Markdown, tables included, that shows as text: characters of syntax become entities."""
    line = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).split())
    # An underscore within a word is not syntax.
    return re.sub(r"""[^\w\s,.;/?'"(){}%=+-]|(?<![^\W_])_|_(?![^\W_])""", lambda c: f"&#{ord(c[0])};", line)


def quoted(value: str) -> str:
    """Turn text into a Python literal on one line, for code blocks."""
    return json.dumps(value, ensure_ascii=False)


def model_card(
    concept: Concept,
    repo_id: str,
    prompts: Sequence[str | None] = (),
    license: str | None = None,
    subfolder: str | None = None,
    adapter: bool = False,
    angle: float | None = None,
) -> ModelCard:
    """Write the card of a concept that is pushed to `repo_id`.

    Args:
        concept: the concept.
        repo_id: "user/name".
        prompts: the prompts of the samples `images/0.png`, `images/1.png`, and so on; None if a sample has no prompt.
        license: the Hub's name of the license, such as "apache-2.0"; None leaves the field out.
        subfolder: the folder of the files in the repository.
        adapter: whether an adapter is saved next to the concept.
        angle: the angle to the initializer in degrees, averaged over the vectors.
    """
    word, metadata = concept.placeholder_token, concept.metadata
    method = _text(metadata, "method")
    rule = _text(metadata, "scale_rule")
    base = _text(metadata, "base_model")
    if base is not None and not REPO_ID.fullmatch(base):
        base = None  # the name of a folder, or another program's text, is not a repository
    family = MODEL_FAMILIES.get(str(metadata.get("family")))
    data = ModelCardData(
        base_model=base,
        library_name="diffusers",
        license=license,
        tags=_tags(method, family, adapter),
        instance_prompt=word,
        widget=_gallery(prompts),
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        word=escaped(word),
        base=base,
        family=_escaped_text(metadata, "family"),
        method=METHODS[method].citation if method in METHODS else None,
        initializer=_escaped_text(metadata, "initializer"),
        samples=bool(prompts),
        load=quoted(repo_id) + (f", subfolder={quoted(subfolder)}" if subfolder else ""),
        prompt=quoted(next(filter(None, prompts), f"a {word} on the beach")),
        video=family is not None and family.task == "text-to-video",
        adapter=LORA_WEIGHT_NAME_SAFE if adapter else None,
        stock=_stock_loads(concept),
        norms=_norms(concept),
        scale_rule=SCALE_RULES.get(rule, escaped(rule)) if rule else None,
        angle=angle,
        settings=_table(metadata.get("training")),
        versions=_table(metadata.get("versions")),
    )


def _text(metadata: Mapping[str, Any], key: str) -> str | None:
    """Return a value of the metadata as text, or None if there is none."""
    return str(metadata[key]) if metadata.get(key) else None


def _escaped_text(metadata: Mapping[str, Any], key: str) -> str | None:
    """Return a value of the metadata as Markdown, or None if there is none."""
    return escaped(str(metadata[key])) if metadata.get(key) else None


def _tags(method: str | None, family: ModelFamily | None, adapter: bool) -> list[str]:
    """List the tags by which the Hub finds the concept."""
    tags = ["textual_inversion"]
    # Classic methods and concepts of other programs are not directional.
    if method and not (method in METHODS and METHODS[method].raw):
        tags.append("directional-textual-inversion")
    if family is not None:
        tags += [*family.tags, family.task]
    if adapter:
        tags.append("lora")
    return tags


def _gallery(prompts: Sequence[str | None]) -> list[dict[str, Any]] | None:
    """List the samples as the Hub's widget wants them; None if there are none."""
    widget = []
    for number, prompt in enumerate(prompts):
        widget.append({"text": prompt or " ", "output": {"url": f"{IMAGES}/{number}.png"}})
    return widget or None


def _stock_loads(concept: Concept) -> list[tuple[str, str, str]]:
    """List encoder, tokenizer and file of each call of `load_textual_inversion`; empty if its pipelines have no such method."""
    widths = {component: v.shape[1] for component, v in concept.directions.items()}
    if not set(infer_encoders(widths, concept.metadata).values()) <= STOCK_ENCODERS:
        return []
    loads = []
    for component in concept.scales:
        loads.append((component, component.replace("text_encoder", "tokenizer"), formats.file_name(component)))
    return loads


def _norms(concept: Concept) -> list[tuple[str, int, int, str]]:
    """List component, number of vectors, width and norms."""
    rows = []
    for component, v in concept.directions.items():
        norms = ", ".join(f"{m:.4g}" for m in concept.scales[component].tolist())
        rows.append((component, v.shape[0], v.shape[1], norms))
    return rows


def _table(values: Any) -> dict[str, str]:
    """Return a mapping of the metadata as Markdown, without what is None; empty if it is not a mapping."""
    if not isinstance(values, dict):
        return {}
    return {escaped(key): escaped(value) for key, value in values.items() if value is not None}
