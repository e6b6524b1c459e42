"""The table of input embeddings of a text encoder: make it longer or shorter, and put it in the old one's place."""

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from .text_encoders import TextEncoder
from .transaction import change, change_entry

# The number of rows by which a compiled encoder's table grows: torch compiles a graph for each length, and after eight of them
# runs without any. Its own cure, `torch._dynamo.config.force_parameter_static_shapes = False`, is for the whole process.
_STEP = 64


def length_for(encoder: TextEncoder, table_rows: int, count: int) -> int:
    """Return the length of a table with at least `count` rows: for a compiled encoder, the next of few lengths.

    Args:
        encoder: the text encoder.
        table_rows: the length of its table before the first concept.
        count: the number of rows that are needed.
    """
    return table_rows + -(-(count - table_rows) // _STEP) * _STEP if encoder.is_compiled and count > table_rows else count


def room_for(weight: Tensor, count: int) -> Tensor | None:
    """Return a longer copy of a table, or None if it has enough rows.

    Args:
        weight: the table, (rows, d).
        count: the number of rows that are needed. A table with more rows than its tokenizer has tokens stays as it is.
    """
    weight = weight.detach()
    missing = count - len(weight)
    return torch.cat([weight, weight.new_zeros(missing, weight.shape[1])]) if missing > 0 else None


def moved_rows(
    weight: Tensor, first: int, total: int, moved: Mapping[int, int], restored: Mapping[int, Tensor], table_rows: int
) -> Tensor:
    """Return the part of a table that changes when rows move up.

    Args:
        weight: the table, (rows, d).
        first: the first row of the part.
        total: the number of rows that the table will have.
        moved: new ids by old ones.
        restored: rows, (d,), that are put back, by id.
        table_rows: the length of the table before the first concept: rows after these that nothing moves to become 0.

    Returns:
        The rows from `first` on, (total - first, d).
    """
    rows = weight.detach()
    part = rows[first:total].clone()
    part[max(table_rows - first, 0) :] = 0
    pairs = [(old, new - first) for old, new in moved.items() if old < len(rows) and new < total]
    if pairs:
        old, new = torch.tensor(pairs, device=rows.device).T
        part[new] = rows[old]
    for id, row in restored.items():
        if id < total:
            part[id - first] = row
    return part


def set_table(undo: ExitStack, encoder: TextEncoder, rows: Tensor, vocab_size: int | None) -> None:
    """Make `rows` the table, in every module that shares it.

    Args:
        undo: see `transaction`.
        encoder: the text encoder.
        rows: the new table, (rows, d).
        vocab_size: the config's new `vocab_size`; None if it has none.
    """
    # Not `resize_token_embeddings`: it would untie shared weights, replace UMT5's embedding module and drop the hooks on it.
    # By default it also computes the mean and covariance of all rows, which takes a minute for Gemma's.
    old = encoder.weight
    new = nn.Parameter(rows, requires_grad=old.requires_grad)
    for module in encoder.model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is old:
                change_entry(undo, module._parameters, name, new)
                if isinstance(module, nn.Embedding):
                    change(undo, module, "num_embeddings", len(rows))
                elif isinstance(module, nn.Linear):
                    change(undo, module, "out_features", len(rows))
    for holder in (encoder.config, encoder.model):
        if isinstance(getattr(holder, "vocab_size", None), int) and vocab_size is not None:
            change(undo, holder, "vocab_size", vocab_size)
