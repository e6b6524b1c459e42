"""Which concepts a pipeline has: those that are loaded, and those that it was saved with.

A saved pipeline has their rows in its tables, their tokens in its tokenizers, and a record of them in its encoders' configs.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from ..concept.checks import check_header
from ..concept.inversion import DirectionalInversion
from .protocols import Pipeline
from .state import LoadedConcept
from .text_encoders import TextEncoder, present_text_encoders
from .tokenizer import token_names
from .transaction import change, drop

_SAVED = "directional_inversions"


def directional_inversions(pipe: Pipeline) -> dict[str, DirectionalInversion]:
    """Return the concepts that are in a pipeline, by placeholder, in order of loading; first those that it was saved with."""
    loaded: dict[str, DirectionalInversion] = {}
    for encoder in present_text_encoders(pipe).values():
        own = waiting(encoder) | {placeholder: concept.inversion for placeholder, concept in encoder.concepts.items()}
        for placeholder, here in own.items():
            other = loaded.setdefault(placeholder, here)
            if other is not here:  # its files were loaded one by one
                directions, scales = other.directions | here.directions, other.scales | here.scales
                loaded[placeholder] = replace(other, directions=directions, scales=scales)
    return loaded


def record(undo: ExitStack, encoder: TextEncoder, concepts: Mapping[str, LoadedConcept]) -> None:
    """Write into an encoder's config which concepts it has: those that are loaded, and those that wait to be loaded again.

    Args:
        undo: see `transaction`.
        encoder: the text encoder, whose tokenizer has changed already, and whose own record has not.
        concepts: the concepts that are now loaded.
    """
    saved, before = _saved(encoder), {} if encoder.recorded is None else encoder.recorded.concepts
    others = {placeholder: entry for placeholder, entry in saved.items() if placeholder not in before.keys() | concepts.keys()}
    entries = {placeholder: others[placeholder] for placeholder in _ids(encoder, others)}
    for placeholder, concept in concepts.items():
        same = placeholder in saved and placeholder in before and before[placeholder].inversion is concept.inversion
        entries[placeholder] = saved[placeholder] if same else _entry(concept)
    if entries:
        change(undo, encoder.config, _SAVED, entries)
    elif saved:
        drop(undo, encoder.config, _SAVED)


def waiting(encoder: TextEncoder) -> dict[str, DirectionalInversion]:
    """Return the concepts that an encoder was saved with and that are not loaded again, by placeholder.

    Entries that do not fit the encoder are left out: stock loading and unloading know nothing of the record, and a stranger's
    may say anything. So are all of them where the table is out of reach, under sequential offload.
    """
    saved, loaded = _saved(encoder), encoder.concepts
    others = {placeholder: entry for placeholder, entry in saved.items() if placeholder not in loaded}
    if not others or encoder.weight.is_meta:
        return {}
    found: dict[str, DirectionalInversion] = {}
    in_order = sorted(_ids(encoder, others).items(), key=lambda item: item[1])  # configs are saved in alphabetical order
    for placeholder, ids in in_order:
        metadata = others[placeholder].get("metadata")
        try:
            check_header(metadata)
            found[placeholder] = DirectionalInversion.from_embeddings(
                placeholder, {encoder.component: encoder.weight[ids]}, metadata
            )
        except (ValueError, TypeError, AttributeError):
            continue
    return found


def _saved(encoder: TextEncoder) -> dict[str, Any]:
    saved = getattr(encoder.config, _SAVED, None)
    return saved if isinstance(saved, dict) else {}


def _entry(concept: LoadedConcept) -> dict[str, Any]:
    """Describe a concept in JSON; what its maker has put into the metadata besides is left out."""
    metadata = concept.inversion.metadata
    try:
        check_header(metadata)
    except (ValueError, TypeError):
        metadata = {}
    return {"num_vectors": len(concept.tokens), "metadata": metadata}


def _ids(encoder: TextEncoder, entries: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the ids of the vectors of those entries that an encoder has all vectors of."""
    if not entries:
        return {}
    added, rows, found = encoder.tokenizer.added_tokens_encoder, len(encoder.weight), {}
    for placeholder, entry in entries.items():
        count = entry.get("num_vectors") if isinstance(entry, dict) else None
        if isinstance(count, int) and 1 <= count <= len(added):
            ids = [added.get(name, rows) for name in token_names(placeholder, count)]
            if max(ids) < rows:
                found[placeholder] = ids
    return found
