"""Add the tokens and rows of concepts to text encoders, and remove them again exactly: in all encoders, or in none.

A `VocabularyState` on an encoder records what was done to it. It is not on the pipeline, because pipelines share encoders.

In each function, everything that may fail for want of memory comes first: the tables are made beside the old ones. Only then
tokenizers, tables and records change, and whatever fails after that is undone (transaction.py).
"""

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Sequence, Set
from contextlib import ExitStack
from dataclasses import replace

import torch

from ..concept.inversion import DirectionalInversion
from .listing import record
from .pooling import LEGACY_POOLING, current_pooling, legacy_holders, set_pooling
from .state import STATE_ATTRIBUTE, LoadedConcept, Pooling, VocabularyState
from .table import length_for, moved_rows, room_for, set_table
from .text_encoders import TextEncoder
from .tokenizer import NewTokens, add_tokens, known_tokens, removal, start_expanding, stop_expanding, token_names
from .transaction import change, drop, write_rows
from .vocabulary_check import find_existing

# This key is in the config while concepts are loaded, so that a saved pipeline knows how many rows are its own.
_TABLE_ROWS = "table_rows_without_concepts"


# ---------------------------------------------------------------------------------------------------- adding concepts
class _Addition:
    """The concepts that one encoder gets, with room for them.

    Args:
        encoder: the text encoder.
        concepts: concepts that `vocabulary_check.check` has accepted, with their pooling.
    """

    def __init__(self, encoder: TextEncoder, concepts: Sequence[tuple[DirectionalInversion, Pooling]]):
        self.encoder, self.state = encoder, encoder.state or _state_before(encoder)
        self.concepts: list[LoadedConcept] = []
        tokens = [token_names(c.placeholder_token, len(c.directions[encoder.component])) for c, _ in concepts]
        known = known_tokens(encoder.tokenizer, itertools.chain.from_iterable(tokens))
        for (inversion, pooling), own in zip(concepts, tokens):
            rows = inversion.embeddings[encoder.component]
            ids = None if known.isdisjoint(own) else find_existing(encoder, inversion.placeholder_token, rows)
            self.concepts.append(LoadedConcept(inversion, own, ids or [], pooling, reused=ids is not None))
        self.new = [concept for concept in self.concepts if not concept.reused]
        count = sum(len(concept.tokens) for concept in self.new)
        next_id = max([encoder.tokenizer.vocab_size, *(id + 1 for id in encoder.tokenizer.added_tokens_decoder)])
        needed = length_for(encoder, self.state.table_rows, next_id + count)
        self.table = room_for(encoder.weight, needed) if count else None

    def make(self, undo: ExitStack) -> None:
        """Change the tokenizer, the table and the record."""
        encoder, state, old = self.encoder, self.state, self.encoder.weight
        _forget_lost(undo, encoder)
        added = [NewTokens(c.tokens, c.inversion.metadata.get("prefix_space") == "absorbed") for c in self.new]
        for tokenizer in encoder.tokenizers:
            add_tokens(undo, tokenizer, added)
        for concept in self.new:
            concept.ids.extend(encoder.tokenizer.convert_tokens_to_ids(concept.tokens))
            if encoder.twin is not None and encoder.twin.convert_tokens_to_ids(concept.tokens) != concept.ids:
                raise ValueError(
                    f"{encoder.component}'s tokenizer and its processor's have different tokens. Unload the concepts that were "
                    "loaded by another pipeline with the same text encoder, and load them here."
                )
        spare = {id for concept in self.new for id in concept.ids if id < state.table_rows}
        overwritten = {id: old[id].detach().clone() for id in spare - state.overwritten_rows.keys()}
        ids = torch.tensor([id for concept in self.concepts for id in concept.ids])
        rows = torch.cat([concept.inversion.embeddings[encoder.component] for concept in self.concepts])
        table = self.table if self.table is not None else old.detach()
        longer = room_for(table, int(ids.max()) + 1)  # if the tokenizer gave other ids than the next ones
        if longer is None and self.table is None:
            write_rows(undo, table, ids, rows)
        else:
            table = table if longer is None else longer
            table[ids.to(table.device)] = rows.to(table)
            set_table(undo, encoder, table, len(table))
        added_now = {concept.inversion.placeholder_token: concept for concept in self.concepts}
        for tokenizer in encoder.tokenizers:
            start_expanding(undo, tokenizer, {placeholder: c.tokens for placeholder, c in added_now.items()})
        _set_state(
            undo,
            encoder,
            replace(state, concepts=state.concepts | added_now, overwritten_rows=state.overwritten_rows | overwritten),
        )


def add(undo: ExitStack, concepts: Iterable[tuple[TextEncoder, Sequence[tuple[DirectionalInversion, Pooling]]]]) -> None:
    """Add concepts to encoders.

    Args:
        undo: see `transaction`.
        concepts: the text encoders, each with concepts that `vocabulary_check.check` has accepted, and where CLIP's text vector
            is pooled.
    """
    with torch.inference_mode(False):  # a table that is made in that mode could not be trained later
        additions = [_Addition(encoder, own) for encoder, own in concepts if own]
    for addition in additions:
        addition.make(undo)


def _state_before(encoder: TextEncoder) -> VocabularyState:
    """Describe an encoder as it is before its first concept."""
    rows, config = len(encoder.weight), encoder.config
    saved = getattr(config, _TABLE_ROWS, None)  # set if the pipeline was saved with concepts in it
    beyond = frozenset(t.content for i, t in encoder.tokenizer.added_tokens_decoder.items() if i >= rows)
    vocab_size = getattr(config, "vocab_size", None) if saved is None else saved
    legacy = legacy_holders(encoder)
    table_rows = rows if saved is None else saved
    return VocabularyState(
        table_rows, vocab_size, beyond, legacy_eos=legacy, reopened=saved is not None, pooling=current_pooling(legacy)
    )


def set_rows(encoders: Iterable[TextEncoder], inversions: Sequence[DirectionalInversion]) -> None:
    """Replace loaded concepts and write their rows, as training does at its end: all of them or nothing.

    Args:
        encoders: the text encoders.
        inversions: concepts under the placeholders of loaded ones, with as many vectors.
    """
    with ExitStack() as undo:
        for encoder in encoders:
            state, concepts = encoder.state, dict(encoder.concepts)
            assert state is not None, "no concept is loaded"
            for inversion in inversions:
                old = concepts[inversion.placeholder_token]
                write_rows(undo, encoder.weight, torch.tensor(old.ids), inversion.embeddings[encoder.component])
                concepts[inversion.placeholder_token] = replace(old, inversion=inversion)
            _set_state(undo, encoder, replace(state, concepts=concepts))
        undo.pop_all()


# -------------------------------------------------------------------------------------------------- removing concepts
class _Removal:
    """What one encoder is to be without some of its concepts: later tokens move up, with their rows.

    Args:
        encoder: the text encoder.
        placeholders: placeholders of loaded concepts.
    """

    def __init__(self, encoder: TextEncoder, placeholders: Sequence[str]):
        assert encoder.state is not None, "no concept is loaded"
        self.encoder, state, rows = encoder, encoder.state, encoder.weight
        self.placeholders = placeholders
        self.removed = [state.concepts[placeholder] for placeholder in placeholders]
        names = {name for concept in self.removed for name in concept.tokens}
        gone = sorted(id for concept in self.removed for id in concept.ids)
        self.first, self.total = gone[0], state.table_rows
        moved: dict[int, int] = {}  # new ids by old ones
        for id, needs_row in self._remaining_ids(state, names).items():
            new = id - bisect_left(gone, id)
            if id > self.first:
                moved[id] = new
            if needs_row and id < len(rows):
                self.total = max(self.total, new + 1)
        self.total = min(length_for(encoder, state.table_rows, self.total), len(rows))
        used = set(moved.values())
        restored = {id: row for id, row in state.overwritten_rows.items() if id >= self.first and id not in used}
        self.part = moved_rows(rows, self.first, self.total, moved, restored, state.table_rows)
        self.table = None if self.total == len(rows) else torch.cat([rows.detach()[: min(self.first, self.total)], self.part])
        self.token_removals = [removal(tokenizer, names, moved) for tokenizer in encoder.tokenizers]
        concepts = {}
        for placeholder, concept in state.concepts.items():
            if concept not in self.removed:
                concepts[placeholder] = replace(concept, ids=[moved.get(id, id) for id in concept.ids])
        overwritten = {id: row for id, row in state.overwritten_rows.items() if id not in restored}
        self.state = replace(state, concepts=concepts, overwritten_rows=overwritten)

    def _remaining_ids(self, state: VocabularyState, names: Set[str]) -> dict[int, bool]:
        """Return the ids of all added tokens but those that are removed, and whether each needs a row."""
        kept = {id for concept in state.concepts.values() if concept not in self.removed for id in concept.ids}
        remaining = dict.fromkeys(kept, True)
        for id, token in self.encoder.tokenizer.added_tokens_decoder.items():
            if token.content not in names:
                remaining[id] = id in kept or token.content not in state.tokens_without_row
        return remaining

    def make(self, undo: ExitStack) -> None:
        """Change the tokenizer, the table and the record."""
        encoder, state = self.encoder, self.state
        for remove_tokens, tokenizer in zip(self.token_removals, encoder.tokenizers, strict=True):
            remove_tokens(undo)
            stop_expanding(undo, tokenizer, self.placeholders)
        if self.table is None:
            write_rows(undo, encoder.weight, torch.arange(self.first, self.total), self.part)
        else:
            set_table(undo, encoder, self.table, state.vocab_size if self.total == state.table_rows else self.total)
        _set_state(undo, encoder, state)


def remove(undo: ExitStack, placeholders: Iterable[tuple[TextEncoder, Sequence[str]]]) -> None:
    """Remove concepts from encoders, as if only the others had ever been added.

    Args:
        undo: see `transaction`.
        placeholders: the text encoders, each with placeholders of concepts that are loaded in it.
    """
    by_encoder = list(placeholders)
    with torch.inference_mode(False):
        removals = [_Removal(encoder, own) for encoder, own in by_encoder if own]
    for encoder, _ in by_encoder:
        _forget_lost(undo, encoder)
    for each in removals:
        each.make(undo)


# ---------------------------------------------------------------------------------------------------------- the record
def _set_state(undo: ExitStack, encoder: TextEncoder, state: VocabularyState) -> None:
    """Record what was done to an encoder, and pool where the concept that was loaded last wants it."""
    record(undo, encoder, state.concepts)
    if state.concepts:
        set_pooling(undo, encoder, state, list(state.concepts.values())[-1].pooling)
        change(undo, encoder.config, _TABLE_ROWS, state.table_rows)
        if state.legacy_eos:
            change(undo, encoder.config, LEGACY_POOLING, True)
        change(undo, encoder.model, STATE_ATTRIBUTE, state)
    elif encoder.recorded is not None:
        # In a reopened pipeline other concepts may still be there, waiting to be loaded again.
        others_wait = state.reopened and len(encoder.weight) != state.table_rows
        set_pooling(undo, encoder, state, state.pooling if others_wait else "legacy")
        if not others_wait:
            drop(undo, encoder.config, _TABLE_ROWS)
            if state.legacy_eos:
                drop(undo, encoder.config, LEGACY_POOLING)
        drop(undo, encoder.model, STATE_ATTRIBUTE)


def _forget_lost(undo: ExitStack, encoder: TextEncoder) -> None:
    """Remove concepts from the record that stock `unload_textual_inversion` has taken out of the encoder."""
    recorded, now = encoder.recorded, encoder.state
    if recorded is not None and now is not None and len(now.concepts) < len(recorded.concepts):
        for tokenizer in encoder.tokenizers:
            stop_expanding(undo, tokenizer, recorded.concepts.keys() - now.concepts.keys())
        _set_state(undo, encoder, now)
