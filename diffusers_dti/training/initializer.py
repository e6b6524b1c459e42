"""Where training starts: the rows of a word or of a concept, or the encoder's output for a word."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from ..concept.concept import Concept
from ..concept.inversion import DirectionalInversion
from ..concept.methods import METHODS
from ..families.base import Family
from ..pipeline.offload import compute_device, moved, offload_disabled
from ..pipeline.text_encoders import TextEncoder, find_text_encoders, rescale
from ..pipeline.word_rows import repeat_rows, token_ids_of, word_rows
from .config import ResolvedConfig
from .frozen import frozen
from .metadata import concept_metadata


def initial_concept(family: Family, config: ResolvedConfig, placeholder: str) -> DirectionalInversion:
    """Return the concept at the start of training: the directions of its (first) initializer, at the scale of the method.

    Raises:
        ValueError: if an encoder does not know the initializer, or `num_vectors` is too small for it.
    """
    encoders = find_text_encoders(family.pipe)
    initializer = config.initializers_for(placeholder)[0]
    if METHODS[config.method].contextual_start:
        with frozen(family), moved([encoder.model for encoder in encoders.values()], family.device):
            rows = contextual_rows(encoders, initializer, config.num_vectors)
    else:
        rows = word_rows(encoders, initializer, config.num_vectors, config.initializer_context)
    metadata = concept_metadata(family, config, placeholder)
    initial = DirectionalInversion.from_embeddings(placeholder, rows, metadata)
    if config.raw or config.token_scale == "initializer":
        return initial
    with ExitStack() as stack:
        for encoder in encoders.values():
            stack.enter_context(offload_disabled(encoder.model))
        scaled = rescale(encoders, initial, config.token_scale)
    return replace(scaled, metadata=metadata)


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
        own = token_ids_of(encoder, initializer, in_context=False)  # the text that the encoder is given
        tokens = encoder.tokenizer(initializer, return_tensors="pt").to(compute_device(encoder.model))
        ids = tokens.input_ids[0].tolist()
        first = next(i for i in range(len(ids)) if ids[i : i + len(own)] == own)  # behind <bos>, if there is one
        # Without the head that predicts tokens, which some encoders have: it does not name its last states.
        out = encoder.model.base_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        states = out.last_hidden_state
        rows[component] = repeat_rows(states[0, first : first + len(own)].float().cpu(), num_vectors, encoder)
    return rows
