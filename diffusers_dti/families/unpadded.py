"""Encode prompts at their real length, for encoders that pipelines run over hundreds of padded positions.

The states of the real tokens do not depend on the masked tokens after them. Without the padding they are the same, for a
fraction of the work, forward and backward: 10 of Gemma's 300 positions, or of UMT5's 512.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..pipeline.protocols import Tokenizer
from .base import Family


def encoder_inputs(
    family: Family, tokenizer: Tokenizer, encoder: Any, prompts: Sequence[str], length: int, zero_pads: Sequence[int]
) -> dict[str, Tensor]:
    """Return the encoder's arguments for a batch of n prompts, padded on the right to the longest of them.

    Args:
        family: the family that tokenizes the prompts.
        tokenizer: the encoder's tokenizer.
        encoder: a text encoder of transformers. Training swaps in a concept's rows by hooks on its embedding module.
        prompts: n prompts.
        length: the number of tokens that the pipeline truncates prompts to.
        zero_pads: for each prompt, the number of tokens of zero embedding before its first word, so that the concept works at
            any position (paper, appendix). They are not in the vocabulary, so nothing has to be removed afterwards.

    Returns:
        "attention_mask", (n, longest), and "input_ids", (n, longest), or "inputs_embeds", (n, longest, d), if there are zeros.
    """
    tokens = [family.token_ids(tokenizer, prompt, length - max(zero_pads)) for prompt in prompts]
    lengths = [len(ids) + zeros for ids, zeros in zip(tokens, zero_pads, strict=True)]
    device = family.device
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long().to(device, non_blocking=True)
    padded = pad_sequence(tokens, batch_first=True).to(device, non_blocking=True)  # with 0: any id will do behind the mask
    if not any(zero_pads):
        return {"input_ids": padded, "attention_mask": mask}
    start = int(tokens[0][0] == tokenizer.bos_token_id)  # 1 after <bos>; T5 has no such token
    rows = []
    for embedded, ids, zeros in zip(encoder.get_input_embeddings()(padded), tokens, zero_pads):
        blank = embedded.new_zeros(zeros, embedded.shape[-1])
        rows.append(torch.cat([embedded[:start], blank, embedded[start : len(ids)]]))
    return {"inputs_embeds": pad_sequence(rows, batch_first=True), "attention_mask": mask}
