"""Parse JSON that another program, a killed process or an attacker may have written."""

import json
from typing import Any

MAX_DEPTH = 100  # far more than any file of ours has


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; unlike `json.loads`, with one kind of error.

    Args:
        text: the JSON.

    Returns:
        Its value.

    Raises:
        ValueError: if it is not JSON, or is nested more than `MAX_DEPTH` levels deep.

    Example:

        ```py
        >>> from diffusers_dti.parsing import parse_json

        >>> parse_json('{"dog": [1, 2]}')
        {'dog': [1, 2]}
        ```
    """
    too_deep = "it is nested too deeply"
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(too_deep) from error
    # How deep `json.loads` goes depends on the release of Python, and copying or writing the value fails earlier.
    inside = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [entry for entry in inside if isinstance(entry, dict | list)]
        if not level:
            return value
        inside = []
        for outer in level:
            inside += outer.values() if isinstance(outer, dict) else outer
    raise ValueError(too_deep)
