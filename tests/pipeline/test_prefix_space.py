"""A placeholder takes up the space before it where its file says so, and only there."""

import pytest
import torch
from helpers import differing, states
from tiny_pipelines import generate

from diffusers_dti import DirectionalInversion, DTITrainer
from diffusers_dti.pipeline.text_encoders import find_text_encoders

SETTINGS = {"placeholder_token": "<dog>", "initializer_token": "dog", "train_batch_size": 1, "max_train_steps": 1}


def pieces(encoder, text):
    return encoder.tokenizer.convert_ids_to_tokens(encoder.tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("prefix_space", ["absorbed", "kept", None])
def test_the_space_before_a_placeholder(pipe, concept, vectors, prefix_space):
    before = states(pipe)
    ordinary = {c: pieces(e, "a dog on the beach") for c, e in find_text_encoders(pipe).items()}
    metadata = {} if prefix_space is None else {"prefix_space": prefix_space}
    pipe.load_directional_inversion(concept(pipe, vectors=vectors, **metadata))
    for component, encoder in find_text_encoders(pipe).items():
        tokens = encoder.concepts["<dog>"].tokens
        found = pieces(encoder, "a <dog> on the beach")
        place = found.index(tokens[0])
        assert found[place : place + vectors] == tokens  # with nothing between the vectors
        word = pieces(encoder, "a dog on the beach")
        assert word == ordinary[component]
        if prefix_space == "absorbed":  # the prompt is the ordinary one, with the placeholder in the word's place
            assert found == [*word[: word.index(next(w for w in word if "dog" in w))], *tokens, *word[-3:]]
            assert pieces(encoder, "a<dog>")[-vectors:] == tokens  # and a missing space does no harm
        elif component == "text_encoder" and "Sana" in type(pipe).__name__:
            assert found[place - 1] == "▁"  # as stock loaders have it
    pipe.unload_directional_inversion()
    assert not differing(states(pipe), before)


def test_ordinary_prompts_stay_bit_for_bit(pipe, concept):
    plain = generate(pipe, "a dog on the beach")
    pipe.load_directional_inversion(concept(pipe, vectors=2, prefix_space="absorbed"))
    assert torch.equal(generate(pipe, "a dog on the beach"), plain)


def test_two_concepts_keep_their_own_ways(sana, concept):
    sana.load_directional_inversion(concept(sana, "<dog>", prefix_space="absorbed"))
    sana.load_directional_inversion(concept(sana, "<cat>", seed=1))
    (encoder,) = find_text_encoders(sana).values()
    assert pieces(encoder, "a <dog> near a <cat>") == ["a", "<dog>", "▁near", "▁a", "▁", "<cat>"]
    sana.unload_directional_inversion("<dog>")
    assert pieces(encoder, "a <cat>") == ["a", "▁", "<cat>"]


@pytest.mark.parametrize("preset", [None, "paper"])
def test_files_say_which_way_they_were_trained(sana, photos, tmp_path, preset):
    learned = DTITrainer(sana, **SETTINGS, resolution=32, preset=preset).fit(photos)
    (encoder,) = find_text_encoders(sana).values()
    expected = ["a", "<dog>"] if preset is None else ["a", "▁", "<dog>"]
    assert pieces(encoder, "a <dog>") == expected  # ready to use as it was trained
    learned.save_pretrained(tmp_path)
    sana.unload_directional_inversion()
    assert DirectionalInversion.from_pretrained(tmp_path).metadata["prefix_space"] == ("kept" if preset else "absorbed")
    sana.load_directional_inversion(tmp_path)
    assert pieces(encoder, "a <dog>") == expected


def test_a_reopened_pipeline_keeps_the_way(sana, concept, tmp_path):
    sana.load_directional_inversion(concept(sana, prefix_space="absorbed"))
    sana.save_pretrained(tmp_path)
    again = type(sana).from_pretrained(tmp_path)
    (encoder,) = find_text_encoders(again).values()
    again.load_directional_inversion(concept(sana, prefix_space="absorbed"))
    assert pieces(encoder, "a <dog>") == ["a", "<dog>"]


def test_a_mixture_of_both_ways_keeps_the_space(sana, concept):
    absorbed, kept = concept(sana, prefix_space="absorbed"), concept(sana, seed=1, prefix_space="kept")
    assert "prefix_space" not in absorbed.slerp(kept, 0.5).metadata
    assert absorbed.slerp(absorbed, 0.0).metadata["prefix_space"] == "absorbed"
