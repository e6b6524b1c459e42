"""Placeholders of several vectors, expanded by the tokenizer."""

import copy
import json
import pickle

import pytest
from tokenizers import Tokenizer
from transformers import AddedToken

from diffusers_dti.pipeline.tokenizer import token_names


def test_every_way_into_the_tokenizer_expands(sd, concept):
    sd.load_directional_inversion(concept(sd, vectors=3))
    tokenizer = sd.tokenizer
    names = token_names("<dog>", 3)
    ids = tokenizer.convert_tokens_to_ids(names)
    a, on = tokenizer.convert_tokens_to_ids(["a</w>", "on</w>"])
    assert tokenizer.tokenize("a <dog> on") == ["a</w>", *names, "on</w>"]
    assert tokenizer.encode("a <dog> on", add_special_tokens=False) == [a, *ids, on]
    assert tokenizer(["a <dog>", "<dog> on"], add_special_tokens=False).input_ids == [[a, *ids], [*ids, on]]
    assert tokenizer(text="<dog>", add_special_tokens=False).input_ids == ids


def test_words_inside_words_and_expanded_text_stay(sd, concept):
    sd.load_directional_inversion(concept(sd, "zog", vectors=2))
    tokenizer = sd.tokenizer
    names = token_names("zog", 2)
    assert tokenizer.tokenize("a zogory, zog.")[-3:-1] == names
    assert tokenizer.tokenize("zogory") == ["zogory</w>"]
    once = "a " + "".join(names)
    assert tokenizer.tokenize(once) == tokenizer.tokenize("a zog") == ["a</w>", *names]
    assert sd.tokenizer.tokenize(sd.maybe_convert_prompt("a zog", tokenizer)) == ["a</w>", *names]


def test_a_single_vector_inside_a_word(sd, concept):
    sd.load_directional_inversion(concept(sd, "zog"))
    if hasattr(sd.tokenizer, "_tokenizer"):  # slow tokenizers of transformers 4 do not match single words
        assert sd.tokenizer.tokenize("zogory zog, a") == ["zogory</w>", "zog", ",</w>", "a</w>"]
    assert sd.tokenizer.tokenize("zog, a")[0] == "zog"


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("word", ["<Dog>", "<dog>"])
def test_placeholders_match_as_they_are_written(sd, concept, word, vectors):
    """Upper case works, and in the same way for the oldest and the newest supported versions."""
    sd.load_directional_inversion(concept(sd, word, vectors))
    names = token_names(word, vectors)
    assert sd.tokenizer.tokenize(f"a {word} on") == ["a</w>", *names, "on</w>"]
    assert not set(sd.tokenizer.tokenize(f"a {word.swapcase()} on")) & set(names)


def test_the_longest_placeholder_wins(sd, concept):
    sd.load_directional_inversion(concept(sd, "<dog", vectors=2))
    sd.load_directional_inversion(concept(sd, "<dog>", vectors=2, seed=1))
    assert sd.tokenizer.tokenize("<dog> <dog") == [*token_names("<dog>", 2), *token_names("<dog", 2)]


def test_copies_pickles_and_saved_tokenizers_work(sd, concept, tmp_path):
    sd.load_directional_inversion(concept(sd, vectors=2))
    plain = type(sd.tokenizer).__bases__[-1]
    expected = sd.tokenizer("a <dog> on").input_ids
    for again in (copy.deepcopy(sd.tokenizer), pickle.loads(pickle.dumps(sd.tokenizer))):
        assert again("a <dog> on").input_ids == expected
    sd.tokenizer.save_pretrained(tmp_path)
    reopened = plain.from_pretrained(tmp_path)  # the class of transformers has the vectors' tokens, but not the placeholder
    assert type(reopened) is plain
    assert reopened("a " + "".join(token_names("<dog>", 2)) + " on").input_ids == expected
    sd.unload_directional_inversion()
    assert type(sd.tokenizer) is plain


@pytest.mark.parametrize("name", ["sd", "sana", "wan"])
def test_removing_is_like_building_the_tokenizer_from_its_file_without_the_tokens(name, request, concept):
    """A fast tokenizer's JSON is the whole of it, also with settings of truncation, padding and special tokens."""
    pipe = request.getfixturevalue(name)
    tokenizer = pipe.tokenizer
    if not hasattr(tokenizer, "_tokenizer"):
        pytest.skip("a slow tokenizer of transformers 4")
    tokenizer.add_tokens(["<own>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<special>"]})
    tokenizer.add_tokens([AddedToken("<after>", lstrip=True, normalized=False)])
    pipe.text_encoder.resize_token_embeddings(len(tokenizer))
    pipe.load_directional_inversion([concept(pipe), concept(pipe, "<rex>", vectors=3, seed=1), concept(pipe, "<cat>", seed=2)])
    inner = tokenizer._tokenizer
    inner.enable_truncation(7, stride=1)
    inner.enable_padding(direction="left", length=9, pad_id=1)
    inner.encode_special_tokens = True
    state = json.loads(inner.to_str())
    gone = set(token_names("<rex>", 3))
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in gone]
    for token in state["added_tokens"]:
        token["id"] -= 3 * (token["content"] == "<cat>")
    pipe.unload_directional_inversion("<rex>")
    assert json.loads(tokenizer._tokenizer.to_str()) == state
    assert tokenizer._tokenizer.encode_special_tokens
    again = Tokenizer.from_str(json.dumps(state))
    again.encode_special_tokens = True
    text = "a <own> <special> <after> <dog> a <cat>, a <rex>"
    assert tokenizer._tokenizer.encode(text).ids == again.encode(text).ids
