"""Tokenize prompts to a fixed length, for pipelines whose text encoders or denoisers do not mask padding."""

from collections.abc import Sequence

from torch import Tensor

from ..pipeline.protocols import Tokenizer


def padded_ids(tokenizer: Tokenizer, prompts: Sequence[str], length: int | None = None) -> Tensor:
    """Return the ids of n prompts, (n, length), by default of the tokenizer's full length."""
    length = length or tokenizer.model_max_length
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids
