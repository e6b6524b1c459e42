"""Which concepts a pipeline has, also one that was saved with them."""

from dataclasses import replace

import pytest
import torch
from helpers import differing, encoded, same, states

from diffusers_dti import DTITrainer
from diffusers_dti.pipeline.listing import waiting
from diffusers_dti.pipeline.text_encoders import find_text_encoders

METADATA = {"base_model": "a/model", "initializer": "dog", "pooling": "eos", "training": {"seed": 3}}


def reopened(pipe, folder):
    pipe.save_pretrained(folder)
    return type(pipe).from_pretrained(folder)


def is_as_before(pipe, before):
    """Whether a pipeline has the tables and vocabularies that it had without concepts, and no record of any in its configs."""
    keys = {key for encoder in find_text_encoders(pipe).values() for key in encoder.config.to_dict()}
    tables = [k for k in differing(states(pipe), before) if "length" in k or "table" in k or "num_embeddings" in k]
    return not tables and not {key for key in keys if "directional" in key or "without_concepts" in key}


def fail(*args):
    raise OSError("no such folder")


@pytest.fixture
def pair(concept):
    def make(pipe):
        return replace(concept(pipe), metadata=METADATA), concept(pipe, "<rex>", vectors=3, seed=5)

    return make


def test_a_reopened_pipeline_lists_its_concepts(sdxl, pair, tmp_path):
    single, several = pair(sdxl)
    before = states(sdxl)
    sdxl.load_directional_inversion([single, several])
    expected = encoded(sdxl, "a <dog> near <rex>")
    again = reopened(sdxl, tmp_path)
    listed = again.directional_inversions
    assert list(listed) == ["<dog>", "<rex>"]
    assert listed["<dog>"].metadata == METADATA
    for made in (single, several):
        for component, rows in made.embeddings.items():
            torch.testing.assert_close(listed[made.placeholder_token].embeddings[component], rows)
    again.save_directional_inversion(tmp_path / "rex", token="<rex>")
    again.load_directional_inversion(list(listed.values()))
    assert list(again.directional_inversions) == ["<dog>", "<rex>"]
    assert not any(map(waiting, find_text_encoders(again).values()))
    torch.testing.assert_close(encoded(again, "a <dog> near <rex>"), expected, rtol=0, atol=1e-5)
    again.unload_directional_inversion()
    assert again.directional_inversions == {}
    assert is_as_before(again, before)


def test_concepts_that_a_pipeline_was_saved_with_can_be_unloaded(sdxl, pair, tmp_path):
    before = states(sdxl)
    sdxl.load_directional_inversion(list(pair(sdxl)))
    again = reopened(sdxl, tmp_path / "1")
    again.unload_directional_inversion("<dog>")
    assert list(again.directional_inversions) == ["<rex>"]
    third = reopened(again, tmp_path / "2")
    assert list(third.directional_inversions) == ["<rex>"]
    third.unload_directional_inversion()
    assert third.directional_inversions == {}
    assert is_as_before(third, before)


def test_loading_one_keeps_the_others_in_the_list(sana, pair, tmp_path):
    """Also through a second save, and beside a new one."""
    single, several = pair(sana)
    sana.load_directional_inversion([single, several])
    again = reopened(sana, tmp_path / "1")
    again.load_directional_inversion(single)
    again.load_directional_inversion(single, token="<new>")
    assert list(again.directional_inversions) == ["<rex>", "<dog>", "<new>"]
    assert list(reopened(again, tmp_path / "2").directional_inversions) == ["<dog>", "<rex>", "<new>"]


def test_a_concept_that_a_pipeline_was_saved_with_can_be_replaced(sdxl, pair, concept, tmp_path):
    sdxl.load_directional_inversion(list(pair(sdxl)))
    again = reopened(sdxl, tmp_path)
    new = concept(again, "<rex>", vectors=2, seed=8)
    before = states(again)
    for other in (new, concept(again, "<rex>", seed=9), concept(again, "<dog>", seed=9), concept(again, "<dog>", vectors=2)):
        with pytest.raises(ValueError, match=f"{other.placeholder_token} is already loaded: replace it with `replace=True`"):
            again.load_directional_inversion(other)
    assert not differing(states(again), before)
    again.load_directional_inversion(new, replace=True)
    assert list(again.directional_inversions) == ["<dog>", "<rex>"]
    assert same(again.directional_inversions["<rex>"].embeddings, new.embeddings)
    again.unload_directional_inversion("<dog>")
    sdxl.unload_directional_inversion()
    sdxl.load_directional_inversion(new)
    torch.testing.assert_close(encoded(again, "a <rex>"), encoded(sdxl, "a <rex>"), rtol=0, atol=1e-5)


def test_training_takes_the_place_of_a_concept_that_a_pipeline_was_saved_with(sana, pair, photos, tmp_path):
    sana.load_directional_inversion(list(pair(sana)))
    again = reopened(sana, tmp_path)
    settings = {"initializer_token": "dog", "resolution": 32, "max_train_steps": 1}
    before = encoded(again, "a <dog>")
    with pytest.raises(OSError, match="no such folder"):
        DTITrainer(again, placeholder_token="<dog>", **settings).fit(photos, callback_on_step_end=fail)
    assert set(again.directional_inversions) == {"<dog>", "<rex>"} and torch.equal(encoded(again, "a <dog>"), before)
    learned = DTITrainer(again, placeholder_token="<rex>", **settings).fit(photos)
    assert list(again.directional_inversions) == ["<dog>", "<rex>"]
    assert same(again.directional_inversions["<rex>"].embeddings, learned.embeddings)
    fresh = DTITrainer(sana, placeholder_token="<new>", **settings).fit(photos)
    assert torch.equal(fresh.directions["text_encoder"], learned.directions["text_encoder"])


def test_what_stock_unloads_is_listed_no_longer(sd, pair, tmp_path):
    sd.load_directional_inversion(list(pair(sd)))
    again = reopened(sd, tmp_path)
    again.unload_textual_inversion("<dog>")
    assert list(again.directional_inversions) == ["<rex>"]


def test_metadata_that_is_not_json_does_not_prevent_saving(sd, concept, tmp_path):
    sd.load_directional_inversion(replace(concept(sd), metadata={"training": {"rate": torch.ones(1)}}))
    assert reopened(sd, tmp_path).directional_inversions["<dog>"].metadata == {}


@pytest.mark.parametrize(
    "record",
    [
        [], "<dog>", {"<dog>": None}, {"<dog>": {}}, {"<dog>": {"num_vectors": 10**12, "metadata": {}}},
        {"<dog>": {"num_vectors": 1, "metadata": {"pooling": 3}}}, {"<dog>": {"num_vectors": 1, "metadata": None}},
        {"<dog>": {"num_vectors": 1}}, {"<cat>": {"num_vectors": 1, "metadata": {}}},
        {"<dog>": {"num_vectors": 2, "metadata": {}}}, {"": {"num_vectors": 1, "metadata": {}}},
    ],
)  # fmt: skip
def test_a_record_that_does_not_fit_is_ignored(sd, concept, record):
    """A stranger's config may say anything."""
    made = concept(sd)
    sd.load_textual_inversion({"<dog>": made.embeddings["text_encoder"][0]})
    sd.text_encoder.config.directional_inversions = record
    assert sd.directional_inversions == {}
    sd.load_directional_inversion(made)
    assert same(sd.directional_inversions["<dog>"].embeddings, made.embeddings)
