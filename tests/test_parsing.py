"""JSON that another program or an attacker may have written."""

import json

import pytest

from diffusers_dti.parsing import MAX_DEPTH, parse_json


@pytest.mark.parametrize("text", ["[1, 2.5, null]", b'{"a": {"b": ["\xc3\xa9", true]}}', '"[[["', "NaN", "[]"])
def test_parses_as_json_does(text):
    assert repr(parse_json(text)) == repr(json.loads(text))


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 2_000, 100_000])
def test_refuses_what_is_nested_too_deeply(opening, closing, depth):
    """At a depth of 2,000 some releases of Python parse it, and fail where it is copied."""
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(f"[1, {opening * (depth - 2)}[]{closing * (depth - 2)}]")


def test_the_deepest_that_is_allowed():
    for text in ("[" * MAX_DEPTH + "]" * MAX_DEPTH, '{"a":' * MAX_DEPTH + "0" + "}" * MAX_DEPTH):
        assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize("text", ["", "{", "[1", b"\xff", "[" * 100_000])
def test_damaged_text_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)
