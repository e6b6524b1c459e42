"""Where training starts: the rows of a word or of a concept, or what an encoder makes of a word."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..concept.concept import Concept
from ..pipeline.text_encoders import TextEncoder
from ..pipeline.word_rows import repeat_rows, token_ids_of


@torch.no_grad()
def contextual_rows(
    encoders: Mapping[str, TextEncoder], initializer: str | Concept, num_vectors: int | None
) -> dict[str, Tensor]:
    """Return the encoders' last states at the initializer's tokens (CrossInit, arXiv 2312.15905).

    Args:
        encoders: the text encoders by component, in eval mode.
        initializer: a word or several; a concept is not a word.
        num_vectors: see `word_rows`.

    Returns:
        States, (n, d) float32 on the CPU, by component.

    Raises:
        ValueError: see `word_rows`; also for a concept.
    """
    if isinstance(initializer, Concept):
        raise ValueError("CrossInit starts from the encoder's output for a word: `initializer_token` cannot be a concept.")
    rows = {}
    for component, encoder in encoders.items():
        own = token_ids_of(encoder, initializer)
        tokens = encoder.tokenizer(initializer, return_tensors="pt").to(encoder.model.device)
        ids = tokens.input_ids[0].tolist()
        first = next(i for i in range(len(ids)) if ids[i : i + len(own)] == own)  # behind <bos>, if there is one
        out = encoder.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        states = out.last_hidden_state[0]
        rows[component] = repeat_rows(states[first : first + len(own)].float().cpu(), num_vectors, component)
    return rows
