"""The text encoders of a pipeline: found, matched to a concept, measured. Nothing here writes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from diffusers import ModularPipeline
from diffusers.utils import logging
from torch import Tensor, nn

from ..concept import registry
from ..concept.inversion import DirectionalInversion
from .protocols import Pipeline, Tokenizer

logger = logging.get_logger(__name__)

Pooling = Literal["eos", "legacy"]
ScaleRule = Literal["mean", "min", "max"]

_STATE = "_directional_inversions"  # on the encoder itself, not on the pipeline, since pipelines share encoders


@dataclass
class LoadedConcept:
    """One concept in one encoder's table."""

    inversion: DirectionalInversion
    tokens: list[str]
    ids: list[int]
    pooling: Pooling
    reused_rows: Tensor | None  # the rows that a reopened pipeline already had under these tokens


@dataclass
class VocabularyState:
    """What unloading needs to put an encoder back."""

    table_rows: int  # of the table before the first concept
    vocab_size: int | None  # of the config before the first concept
    tokens_without_row: frozenset[str]  # tokens whose ids were beyond the table
    concepts: dict[str, LoadedConcept] = field(default_factory=dict)  # by placeholder, in order of loading
    overwritten_rows: dict[int, Tensor] = field(default_factory=dict)  # spare rows, without a token, that concepts now use
    legacy_eos: list[Any] = field(default_factory=list)  # the config and modules whose `eos_token_id` was 2


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer and its encoder.

    Args:
        component: the encoder's name in the pipeline, such as "text_encoder_2".
        tokenizer: the tokenizer whose ids the encoder reads.
        model: the encoder, a model of transformers.
    """

    component: str
    tokenizer: Tokenizer
    model: Any

    @property
    def weight(self) -> nn.Parameter:
        """The table of input embeddings, (rows, d)."""
        return self.model.get_input_embeddings().weight

    @property
    def width(self) -> int:
        """The width d of the embeddings."""
        return self.weight.shape[1]

    @property
    def config(self) -> Any:
        """The configuration that has `vocab_size`, also where a model has several."""
        return self.model.config.get_text_config()

    @property
    def state(self) -> VocabularyState | None:
        """What was done to the encoder; None while no concept is loaded."""
        return getattr(self.model, _STATE, None)

    @property
    def concepts(self) -> dict[str, LoadedConcept]:
        """The concepts that are loaded, by placeholder."""
        return {} if self.state is None else self.state.concepts

    def token_ids(self, placeholder: str) -> list[int]:
        """The ids of a loaded concept's vectors."""
        return self.concepts[placeholder].ids

    def embedding_modules(self) -> list[nn.Embedding]:
        """Every module that looks up in the table. UMT5 calls another one than `get_input_embeddings()`."""
        weight = self.weight
        return [m for m in self.model.modules() if isinstance(m, nn.Embedding) and m.weight is weight]

    def matches(self, key: str | None, width: int) -> bool:
        """Whether rows of a width, for the kind of encoder that `key` names (None for any), belong to this encoder."""
        kind = registry.TEXT_ENCODERS.get(key or "")
        return width == self.width and (kind is None or kind.model_type == self.config.model_type)

    def original_rows(self) -> Tensor:
        """A mask, (rows,) bool, of the encoder's own tokens: no spare rows, no concepts, no stock textual inversions."""
        mask = torch.arange(len(self.weight)) < len(self.tokenizer)
        for id, token in self.tokenizer.added_tokens_decoder.items():
            if not token.special and id >= self.tokenizer.vocab_size and id < len(mask):
                mask[id] = False
        for concept in self.concepts.values():
            mask[concept.ids] = False
        return mask

    def norm(self, rule: str) -> float:
        """The "mean", "min" or "max" norm of the encoder's own rows, without rows of norm 0 (paper, section 4)."""
        if rule not in get_args(ScaleRule):
            raise ValueError(f'token_scale must be "mean", "min", "max" or a positive number, got {rule!r}.')
        norms = torch.linalg.vector_norm(self.weight.detach(), dim=-1, dtype=torch.float32)
        norms = norms[self.original_rows().to(norms.device) & (norms > 0)]
        return getattr(norms, rule)().item()


def find_text_encoders(pipe: Pipeline) -> dict[str, TextEncoder]:
    """Find the text encoders of a pipeline that have a tokenizer of their own, by component.

    Raises:
        ValueError: if there are none, listing the components that were found.
    """
    components = pipe.components
    encoders = {}
    for name in sorted(n for n in components if n.startswith("text_encoder")):
        model, tokenizer = components[name], components.get(name.replace("text_encoder", "tokenizer"))
        if isinstance(model, nn.Module) and hasattr(model, "get_input_embeddings") and hasattr(tokenizer, "add_tokens"):
            encoders[name] = TextEncoder(name, tokenizer, model)
    if not encoders:
        raise ValueError(_describe_missing(pipe))
    return encoders


def _describe_missing(pipe: Pipeline) -> str:
    name = type(pipe).__name__
    found = {n: type(c).__name__ for n, c in pipe.components.items() if n.startswith(("text_encoder", "tokenizer"))}
    if isinstance(pipe, ModularPipeline) and "NoneType" in found.values():
        missing = ", ".join(n for n, kind in found.items() if kind == "NoneType")
        return f"{missing} of this {name} are not loaded yet: call `load_components()` first."
    has = found or "neither"
    return f"{name} has no text encoder with a tokenizer of its own, so there is nowhere to put a token. It has: {has}."


def rescale(
    encoders: Mapping[str, TextEncoder], inversion: DirectionalInversion, token_scale: str | float
) -> DirectionalInversion:
    """Bring a concept to the "mean", "min" or "max" norm of each encoder's vocabulary, or to a number."""
    if isinstance(token_scale, str):
        scaled = inversion.rescale({c: encoders[c].norm(token_scale) for c in inversion.scales})
    elif token_scale > 0:
        scaled = inversion.rescale(token_scale)
    else:
        raise ValueError(f'token_scale must be "mean", "min", "max" or a positive number, got {token_scale!r}.')
    return replace(scaled, metadata=scaled.metadata | {"scale_rule": token_scale})


def match_components(
    pipe: Pipeline, encoders: Mapping[str, TextEncoder], inversion: DirectionalInversion
) -> DirectionalInversion:
    """Return the parts of a concept that are for this pipeline, by the pipeline's components.

    Other programs' files do not name the component that a part is for. Such parts go by the kind and width of the encoder.

    Raises:
        ValueError: if no part fits, naming the model that the concept is for.
    """
    widths = {c: v.shape[1] for c, v in inversion.directions.items()}
    keys = registry.declared_encoders(widths, inversion.metadata)
    places = _find_places(encoders, widths, keys)
    if not any(widths[c] == encoders[p].width for c, p in places.items()):
        raise ValueError(_describe_mismatch(pipe, encoders, inversion, keys))
    unused = sorted(widths.keys() - places.keys())
    if unused:
        parts = ", ".join((c in keys and registry.encoder_label(keys[c], widths[c])) or c for c in unused)
        later = " If it is not loaded yet, call `load_components()` first." if isinstance(pipe, ModularPipeline) else ""
        logger.warning(f"{type(pipe).__name__} has no {parts}: that part of the concept stays unused.{later}")
    elif all(c == p for c, p in places.items()):
        return inversion
    directions, scales = ({p: values[c] for c, p in places.items()} for values in (inversion.directions, inversion.scales))
    declared = {p: keys[c] for c, p in places.items() if c in inversion.metadata.get("encoders", {})}
    metadata = inversion.metadata | ({"encoders": declared} if declared else {})
    return replace(inversion, directions=directions, scales=scales, metadata=metadata)


def _find_places(
    encoders: Mapping[str, TextEncoder], widths: Mapping[str, int], keys: Mapping[str, str | None]
) -> dict[str, str]:
    """Which component of the pipeline each part of a concept is for."""
    places = {}
    for component, width in widths.items():
        if component in encoders and (component not in keys or encoders[component].matches(keys[component], width)):
            places[component] = component
    for component, width in widths.items():
        if component in keys and component not in places:
            for name, encoder in encoders.items():
                if name not in places.values() and encoder.matches(keys[component], width):
                    places[component] = name
                    break
    return {c: places[c] for c in widths if c in places}


def _describe_mismatch(
    pipe: Pipeline, encoders: Mapping[str, TextEncoder], inversion: DirectionalInversion, keys: Mapping[str, str | None]
) -> str:
    parts = []
    for component, v in inversion.directions.items():
        label = registry.encoder_label(keys.get(component), v.shape[1]) or component
        parts.append(f"{label}, {v.shape[1]} wide" if component in encoders else label)
    here = ", ".join(f"{c} ({encoder.width} wide)" for c, encoder in encoders.items())
    base = inversion.metadata.get("base_model")
    return (
        f"{inversion.placeholder_token} is for {' and '.join(parts)}, and {type(pipe).__name__} has only {here}: it was "
        f"learned with another model{f', {base}' if base else ''}."
    )
