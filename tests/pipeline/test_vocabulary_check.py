"""How many vectors a prompt has room for."""

import pytest
from helpers import differing, states

from diffusers_dti.families import FAMILIES
from diffusers_dti.pipeline.text_encoders import find_text_encoders
from diffusers_dti.pipeline.vocabulary_check import LONGEST_WINDOW, SHORTEST_PROMPT
from diffusers_dti.pipeline.word_rows import word_rows
from diffusers_dti.training.samples import OBJECT_TEMPLATES, STYLE_TEMPLATES

ROOM = {"sdxl": 24 - 6, "wan": 512 - 5, "sana": 1058 - 5}  # start, "a photo of a", end; Wan has no start, SANA no end
FITTING = f"{SHORTEST_PROMPT} <dog>"


@pytest.mark.parametrize("name", ROOM)
def test_as_many_vectors_as_fit_a_prompt(name, request, concept):
    pipe, room = request.getfixturevalue(name), ROOM[name]
    before, length = states(pipe), min(pipe.tokenizer.model_max_length, LONGEST_WINDOW)
    with pytest.raises(
        ValueError, match=rf"<dog> would have {room + 1} vectors in text_encoder, where .* room for {room} beside"
    ):
        pipe.load_directional_inversion(concept(pipe, vectors=room + 1))
    assert not differing(states(pipe), before)
    pipe.load_directional_inversion(concept(pipe, vectors=room, prefix_space="absorbed"))
    (encoder, *_) = find_text_encoders(pipe).values()
    whole = encoder.tokenizer(FITTING).input_ids
    assert len(whole) == length == len(encoder.tokenizer(FITTING, truncation=True, max_length=length).input_ids)
    assert set(encoder.token_ids("<dog>")) <= set(whole)


@pytest.mark.parametrize("name", ROOM)
def test_training_starts_with_no_more(name, request, concept):
    pipe, room = request.getfixturevalue(name), ROOM[name]
    encoders = find_text_encoders(pipe)
    assert len(word_rows(encoders, "dog", room)["text_encoder"]) == room
    for words, count in (("dog", room + 1), (" ".join(["dog"] * (room + 1)), None), (concept(pipe, vectors=room + 1), None)):
        with pytest.raises(ValueError, match=rf"have {room + 1} vectors in text_encoder, .*use fewer \(`num_vectors`\)"):
            word_rows(encoders, words, count)


def test_the_bound_is_the_one_of_training(pipe):
    """No template is shorter, and no family's prompts are longer."""
    for encoder in find_text_encoders(pipe).values():
        templates = [template.replace("{}", "").strip() for template in OBJECT_TEMPLATES + STYLE_TEMPLATES]
        assert min(len(encoder.tokenizer(t).input_ids) for t in templates) == len(encoder.tokenizer(SHORTEST_PROMPT).input_ids)
    assert max(family.text_length for family in FAMILIES) == LONGEST_WINDOW
