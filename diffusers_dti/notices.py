"""Drop one notice of another library that a correct call causes, and that says nothing to the user."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def notice_dropped(logger: str, beginning: str) -> Iterator[None]:
    """Drop the messages of a logger that begin with a text, within the block. Levels, and all other messages, stay.

    Args:
        logger: the logger's name, which is that of the module that logs.
        beginning: the beginning of the message.
    """

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginning)

    source = logging.getLogger(logger)
    source.addFilter(keep)
    try:
        yield
    finally:
        source.removeFilter(keep)
