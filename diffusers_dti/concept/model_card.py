"""The model card: what a concept is, how to use it, and how it was made. User text in it is text and nothing else."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import ModelCard, ModelCardData

from . import formats
from .hub import IMAGES, REPO_ID
from .methods import METHODS
from .registry import MODEL_FAMILIES, infer_encoders

if TYPE_CHECKING:
    from .inversion import DirectionalInversion

# huggingface_hub renders it by Jinja2, which torch brings along
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")

STOCK = {"clip_l", "clip_h", "clip_g", None}  # encoders of pipelines with `load_textual_inversion`; None are unknown ones
SCALE_RULES = {
    "mean": "the mean of the encoder's vocabulary",
    "min": "the smallest of the encoder's vocabulary",
    "max": "the largest of the encoder's vocabulary",
    "initializer": "that of the initializer",
    "learned": 'learned with the direction (`token_scale="mean"` loads it at the norm of a word)',
}


def escaped(value: Any) -> str:
    """User text for Markdown, tables included, on one line: whatever could be syntax as an entity, which is text alone."""
    line = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).split())
    return re.sub(r"""[^\w\s,.;/?'"(){}%=+-]|(?<![^\W_])_|_(?![^\W_])""", lambda c: f"&#{ord(c[0])};", line)


def quoted(value: str) -> str:
    """User text as a literal of Python on one line, for code blocks."""
    return json.dumps(value, ensure_ascii=False)


def model_card(
    concept: "DirectionalInversion",
    repo_id: str,
    prompts: Sequence[str | None] = (),
    license: str | None = None,
    subfolder: str | None = None,
    adapter: bool = False,
    angle: float | None = None,
) -> ModelCard:
    """The card of a concept that is pushed to `repo_id`.

    Args:
        prompts: of the samples, `images/0.png` and so on.
        license: as the Hub names it, "apache-2.0"; None leaves the field out.
        subfolder: of the repository, where the files are.
        adapter: whether there is one beside the token.
        angle: to the initializer, degrees, mean over the vectors.
    """
    word, metadata = concept.placeholder_token, concept.metadata
    keys = ("family", "method", "base_model", "initializer", "scale_rule")
    family, method, base, initializer, rule = (str(metadata[k]) if metadata.get(k) else None for k in keys)
    if base and not re.fullmatch(REPO_ID, base, re.ASCII):
        base = None  # a folder's name, or whatever another program wrote, is no repository
    row = MODEL_FAMILIES.get(family or "")
    tags = [
        "textual_inversion",
        *(["directional-textual-inversion"] if method and not (method in METHODS and METHODS[method].raw) else []),
    ]
    data = ModelCardData(
        base_model=base,
        library_name="diffusers",
        license=license,
        tags=tags + ([*row.tags, row.task] if row else []) + ["lora"] * adapter,
        instance_prompt=word,
        widget=[{"text": p or " ", "output": {"url": f"{IMAGES}/{i}.png"}} for i, p in enumerate(prompts)] or None,
    )
    inside = f", subfolder={quoted(subfolder)}" if subfolder else ""
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        word=escaped(word),
        base=base,
        family=escaped(family) if family else None,
        method=METHODS[method].citation if method in METHODS else None,
        initializer=escaped(initializer) if initializer else None,
        samples=bool(prompts),
        load=f"{quoted(repo_id)}{inside}",
        prompt=quoted(next(filter(None, prompts), f"a {word} on the beach")),
        video=row is not None and row.task == "text-to-video",
        adapter=LORA_WEIGHT_NAME_SAFE if adapter else None,
        stock=[(c, c.replace("text_encoder", "tokenizer"), formats.file_name(c)) for c in concept.scales]
        if set(infer_encoders({c: v.shape[1] for c, v in concept.directions.items()}, metadata).values()) <= STOCK
        else [],
        norms=[(c, *v.shape, ", ".join(f"{m:.4g}" for m in concept.scales[c].tolist())) for c, v in concept.directions.items()],
        scale_rule=SCALE_RULES.get(rule, escaped(rule)) if rule else None,
        angle=angle,
        settings={escaped(k): escaped(v) for k, v in _given(metadata.get("training")).items()},
        versions={escaped(k): escaped(v) for k, v in _given(metadata.get("versions")).items()},
    )


def _given(values: Any) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else {}
