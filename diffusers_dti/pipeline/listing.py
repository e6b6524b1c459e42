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
from .text_encoders import LoadedConcept, TextEncoder, present_text_encoders
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
    entries = {}
    for placeholder, entry in saved.items():
        if placeholder not in before and placeholder not in concepts and _ids(encoder, placeholder, entry):
            entries[placeholder] = entry
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
    found: list[tuple[list[int], DirectionalInversion]] = []
    loaded = encoder.concepts
    for placeholder, entry in _saved(encoder).items():
        ids = _ids(encoder, placeholder, entry)
        if placeholder in loaded or not ids or encoder.weight.is_meta:
            continue
        try:
            check_header(entry["metadata"])
            rows = {encoder.component: encoder.weight[ids]}
            found.append((ids, DirectionalInversion.from_embeddings(placeholder, rows, entry["metadata"])))
        except (ValueError, TypeError, AttributeError, KeyError):
            continue
    in_order = sorted(found, key=lambda pair: pair[0])  # configs are saved in alphabetical order
    return {concept.placeholder_token: concept for _, concept in in_order}


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


def _ids(encoder: TextEncoder, placeholder: str, entry: Any) -> list[int] | None:
    """Return the ids of an entry's vectors, or None if the encoder lacks one."""
    added, count = encoder.tokenizer.added_tokens_encoder, entry.get("num_vectors") if isinstance(entry, dict) else None
    if not isinstance(count, int) or not 1 <= count <= len(added):
        return None
    ids = [added.get(name, len(encoder.weight)) for name in token_names(placeholder, count)]
    return ids if max(ids) < len(encoder.weight) else None
