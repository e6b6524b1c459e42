"""Tokens and rows into a text encoder and out again, exactly.

What was done to an encoder is kept on the encoder itself (a `VocabularyState`), not on the pipeline: pipelines share encoders.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..concept.concept import Concept
from ..concept.inversion import DirectionalInversion
from .offload import offload_disabled
from .text_encoders import _STATE, LoadedConcept, Pooling, TextEncoder, VocabularyState
from .tokenizer import add_tokens, remove_tokens, start_expanding, stop_expanding, token_names

# In the config while concepts are loaded, so that a saved pipeline knows how many rows are its own.
_TABLE_ROWS = "table_rows_without_concepts"


# ------------------------------------------------------------------------------------------------- the rows of a word
def token_ids_of(encoder: TextEncoder, words: str) -> list[int]:
    """Tokenize words of an encoder's own vocabulary.

    Raises:
        ValueError: if the text has no tokens that the encoder knows.
    """
    tokenizer = encoder.tokenizer
    ids = tokenizer(words, add_special_tokens=False).input_ids
    # CLIP's unknown token is its end token; every text has its bytes in CLIP's vocabulary.
    if not ids or tokenizer.unk_token_id in set(ids) - {tokenizer.eos_token_id, tokenizer.pad_token_id}:
        raise ValueError(f"The initializer {words!r} has no known tokens: give a word for what the photos show.")
    return ids


def word_rows(encoders: Mapping[str, TextEncoder], words: str | Concept, num_vectors: int | None) -> dict[str, Tensor]:
    """Return the rows of a word, one for each of its tokens, or those of a concept.

    Args:
        encoders: the text encoders, by component.
        words: a word or several, or a concept.
        num_vectors: the number of rows n. If it is larger than what the word has, its rows are repeated in turn.

    Returns:
        Rows, (n, d) float32 on the CPU, by component.

    Raises:
        ValueError: if an encoder does not know the words, a concept lacks a component, or `num_vectors` is too small.
    """
    rows = {}
    for component, encoder in encoders.items():
        if isinstance(words, Concept):
            if component not in words.directions:
                raise ValueError(f"The concept to start from, {words.placeholder_token}, has nothing for {component}.")
            own = words.embeddings[component]
        else:
            ids = token_ids_of(encoder, words)
            with offload_disabled(encoder.model):
                own = encoder.weight.detach()[ids].float().cpu()
        rows[component] = repeat_rows(own, num_vectors, component)
    return rows


def repeat_rows(rows: Tensor, num_vectors: int | None, component: str) -> Tensor:
    """Repeat rows in turn up to `num_vectors`.

    Raises:
        ValueError: if there are more rows than that.
    """
    count = num_vectors or len(rows)
    if count < len(rows):
        raise ValueError(f"The initializer has {len(rows)} vectors in {component}: num_vectors must be {len(rows)} or more.")
    return rows[[i % len(rows) for i in range(count)]]


# ---------------------------------------------------------------------------------------------------- adding a concept
def check(encoder: TextEncoder, inversion: DirectionalInversion, reuse_existing: bool = True) -> None:
    """Check that a concept can be added.

    Args:
        encoder: where.
        inversion: the concept; its part for the encoder's component is looked at.
        reuse_existing: accept a concept that a reopened pipeline already holds.

    Raises:
        ValueError: if the width differs, or the placeholder is taken.
    """
    component, placeholder = encoder.component, inversion.placeholder_token
    rows = inversion.embeddings[component]
    if rows.shape[1] != encoder.width:
        base = inversion.metadata.get("base_model")
        raise ValueError(
            f"{placeholder} is {rows.shape[1]} wide for {component}, whose embeddings are {encoder.width} wide: it was learned "
            f"with another model{f', {base}' if base else ''}."
        )
    for other in encoder.concepts:
        short, long = sorted((placeholder, other), key=len)
        if placeholder != other and re.fullmatch(f"{re.escape(short)}_\\d+", long):
            raise ValueError(
                f"{placeholder} and {other} cannot be loaded together: diffusers takes them for vectors of one token."
            )
    if placeholder in encoder.concepts:
        raise ValueError(
            f"{placeholder} is already loaded: choose another placeholder (`token`, in training `placeholder_token`), or "
            f"unload it first with `unload_directional_inversion({placeholder!r})`."
        )
    taken = {placeholder, *token_names(placeholder, len(rows))} & encoder.tokenizer.get_vocab().keys()
    if taken and not (reuse_existing and _find_existing(encoder, placeholder, rows)):
        raise ValueError(
            f"{placeholder} is in the vocabulary of {component} already, with another meaning: choose another placeholder "
            "(`token`, in training `placeholder_token`). If stock `load_textual_inversion` put it there, "
            "`unload_textual_inversion` takes it out."
        )


def _find_existing(encoder: TextEncoder, placeholder: str, rows: Tensor) -> list[int] | None:
    """Return the ids under which a reopened pipeline already holds a concept, at any precision and scale, or None."""
    # Only added tokens count: a word of the encoder's own is nobody's concept, whatever its direction.
    added, weight = encoder.tokenizer.added_tokens_encoder, encoder.weight
    ids = [added.get(name, len(weight)) for name in token_names(placeholder, len(rows))]
    if max(ids) >= len(weight):
        return None
    existing = weight[ids].detach().float().cpu()
    return ids if (normalize(existing, dim=-1) - normalize(rows, dim=-1)).abs().max() < 1e-2 else None


def add(encoder: TextEncoder, inversion: DirectionalInversion, pooling: Pooling) -> None:
    """Add a checked concept: tokens to the tokenizer, rows to the table, and pooling where the concept wants it."""
    rows, placeholder = inversion.embeddings[encoder.component], inversion.placeholder_token
    tokens = token_names(placeholder, len(rows))
    state = encoder.state or _start_state(encoder)
    ids = _find_existing(encoder, placeholder, rows)
    reused = None if ids is None else encoder.weight[ids].detach().clone()
    concept = state.concepts[placeholder] = LoadedConcept(inversion, tokens, ids or [], pooling, reused)
    if ids is None:
        add_tokens(encoder.tokenizer, tokens)
        concept.ids = encoder.tokenizer.convert_tokens_to_ids(tokens)
        _make_room(encoder, state, concept.ids)
    set_rows(encoder, inversion)
    if len(tokens) > 1:
        start_expanding(encoder.tokenizer, placeholder, tokens)
    _set_pooling(encoder, state)


def _start_state(encoder: TextEncoder) -> VocabularyState:
    rows, config = len(encoder.weight), encoder.config
    saved = getattr(config, _TABLE_ROWS, None)  # of a pipeline that was saved with concepts in it
    beyond = frozenset(t.content for i, t in encoder.tokenizer.added_tokens_decoder.items() if i >= rows)
    vocab_size = getattr(config, "vocab_size", None) if saved is None else saved
    state = VocabularyState(rows if saved is None else saved, vocab_size, beyond)
    setattr(encoder.model, _STATE, state)
    setattr(config, _TABLE_ROWS, state.table_rows)
    return state


def _make_room(encoder: TextEncoder, state: VocabularyState, ids: list[int]) -> None:
    """Grow the table if it is too short, and keep the spare rows that will be overwritten."""
    weight = encoder.weight.detach()
    missing = max(ids) + 1 - len(weight)
    if missing > 0:  # never shrink: a table may be larger than its tokenizer
        _set_table(encoder, torch.cat([weight, weight.new_zeros(missing, weight.shape[1])]), max(ids) + 1)
    for id in ids:
        if id < state.table_rows:
            state.overwritten_rows.setdefault(id, encoder.weight[id].detach().clone())


def _set_table(encoder: TextEncoder, rows: Tensor, vocab_size: int | None) -> None:
    """Make `rows` the table, everywhere it is shared."""
    # Not `resize_token_embeddings`: it would cut ties, replace UMT5's embedding module and drop the hooks on it, and by
    # default it computes a mean and covariance of all rows, a minute for Gemma's.
    old = encoder.weight
    new = nn.Parameter(rows, requires_grad=old.requires_grad)
    for module in encoder.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new
                if isinstance(module, nn.Embedding):
                    module.num_embeddings = len(rows)
                elif isinstance(module, nn.Linear):
                    module.out_features = len(rows)
    for holder in (encoder.config, encoder.model):
        if isinstance(getattr(holder, "vocab_size", None), int) and vocab_size is not None:
            holder.vocab_size = vocab_size


def set_rows(encoder: TextEncoder, inversion: DirectionalInversion) -> None:
    """Write a loaded concept's rows, as training does at its end."""
    concept, weight = encoder.concepts[inversion.placeholder_token], encoder.weight
    concept.inversion = inversion
    with torch.no_grad():
        weight[concept.ids] = inversion.embeddings[encoder.component].to(weight)


# -------------------------------------------------------------------------------------------------- removing a concept
def remove(encoder: TextEncoder, placeholder: str, undo: bool = False) -> None:
    """Take a concept out, as if only the others had ever been added: later tokens move up, with their rows.

    Args:
        encoder: where.
        placeholder: a loaded concept.
        undo: take back an `add` that failed; rows that were reused stay, as they were before.
    """
    state = encoder.state
    assert state is not None, f"{placeholder} is not loaded"
    concept = state.concepts.pop(placeholder)
    if undo and concept.reused_rows is not None:
        encoder.weight.detach()[concept.ids] = concept.reused_rows
    elif concept.ids:
        _close_gap(encoder, state, concept)
    stop_expanding(encoder.tokenizer, placeholder)
    _set_pooling(encoder, state)
    if not state.concepts:
        delattr(encoder.model, _STATE)
        # In a reopened pipeline other concepts may still be there, waiting to be loaded again.
        if concept.reused_rows is None or len(encoder.weight) == state.table_rows:
            delattr(encoder.config, _TABLE_ROWS)


def _close_gap(encoder: TextEncoder, state: VocabularyState, concept: LoadedConcept) -> None:
    """Remove a concept's tokens and rows, and move those behind it up."""
    rows, gone = encoder.weight.detach(), sorted(concept.ids)
    names = {t.content: i for i, t in encoder.tokenizer.added_tokens_decoder.items() if t.content not in concept.tokens}
    others = {i for other in state.concepts.values() for i in other.ids}
    moved = {i: i - sum(g < i for g in gone) for i in others.union(names.values()) if i > gone[0]}
    kept = others.union(i for name, i in names.items() if name not in state.tokens_without_row)
    total = max([state.table_rows, *(moved.get(i, i) + 1 for i in kept if i < len(rows))])
    new_rows = _moved_rows(rows, state, moved, gone[0], total)
    remove_tokens(encoder.tokenizer, set(concept.tokens), moved)
    for other in state.concepts.values():
        other.ids = [moved.get(i, i) for i in other.ids]
    if total == len(rows):
        rows.copy_(new_rows)
    else:
        _set_table(encoder, new_rows, state.vocab_size if total == state.table_rows else total)


def _moved_rows(rows: Tensor, state: VocabularyState, moved: dict[int, int], first: int, total: int) -> Tensor:
    """Return the table with rows at their new ids, and with the spare rows that nothing uses any more put back."""
    new_rows = rows[:total].clone()
    for old, new in moved.items():
        if old < len(rows) and new < total:
            new_rows[new] = rows[old]
    for id in [i for i in state.overwritten_rows if i >= first and i not in moved.values()]:
        row = state.overwritten_rows.pop(id)
        if id < len(new_rows):
            new_rows[id] = row
    return new_rows


# ------------------------------------------------------------------------------------------------------------- pooling
def _set_pooling(encoder: TextEncoder, state: VocabularyState) -> None:
    """Pool where the concept that was loaded last wants it.

    CLIP configurations with the legacy `eos_token_id` 2 pool at the highest id. That is a new token's, and the text after it
    would never reach the pooled vector. With the real id, ordinary prompts stay bit for bit as they are.
    """
    model = encoder.model
    if not state.legacy_eos and getattr(model.config, "model_type", "") == "clip_text_model":
        state.legacy_eos = [x for x in _config_and_modules(model) if getattr(x, "eos_token_id", None) == 2]
    pooling = next((c.pooling for c in reversed(state.concepts.values())), "legacy")
    for holder in state.legacy_eos:
        # `forward` reads the module's attribute; the config's is what is saved.
        holder.eos_token_id = 2 if pooling == "legacy" else encoder.tokenizer.eos_token_id


def _config_and_modules(model: Any) -> Iterator[Any]:
    yield model.config
    yield from model.modules()
