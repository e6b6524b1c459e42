"""Find a pipeline's text encoders and measure their vocabularies. Nothing here writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from .state import STATE_ATTRIBUTE, LoadedConcept, VocabularyState

ScaleRule = Literal["mean", "min", "max"]


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder with its tokenizer.

    Args:
        component: the encoder's name in the pipeline, such as "text_encoder_2".
        tokenizer: the tokenizer whose ids the encoder reads.
        model: the encoder itself, a model of transformers.
        twin: the tokenizer inside the pipeline's processor, if that is another one: Qwen-Image-Edit reads prompts with it.
    """

    component: str
    tokenizer: Tokenizer
    model: Any  # mypy cannot see `PreTrainedModel`, whose types differ between the supported versions
    twin: Tokenizer | None = None

    @property
    def tokenizers(self) -> list[Tokenizer]:
        """The tokenizers whose ids the encoder reads; they have the same vocabulary."""
        return [self.tokenizer] if self.twin is None else [self.tokenizer, self.twin]

    @property
    def weight(self) -> nn.Parameter:
        """The table of input embeddings, (rows, d)."""
        try:
            return self.model.get_input_embeddings().weight
        except NotImplementedError:  # by Kandinsky 2.1's, AudioLDM 2's and BLIP Diffusion's encoders
            tables: list[Any] = [m for m in self.model.modules() if isinstance(m, nn.Embedding)]
            return max(tables, key=lambda table: table.num_embeddings).weight  # the others are of positions and types

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
        tokenizers = _tokenizers_of(components, name)
        if isinstance(model, nn.Module) and hasattr(model, "get_input_embeddings") and tokenizers:
            encoders[name] = TextEncoder(name, tokenizers[0], model, *tokenizers[1:])
    return encoders


def _tokenizers_of(components: Mapping[str, Any], name: str) -> list[Any]:
    """Return the tokenizers that a text encoder's ids come from: its own one, and its processor's if that is another."""
    found: list[Any] = []
    for role in ("tokenizer", "processor"):
        part: Any = components.get(name.replace("text_encoder", role))
        if not hasattr(part, "add_tokens"):  # a processor, as FLUX.2's `tokenizer` is: it has one
            part = getattr(part, "tokenizer", None)
        if hasattr(part, "add_tokens") and part not in found:
            found.append(part)
    # The processor of LTX-2.5 is for another model.
    if len(found) == 2 and (components.get("prompt_enhancer") or found[0].vocab_size != found[1].vocab_size):
        del found[1]
    return found


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
