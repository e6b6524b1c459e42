"""Match the parts of a concept to a pipeline's text encoders."""

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from helpers import differing, rows_in, states

from diffusers_dti import DirectionalInversion
from diffusers_dti.pipeline.matching import match_components
from diffusers_dti.pipeline.text_encoders import find_text_encoders


def test_a_concept_for_fewer_or_more_encoders_warns(sdxl, sd, concept, caplog):
    both = concept(sdxl)
    sd.load_directional_inversion(both)
    assert "StableDiffusionPipeline has no text_encoder_2" in caplog.text
    part = DirectionalInversion.from_embeddings("<cat>", {"text_encoder_2": both.embeddings["text_encoder_2"]})
    sdxl.load_directional_inversion(part)
    assert "<cat> has nothing for text_encoder" in caplog.text
    with pytest.raises(ValueError, match="<cat> is for text_encoder_2, and StableDiffusionPipeline has only text_encoder"):
        sd.load_directional_inversion(part)


def test_the_refiner_takes_what_is_for_it(sdxl, concept, caplog):
    made = concept(sdxl)
    refiner = StableDiffusionXLImg2ImgPipeline(**sdxl.components | {"text_encoder": None, "tokenizer": None})
    loaded = refiner.load_directional_inversion(made)
    assert list(loaded.directions) == ["text_encoder_2"]
    assert "StableDiffusionXLImg2ImgPipeline has no text_encoder: that part of the concept stays unused" in caplog.text
    assert torch.equal(rows_in(refiner, "text_encoder_2"), made.embeddings["text_encoder_2"][0])


def test_another_width_is_refused(sdxl, sd, concept):
    other = concept(sdxl, base_model="user/other")
    swapped = DirectionalInversion.from_embeddings(
        "<dog>", {"text_encoder": other.embeddings["text_encoder_2"]}, other.metadata
    )
    before = states(sd)
    with pytest.raises(
        ValueError, match=r"text_encoder, 24 wide, and StableDiffusionPipeline has only text_encoder \(16 wide\).*user/other"
    ):
        sd.load_directional_inversion(swapped)
    assert not differing(states(sd), before)


def test_a_part_moves_to_the_component_it_is_for(sdxl, concept):
    """Another program's file for CLIP bigG alone may call its part "text_encoder". The kind of encoder has to match too."""
    made = concept(sdxl)
    part = {"text_encoder": made.embeddings["text_encoder_2"]}
    encoders = find_text_encoders(sdxl)
    declared = DirectionalInversion.from_embeddings("<dog>", part, {"encoders": {"text_encoder": "clip_g"}})
    moved = match_components(sdxl, encoders, declared)
    assert list(moved.directions) == ["text_encoder_2"] and moved.metadata["encoders"] == {"text_encoder_2": "clip_g"}
    assert torch.equal(moved.embeddings["text_encoder_2"], declared.embeddings["text_encoder"])
    t5 = DirectionalInversion.from_embeddings("<dog>", part, {"encoders": {"text_encoder": "t5xxl"}})
    with pytest.raises(ValueError, match="<dog> is for T5-XXL"):
        match_components(sdxl, encoders, t5)


def test_a_concept_that_fits_is_returned_as_it_is(sdxl, concept):
    made = concept(sdxl)
    assert match_components(sdxl, find_text_encoders(sdxl), made) is made
