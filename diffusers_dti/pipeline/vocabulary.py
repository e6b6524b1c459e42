"""Add a concept's tokens and rows to a text encoder, and remove them again exactly.

A `VocabularyState` on the encoder records what was done to it. It is not on the pipeline, because pipelines share encoders.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..concept.inversion import DirectionalInversion
from .text_encoders import STATE_ATTRIBUTE, LoadedConcept, Pooling, TextEncoder, VocabularyState
from .tokenizer import add_tokens, remove_tokens, start_expanding, stop_expanding, token_names

# This key is in the config while concepts are loaded, so that a saved pipeline knows how many rows are its own.
_TABLE_ROWS = "table_rows_without_concepts"


# ---------------------------------------------------------------------------------------------------- adding a concept
def check(encoder: TextEncoder, inversion: DirectionalInversion, reuse_existing: bool = True) -> None:
    """Check that a concept can be added.

    Args:
        encoder: the text encoder to add it to.
        inversion: the concept, of which only the part for this encoder is checked.
        reuse_existing: accept a concept whose tokens and rows a reopened pipeline already has.

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
    """Return the ids of a concept that a reopened pipeline already has, at any precision and scale, or None."""
    # Only added tokens count: a word of the encoder's own vocabulary is not a concept, even if it has the same direction.
    added, weight = encoder.tokenizer.added_tokens_encoder, encoder.weight
    ids = [added.get(name, len(weight)) for name in token_names(placeholder, len(rows))]
    if max(ids) >= len(weight):
        return None
    existing = weight[ids].detach().float().cpu()
    return ids if (normalize(existing, dim=-1) - normalize(rows, dim=-1)).abs().max() < 1e-2 else None


def add(encoder: TextEncoder, inversion: DirectionalInversion, pooling: Pooling) -> None:
    """Add tokens to the tokenizer and rows to the table, and pool where the concept wants it.

    Args:
        encoder: the text encoder.
        inversion: a concept that `check` has accepted.
        pooling: where CLIP's text vector is pooled.
    """
    rows, placeholder = inversion.embeddings[encoder.component], inversion.placeholder_token
    tokens = token_names(placeholder, len(rows))
    state = encoder.state or _start_state(encoder)
    ids = _find_existing(encoder, placeholder, rows)
    reused = None if ids is None else encoder.weight[ids].detach().clone()
    concept = state.concepts[placeholder] = LoadedConcept(inversion, tokens, ids or [], pooling, reused)
    if ids is None:
        add_tokens(encoder.tokenizer, tokens, absorb_space=inversion.metadata.get("prefix_space") == "absorbed")
        concept.ids = encoder.tokenizer.convert_tokens_to_ids(tokens)
        _make_room(encoder, state, concept.ids)
    set_rows(encoder, inversion)
    if len(tokens) > 1:
        start_expanding(encoder.tokenizer, placeholder, tokens)
    _set_pooling(encoder, state)


def _start_state(encoder: TextEncoder) -> VocabularyState:
    """Record an encoder as it is before its first concept."""
    rows, config = len(encoder.weight), encoder.config
    saved = getattr(config, _TABLE_ROWS, None)  # set if the pipeline was saved with concepts in it
    beyond = frozenset(t.content for i, t in encoder.tokenizer.added_tokens_decoder.items() if i >= rows)
    vocab_size = getattr(config, "vocab_size", None) if saved is None else saved
    state = VocabularyState(rows if saved is None else saved, vocab_size, beyond)
    setattr(encoder.model, STATE_ATTRIBUTE, state)
    setattr(config, _TABLE_ROWS, state.table_rows)
    return state


def _make_room(encoder: TextEncoder, state: VocabularyState, ids: list[int]) -> None:
    """Grow the table if it is too short, and keep a copy of the spare rows that will be overwritten."""
    weight = encoder.weight.detach()
    missing = max(ids) + 1 - len(weight)
    if missing > 0:  # never shrink: a table may have more rows than its tokenizer has tokens
        _set_table(encoder, torch.cat([weight, weight.new_zeros(missing, weight.shape[1])]), max(ids) + 1)
    for id in ids:
        if id < state.table_rows:
            state.overwritten_rows.setdefault(id, encoder.weight[id].detach().clone())


def _set_table(encoder: TextEncoder, rows: Tensor, vocab_size: int | None) -> None:
    """Make `rows` the table, in every module that shares it."""
    # Not `resize_token_embeddings`: it would untie shared weights, replace UMT5's embedding module and drop the hooks on it.
    # By default it also computes the mean and covariance of all rows, which takes a minute for Gemma's.
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
    """Replace a loaded concept and write its rows, as training does at its end."""
    concept, weight = encoder.concepts[inversion.placeholder_token], encoder.weight
    concept.inversion = inversion
    with torch.no_grad():
        weight[concept.ids] = inversion.embeddings[encoder.component].to(weight)


# -------------------------------------------------------------------------------------------------- removing a concept
def remove(encoder: TextEncoder, placeholder: str, undo: bool = False) -> None:
    """Remove a concept, as if only the others had ever been added: later tokens move up, with their rows.

    Args:
        encoder: the text encoder.
        placeholder: the placeholder of a loaded concept.
        undo: undo an `add` that failed. Rows that it reused stay in the table, with the values that they had.
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
        delattr(encoder.model, STATE_ATTRIBUTE)
        # In a reopened pipeline other concepts may still be there, waiting to be loaded again.
        if concept.reused_rows is None or len(encoder.weight) == state.table_rows:
            delattr(encoder.config, _TABLE_ROWS)


def _close_gap(encoder: TextEncoder, state: VocabularyState, concept: LoadedConcept) -> None:
    """Remove a concept's tokens and rows, and move up those behind it."""
    rows, gone = encoder.weight.detach(), sorted(concept.ids)
    moved: dict[int, int] = {}  # new ids by old ones
    total = state.table_rows
    for id, needs_row in _remaining_ids(encoder, state, concept).items():
        new = id - sum(g < id for g in gone)
        if id > gone[0]:
            moved[id] = new
        if needs_row and id < len(rows):
            total = max(total, new + 1)
    new_rows = _moved_rows(rows, state, moved, gone[0], total)
    remove_tokens(encoder.tokenizer, set(concept.tokens), moved)
    for other in state.concepts.values():
        other.ids = [moved.get(i, i) for i in other.ids]
    if total == len(rows):
        rows.copy_(new_rows)
    else:
        _set_table(encoder, new_rows, state.vocab_size if total == state.table_rows else total)


def _remaining_ids(encoder: TextEncoder, state: VocabularyState, removed: LoadedConcept) -> dict[int, bool]:
    """Return the ids of all added tokens but those of the removed concept, and whether each needs a row."""
    remaining = {id: True for concept in state.concepts.values() for id in concept.ids}
    for id, token in encoder.tokenizer.added_tokens_decoder.items():
        if token.content not in removed.tokens:
            remaining[id] = id in remaining or token.content not in state.tokens_without_row
    return remaining


def _moved_rows(rows: Tensor, state: VocabularyState, moved: dict[int, int], first: int, total: int) -> Tensor:
    """Return the table with its rows at their new ids, and with unused spare rows as they were before.

    Args:
        rows: the table, (rows, d).
        state: the encoder's state, from which the spare rows that are put back are deleted.
        moved: new ids by old ones.
        first: the first id of the removed concept.
        total: the number of rows of the new table.
    """
    new_rows = rows[:total].clone()
    for old, new in moved.items():
        if old < len(rows) and new < total:
            new_rows[new] = rows[old]
    for id in list(state.overwritten_rows):
        if id < first or id in moved.values():
            continue
        row = state.overwritten_rows.pop(id)
        if id < len(new_rows):
            new_rows[id] = row
    return new_rows


# ------------------------------------------------------------------------------------------------------------- pooling
def _set_pooling(encoder: TextEncoder, state: VocabularyState) -> None:
    """Pool where the concept that was loaded last wants it.

    CLIP configurations with the legacy `eos_token_id` 2 pool at the highest id. A concept's token has the highest id, so the
    text after it would never reach the pooled vector. With the real id, ordinary prompts stay bit for bit as they are.
    """
    model = encoder.model
    if not state.legacy_eos and getattr(model.config, "model_type", "") == "clip_text_model":
        state.legacy_eos = [x for x in _config_and_modules(model) if getattr(x, "eos_token_id", None) == 2]
    concepts = list(state.concepts.values())
    pooling = concepts[-1].pooling if concepts else "legacy"
    for holder in state.legacy_eos:
        # `forward` reads the module's attribute, and saving writes the config's.
        holder.eos_token_id = 2 if pooling == "legacy" else encoder.tokenizer.eos_token_id


def _config_and_modules(model: Any) -> Iterator[Any]:
    yield model.config
    yield from model.modules()
