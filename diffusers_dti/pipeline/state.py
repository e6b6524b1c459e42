"""What loading records on a text encoder, so that unloading can put it back."""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ..concept.inversion import DirectionalInversion

Pooling = Literal["eos", "legacy"]

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
