"""One concept in the place of another: as unloading and then loading, in one change."""

import copy
import dataclasses

import pytest
import torch
from helpers import differing, states
from tiny_pipelines import generate

from diffusers_dti.pipeline.exchange import making_way
from diffusers_dti.pipeline.text_encoders import find_text_encoders


def rows_of(pipe, word):
    """Return the rows of a concept's vectors, by component."""
    return {c: e.weight[e.token_ids(word)].detach().clone() for c, e in find_text_encoders(pipe).items()}


def same_rows(a, b):
    return a.keys() == b.keys() and all(torch.equal(rows, b[component]) for component, rows in a.items())


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 1), (2, 3)])
def test_replacing_is_unloading_and_then_loading(pipe, concept, before, after):
    earlier, other = concept(pipe, "<dog>", before), concept(pipe, "<cat>", 2, seed=1)
    later = concept(pipe, "<dog>", after, seed=2, pooling="legacy")
    pipe.load_directional_inversion([earlier, other])
    cat = rows_of(pipe, "<cat>")
    by_hand = copy.deepcopy(pipe)
    by_hand.unload_directional_inversion("<dog>")
    by_hand.load_directional_inversion(later)
    assert pipe.load_directional_inversion(later, replace=True) is later
    assert not differing(states(pipe), states(by_hand))
    assert list(pipe.directional_inversions) == ["<cat>", "<dog>"] and pipe.directional_inversions["<dog>"] is later
    assert same_rows(rows_of(pipe, "<cat>"), cat)
    prompt = "a <dog> and a <cat>"
    assert torch.equal(generate(pipe, prompt), generate(by_hand, prompt))


def test_nothing_to_replace_is_loading(pipe, concept):
    other, made = copy.deepcopy(pipe), concept(pipe)
    other.load_directional_inversion(made)
    pipe.load_directional_inversion(made, replace=True)
    assert not differing(states(pipe), states(other))


def test_several_are_replaced_at_once(sdxl, concept):
    made = [concept(sdxl, word, seed=seed) for seed, word in enumerate(("<a>", "<b>", "<c>"))]
    sdxl.load_directional_inversion(made)
    other = copy.deepcopy(sdxl)
    other.unload_directional_inversion(["<a>", "<c>"])
    new = [concept(sdxl, word, 2, seed=5) for word in ("<c>", "<d>", "<a>")]
    other.load_directional_inversion(new)
    sdxl.load_directional_inversion(new, replace=True)
    assert not differing(states(sdxl), states(other)) and list(sdxl.directional_inversions) == ["<b>", "<c>", "<d>", "<a>"]
    before = states(sdxl)
    with pytest.raises(ValueError, match="<a> is the placeholder of two of the concepts"):
        sdxl.load_directional_inversion(made, token=["<a>", "<b>", "<a>"], replace=True)
    assert not differing(states(sdxl), before)


def test_a_part_that_the_new_concept_lacks_is_gone(sdxl, concept):
    other, earlier, later = copy.deepcopy(sdxl), concept(sdxl), concept(sdxl, seed=1)
    first = dataclasses.replace(
        later,
        directions={"text_encoder": later.directions["text_encoder"]},
        scales={"text_encoder": later.scales["text_encoder"]},
    )
    other.load_directional_inversion(first)
    sdxl.load_directional_inversion(earlier)
    sdxl.load_directional_inversion(first, replace=True)
    assert not differing(states(sdxl), states(other)) and "<dog>" not in find_text_encoders(sdxl)["text_encoder_2"].concepts
    other.unload_directional_inversion()
    other.load_directional_inversion(earlier)
    sdxl.load_directional_inversion(earlier, replace=True)  # and it comes back with one that has it
    assert not differing(states(sdxl), states(other))


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"directions": {"text_encoder": torch.eye(1, 5)}, "scales": {"text_encoder": torch.ones(1)}}, {}, "5 wide"),
        ({}, {"token_scale": "median"}, "token_scale must be"),
        ({}, {"pooling": "mean"}, "pooling must be"),
    ],
)
def test_one_that_does_not_fit_leaves_the_earlier_one(sdxl, concept, change, arguments, message):
    sdxl.load_directional_inversion([concept(sdxl, "<dog>", 2), concept(sdxl, "<cat>")])
    before, loaded = states(sdxl), sdxl.directional_inversions
    wrong = dataclasses.replace(concept(sdxl, seed=1), **change)
    with pytest.raises(ValueError, match=message):
        sdxl.load_directional_inversion(wrong, replace=True, **arguments)
    assert not differing(states(sdxl), before) and list(sdxl.directional_inversions) == list(loaded)
    assert sdxl.directional_inversions["<dog>"] is loaded["<dog>"]


def test_a_failure_in_the_second_encoder_puts_back_the_first(sdxl, concept, monkeypatch):
    sdxl.load_directional_inversion([concept(sdxl), concept(sdxl, "<cat>")])
    before = states(sdxl)
    add_tokens = type(sdxl.tokenizer_2).add_tokens

    def fail(self, *args, **kwargs):
        if self is sdxl.tokenizer_2:
            raise RuntimeError("out of memory")
        return add_tokens(self, *args, **kwargs)

    monkeypatch.setattr(type(sdxl.tokenizer_2), "add_tokens", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sdxl.load_directional_inversion(concept(sdxl, vectors=2), replace=True)
    assert not differing(states(sdxl), before)


@pytest.mark.parametrize("name", ["sdxl", "wan"])
def test_a_block_that_fails_leaves_the_concepts_as_they_were(name, request, concept):
    """Also their order, from which the ids come, and rows that are no longer those of the concept."""
    pipe = request.getfixturevalue(name)
    pipe.load_directional_inversion([concept(pipe, f"<{x}>", n, seed=n) for n, x in enumerate("abc", 1)])
    pipe.to(torch.float16).to(torch.float32)
    before, loaded = states(pipe), pipe.directional_inversions
    assert not same_rows(rows_of(pipe, "<b>"), loaded["<b>"].embeddings)
    with pytest.raises(KeyboardInterrupt), making_way(pipe, ["<b>", "<new>"]):
        assert list(pipe.directional_inversions) == ["<a>", "<c>"]
        pipe.load_directional_inversion([concept(pipe, word, 2, seed=7) for word in ("<new>", "<b>")], pooling="legacy")
        raise KeyboardInterrupt
    assert not differing(states(pipe), before)
    assert list(pipe.directional_inversions) == list(loaded)
    assert all(pipe.directional_inversions[word] is loaded[word] for word in loaded)


def test_a_block_that_ends_has_made_way(sdxl, concept):
    sdxl.load_directional_inversion([concept(sdxl, "<a>"), concept(sdxl, "<b>", seed=1)])
    with making_way(sdxl, ["<a>"]):
        pass
    assert list(sdxl.directional_inversions) == ["<b>"]
