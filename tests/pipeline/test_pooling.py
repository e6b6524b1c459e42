"""Where CLIP's text vector is pooled, with several concepts and in reopened pipelines."""

import pytest
from helpers import differing, states

from diffusers_dti.pipeline import pooling


def eos_ids(pipe):
    """Return the ids that the encoders of an SDXL pipeline pool at: the config's and each module's."""
    found = set()
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        found |= {x.eos_token_id for x in (encoder.config, *encoder.modules()) if hasattr(x, "eos_token_id")}
    return found


def reopened(pipe, folder):
    pipe.save_pretrained(folder)
    return type(pipe).from_pretrained(folder)


def test_a_reopened_pipeline_can_pool_the_legacy_way(sdxl, concept, tmp_path):
    """A saved pipeline remembers that its own id is the legacy one."""
    real, made = sdxl.tokenizer.eos_token_id, [concept(sdxl), concept(sdxl, "<cat>", seed=1)]
    sdxl.load_directional_inversion(made)
    again = reopened(sdxl, tmp_path)
    assert eos_ids(again) == {real}
    again.load_directional_inversion(concept(sdxl, "<rex>", seed=2), pooling="legacy")
    assert eos_ids(again) == {2}
    again.unload_directional_inversion("<rex>")
    assert eos_ids(again) == {real}  # as it was opened, with two concepts that are not loaded again yet
    again.load_directional_inversion(made, pooling="legacy")
    assert eos_ids(again) == {2}
    again.unload_directional_inversion("<cat>")
    assert eos_ids(reopened(again, tmp_path / "legacy")) == {2}
    again.unload_directional_inversion()
    assert eos_ids(again) == {2} and pooling.LEGACY_POOLING not in again.text_encoder.config.to_dict()


def test_concepts_of_different_pooling_are_named(sdxl, concept, monkeypatch):
    said = []
    monkeypatch.setattr(pooling.logger, "warning", said.append)
    before = states(sdxl)
    sdxl.load_directional_inversion([concept(sdxl, "<a>"), concept(sdxl, "<b>", pooling="eos")])
    assert not said
    sdxl.load_directional_inversion(concept(sdxl, "<c>", pooling="legacy"))
    (warning,) = said
    assert warning.startswith('<c> has pooling="legacy", and <a>, <b> not: ') and "pictures of <a>, <b> change" in warning
    sdxl.unload_directional_inversion(["<a>", "<b>"])
    sdxl.load_directional_inversion(concept(sdxl, "<d>"), pooling="legacy")
    assert len(said) == 1
    sdxl.unload_directional_inversion()
    assert not differing(states(sdxl), before)


@pytest.mark.parametrize("name", ["sana", "wan"])
def test_other_encoders_have_no_pooling(name, request, concept, monkeypatch):
    pipe = request.getfixturevalue(name)
    said = []
    monkeypatch.setattr(pooling.logger, "warning", said.append)
    pipe.load_directional_inversion(concept(pipe, "<a>"))
    pipe.load_directional_inversion(concept(pipe, "<b>"), pooling="legacy")
    assert not said and not hasattr(pipe.text_encoder.config, pooling.LEGACY_POOLING)
