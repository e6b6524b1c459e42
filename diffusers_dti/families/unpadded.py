"""Prompts at their real length, for encoders that pipelines run over hundreds of padded positions.

The states of the real tokens do not depend on masked ones behind them: encoded without the padding they are the same, for a
fraction of the work (10 of Gemma's 300 or UMT5's 512 positions), forward and backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


def encoder_inputs(
    tokenizer: Any, encoder: nn.Module, prompts: Sequence[str], length: int, zero_pads: Sequence[int]
) -> dict[str, Tensor]:
    """The encoder's arguments for a batch, padded on the right to its longest prompt alone.

    Args:
        tokenizer, encoder: the pair; a concept's rows are put in by hooks on the encoder's embedding.
        prompts: n of them.
        length: tokens that the pipeline cuts prompts off at.
        zero_pads: for each prompt, how many tokens of zero embedding come before its first word (paper, appendix:
            the concept is to work at any position). They are no tokens of the vocabulary: nothing of them can stay behind.
    """
    tokens = tokenizer(
        list(prompts), padding=True, truncation=True, max_length=length - max(zero_pads), padding_side="right",
        return_tensors="pt",
    )  # fmt: skip
    ids, mask = tokens.input_ids.to(encoder.device), tokens.attention_mask
    if not any(zero_pads):
        return {"input_ids": ids, "attention_mask": mask.to(encoder.device)}
    start = int(tokens.input_ids[0, 0] == tokenizer.bos_token_id)  # T5 has no such token
    rows = []
    for embedded, real, zeros in zip(encoder.get_input_embeddings()(ids), mask.sum(-1).tolist(), zero_pads, strict=True):
        blank = embedded.new_zeros(zeros, embedded.shape[-1])
        rows.append(torch.cat([embedded[:start], blank, embedded[start:real]]))
    lengths = torch.tensor([len(r) for r in rows])
    mask = (torch.arange(max(lengths)) < lengths[:, None]).to(mask.dtype)
    return {"inputs_embeds": pad_sequence(rows, batch_first=True), "attention_mask": mask.to(encoder.device)}
