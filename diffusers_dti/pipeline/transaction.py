"""Change several objects, or none of them: what a change replaces is put back if a later one fails, also by Ctrl-C.

Every function takes the `ExitStack` of a block, and tells it how to undo a change before it makes it:

    with ExitStack() as undo:
        change(undo, config, "vocab_size", 100)
        ...
        undo.pop_all()  # all is done
"""

from collections.abc import MutableMapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor

_ABSENT: Any = object()


def change(undo: ExitStack, holder: Any, name: str, value: Any) -> None:
    """Set an attribute."""
    undo.callback(_set, holder, name, getattr(holder, name, _ABSENT))
    setattr(holder, name, value)


def drop(undo: ExitStack, holder: Any, name: str) -> None:
    """Delete an attribute."""
    undo.callback(_set, holder, name, getattr(holder, name))
    delattr(holder, name)


def change_entry(undo: ExitStack, mapping: MutableMapping[str, Any], key: str, value: Any) -> None:
    """Set an entry of a mapping."""
    undo.callback(_set_entry, mapping, key, mapping.get(key, _ABSENT))
    mapping[key] = value


def drop_entry(undo: ExitStack, mapping: MutableMapping[str, Any], key: str) -> None:
    """Delete an entry of a mapping."""
    undo.callback(_set_entry, mapping, key, mapping[key])
    del mapping[key]


def write_rows(undo: ExitStack, table: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Write rows into a table in place.

    Args:
        undo: the block's stack.
        table: the table, (n, d).
        ids: where to write, (k,) int64.
        rows: what to write, (k, d).
    """
    table = table.detach()
    ids, rows = ids.to(table.device), rows.to(table)
    undo.callback(table.index_copy_, 0, ids, table[ids])
    table.index_copy_(0, ids, rows)


def _set(holder: Any, name: str, value: Any) -> None:
    if value is not _ABSENT:
        setattr(holder, name, value)
    elif hasattr(holder, name):  # it may have failed before it was set
        delattr(holder, name)


def _set_entry(mapping: MutableMapping[str, Any], key: str, value: Any) -> None:
    if value is _ABSENT:
        mapping.pop(key, None)
    else:
        mapping[key] = value
