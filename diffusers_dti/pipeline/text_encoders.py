"""Find a pipeline's text encoders and measure their vocabularies. Nothing here writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal, get_args

import torch
from diffusers import ModularPipeline
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..concept import registry
from ..concept.checks import LARGEST_SCALE, SMALLEST_SCALE
from ..concept.inversion import DirectionalInversion
from .protocols import Pipeline, Tokenizer

Pooling = Literal["eos", "legacy"]
ScaleRule = Literal["mean", "min", "max"]

# The attribute is set on the encoder, not on the pipeline: pipelines share encoders.
STATE_ATTRIBUTE = "_directional_inversions"


@dataclass(frozen=True, eq=False)
class LoadedConcept:
    """One concept in one encoder's table.

    Args:
        inversion: the concept.
        tokens: the tokens of its vectors.
        ids: the ids of these tokens, which are its rows.
        pooling: where CLIP's text vector is pooled while this concept is the last one loaded.
        reused: whether a reopened pipeline already had these tokens and rows.
    """

    inversion: DirectionalInversion
    tokens: list[str]
    ids: list[int]
    pooling: Pooling
    reused: bool


@dataclass(frozen=True)
class VocabularyState:
    """What unloading needs to put an encoder back.

    Args:
        table_rows: the length of the table before the first concept.
        vocab_size: the config's `vocab_size` before the first concept.
        tokens_without_row: the tokens whose ids were beyond the table.
        concepts: the loaded concepts by placeholder, in order of loading.
        overwritten_rows: spare rows, without a token, that concepts now use, by id.
        legacy_eos: the config and modules whose own `eos_token_id` is 2.
        reopened: whether the encoder was saved with concepts in it.
        pooling: where it pooled before the first concept: "eos" if it was saved with concepts that do.
    """

    table_rows: int
    vocab_size: int | None
    tokens_without_row: frozenset[str]
    concepts: dict[str, LoadedConcept] = field(default_factory=dict)
    overwritten_rows: dict[int, Tensor] = field(default_factory=dict)
    legacy_eos: list[Any] = field(default_factory=list)
    reopened: bool = False
    pooling: Pooling = "legacy"


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder with its tokenizer.

    Args:
        component: the encoder's name in the pipeline, such as "text_encoder_2".
        tokenizer: the tokenizer whose ids the encoder reads.
        model: the encoder itself, a model of transformers.
    """

    component: str
    tokenizer: Tokenizer
    model: Any  # mypy cannot see `PreTrainedModel`, whose types differ between the supported versions

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
        """The configuration that has `vocab_size`, for models that have several configurations."""
        return self.model.config.get_text_config()

    @property
    def is_compiled(self) -> bool:
        """Whether it runs under `torch.compile`."""
        return is_compiled_module(self.model) or getattr(self.model, "_compiled_call_impl", None) is not None

    @property
    def recorded(self) -> VocabularyState | None:
        """The record as it was written at the last change; None while no concept is loaded."""
        return getattr(self.model, STATE_ATTRIBUTE, None)

    @property
    def state(self) -> VocabularyState | None:
        """The record as it is now. Stock `unload_textual_inversion` renumbers concepts or removes them, and leaves the record.

        A concept's ids are those that the tokenizer has for its tokens. A concept of another tokenizer keeps its ids as long as
        the table has its rows there.
        """
        recorded = self.recorded
        if recorded is None:
            return None
        added, rows, concepts = self.tokenizer.added_tokens_encoder, len(self.weight), {}
        for placeholder, concept in recorded.concepts.items():
            ids = [added.get(token, rows) for token in concept.tokens]
            if max(ids) < rows:
                concepts[placeholder] = replace(concept, ids=ids)
            elif self.weight.is_meta or self.holds(concept.ids, concept.inversion.embeddings[self.component]):
                concepts[placeholder] = concept  # under sequential offload rows are out of reach
        if rows < recorded.table_rows:  # stock has removed spare rows as well
            recorded = replace(recorded, table_rows=rows, vocab_size=None if recorded.vocab_size is None else rows)
        return replace(recorded, concepts=concepts)

    @property
    def concepts(self) -> dict[str, LoadedConcept]:
        """The loaded concepts by placeholder, in order of loading."""
        return {} if self.state is None else self.state.concepts

    def token_ids(self, placeholder: str) -> list[int]:
        """Return the ids of a loaded concept's vectors."""
        return self.concepts[placeholder].ids

    def holds(self, ids: Sequence[int], rows: Tensor) -> bool:
        """Return whether the table has these rows, (n, d), at these ids, at any precision and scale."""
        if max(ids) >= len(self.weight):
            return False
        existing = self.weight[ids].detach().float().cpu()
        return bool((normalize(existing, dim=-1) - normalize(rows, dim=-1)).abs().max() < 1e-2)

    def embedding_modules(self) -> list[nn.Embedding]:
        """Return every module that looks up in the table: UMT5 calls a different one than `get_input_embeddings()`."""
        weight = self.weight
        return [m for m in self.model.modules() if isinstance(m, nn.Embedding) and m.weight is weight]

    def matches(self, key: str | None, width: int) -> bool:
        """Return whether rows for the kind of encoder that `key` names (None for any kind), `width` wide, fit this encoder."""
        kind = registry.TEXT_ENCODERS.get(key or "")
        return width == self.width and (kind is None or kind.model_type == self.config.model_type)

    def original_rows(self) -> Tensor:
        """Return a mask, (rows,) bool, of the encoder's own tokens: no spare rows, concepts or stock textual inversions."""
        mask = torch.arange(len(self.weight)) < len(self.tokenizer)
        for id, token in self.tokenizer.added_tokens_decoder.items():
            if not token.special and id >= self.tokenizer.vocab_size and id < len(mask):
                mask[id] = False
        for concept in self.concepts.values():
            mask[concept.ids] = False
        return mask

    def norm(self, rule: str) -> float:
        """Return the "mean", "min" or "max" norm of the encoder's own rows, leaving out rows of norm 0 (paper, section 4).

        Raises:
            ValueError: if there is no such rule.
        """
        if rule not in get_args(ScaleRule):
            raise ValueError(f'token_scale must be "mean", "min", "max" or a positive number, got {rule!r}.')
        norms = torch.linalg.vector_norm(self.weight.detach(), dim=-1, dtype=torch.float32)
        norms = norms[self.original_rows().to(norms.device) & (norms > 0)]
        return getattr(norms, rule)().item()


def find_text_encoders(pipe: Pipeline) -> dict[str, TextEncoder]:
    """Find the text encoders of a pipeline that have a tokenizer of their own.

    Returns:
        The encoders by component, such as "text_encoder", in order.

    Raises:
        ValueError: if there are none, listing the components that were found.
    """
    encoders = present_text_encoders(pipe)
    if not encoders:
        raise ValueError(_describe_missing(pipe))
    return encoders


def present_text_encoders(pipe: Pipeline) -> dict[str, TextEncoder]:
    """Return the text encoders of a pipeline as `find_text_encoders` does, or an empty dict if there are none."""
    components = pipe.components
    encoders = {}
    for name in sorted(n for n in components if n.startswith("text_encoder")):
        model: Any = components[name]
        tokenizer: Any = components.get(name.replace("text_encoder", "tokenizer"))
        if isinstance(model, nn.Module) and hasattr(model, "get_input_embeddings") and hasattr(tokenizer, "add_tokens"):
            encoders[name] = TextEncoder(name, tokenizer, model)
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
    """Return a concept at other norms.

    Args:
        encoders: the text encoders, by component.
        inversion: the concept.
        token_scale: "mean", "min" or "max" of each encoder's vocabulary, or a number.

    Raises:
        ValueError: if `token_scale` is neither a rule nor a positive number.
    """
    if isinstance(token_scale, str):
        scaled = inversion.rescale({c: encoders[c].norm(token_scale) for c in inversion.scales})
        return replace(scaled, metadata=scaled.metadata | {"scale_rule": token_scale})
    given: Any = token_scale  # also a number of numpy
    is_number = isinstance(given, Real) and not isinstance(given, bool)
    if not is_number or not SMALLEST_SCALE <= given <= LARGEST_SCALE:
        raise ValueError(
            f'token_scale must be "mean", "min", "max" or a positive number up to {LARGEST_SCALE:g}, got {token_scale!r:.80}.'
        )
    scaled = inversion.rescale(token_scale)
    return replace(scaled, metadata=scaled.metadata | {"scale_rule": float(token_scale)})  # JSON has no numbers of numpy
