"""Where training starts: the rows of a word, or of a concept, or what an encoder makes of a word."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..concept.inversion import DirectionalInversion
from ..pipeline import vocabulary
from ..pipeline.loading import Pair
from ..pipeline.offload import weights_at_hand


def initializer_rows(
    pairs: Mapping[str, Pair], initializer: str | DirectionalInversion, num_vectors: int | None
) -> dict[str, Tensor]:
    """The initializer's own rows, (n, d) float32 per component: a word's, one for each of its tokens, or a concept's.

    Args:
        pairs: tokenizer and encoder by component.
        initializer: the word or words, or a concept.
        num_vectors: n; where it is more than the initializer has, its rows are taken in turn.

    Raises:
        ValueError: for words that an encoder does not know, a concept that lacks a component, or too small a `num_vectors`.
    """
    rows = {}
    for component, (tokenizer, encoder) in pairs.items():
        if isinstance(initializer, DirectionalInversion):
            if component not in initializer.directions:
                raise ValueError(f"The concept to start from, {initializer.placeholder_token}, has nothing for {component}.")
            own = initializer.embeddings[component]
        else:
            ids = _ids(tokenizer, initializer)
            with weights_at_hand(encoder):
                own = vocabulary.table(encoder).detach()[ids].float().cpu()
        rows[component] = _repeated(own, num_vectors, component)
    return rows


@torch.no_grad()
def contextual_rows(pairs: Mapping[str, Pair], initializer: str, num_vectors: int | None) -> dict[str, Tensor]:
    """The encoders' last states at the initializer's tokens, (n, d) float32 per component (CrossInit, arXiv 2312.15905).

    The encoders must be in eval mode. Arguments and errors as of `initializer_rows`; a concept is no word.
    """
    if isinstance(initializer, DirectionalInversion):
        raise ValueError("CrossInit starts from what the encoder makes of a word: `initializer_token` cannot be a concept.")
    rows = {}
    for component, (tokenizer, encoder) in pairs.items():
        own = _ids(tokenizer, initializer)
        tokens = tokenizer(initializer, return_tensors="pt").to(encoder.device)
        ids = tokens.input_ids[0].tolist()
        first = next(i for i in range(len(ids)) if ids[i : i + len(own)] == own)  # behind <bos>, if there is one
        states = encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state[0]
        rows[component] = _repeated(states[first : first + len(own)].float().cpu(), num_vectors, component)
    return rows


def _ids(tokenizer: Any, initializer: str) -> list[int]:
    ids = tokenizer(initializer, add_special_tokens=False).input_ids
    # CLIP's unknown token is its end token; every text has its bytes in CLIP's vocabulary
    if not ids or tokenizer.unk_token_id in set(ids) - {tokenizer.eos_token_id, tokenizer.pad_token_id}:
        raise ValueError(f"The initializer {initializer!r} is no text: give a word for what is on the photos.")
    return ids


def _repeated(own: Tensor, num_vectors: int | None, component: str) -> Tensor:
    count = num_vectors or len(own)
    if count < len(own):
        raise ValueError(f"The initializer has {len(own)} vectors in {component}: num_vectors must be {len(own)} or more.")
    return own[[i % len(own) for i in range(count)]]
