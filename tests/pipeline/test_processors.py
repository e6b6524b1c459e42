"""Tokenizers inside processors: as a pipeline's `tokenizer`, instead of one, or beside one."""

import copy

import pytest
import torch
from diffusers import Flux2Pipeline, QwenImageEditPipeline, QwenImagePipeline
from helpers import differing, states
from tiny_encoders import ENCODERS, TinyProcessor, bert_tokenizer, llama_tokenizer, qwen_tokenizer

from diffusers_dti.pipeline.text_encoders import find_text_encoders
from diffusers_dti.pipeline.tokenizer import token_names

NOTHING = {"vae": None, "transformer": None, "scheduler": None}


@pytest.fixture
def flux(tmp_path):
    tokenizer = llama_tokenizer(tmp_path / "llama")
    return Flux2Pipeline(text_encoder=ENCODERS["mistral3"][1](tokenizer), tokenizer=TinyProcessor(tokenizer), **NOTHING)


@pytest.fixture
def edit(tmp_path):
    """Qwen-Image-Edit reads prompts with its processor, and has a tokenizer of its own as well."""
    tokenizer = qwen_tokenizer(tmp_path / "qwen")
    encoder, processor = ENCODERS["qwen2_5_vl"][1](tokenizer), TinyProcessor(copy.deepcopy(tokenizer))
    return QwenImageEditPipeline(text_encoder=encoder, tokenizer=tokenizer, processor=processor, **NOTHING)


def plain(edit):
    """A pipeline without the processor that shares encoder and tokenizer."""
    return QwenImagePipeline(text_encoder=edit.text_encoder, tokenizer=edit.tokenizer, **NOTHING)


def test_a_tokenizer_that_is_a_processor(flux, concept):
    before = states(flux)
    flux.load_directional_inversion(concept(flux, vectors=2))
    ids = flux.tokenizer("a <dog>")["input_ids"]
    assert ids[-2:] == flux.tokenizer.tokenizer.convert_tokens_to_ids(token_names("<dog>", 2))
    flux.unload_directional_inversion()
    assert not differing(states(flux), before)


@pytest.mark.parametrize("vectors", [1, 3])
def test_a_processor_beside_the_tokenizer(edit, concept, vectors):
    before = states(edit)
    edit.load_directional_inversion(concept(edit, "<cat>"))
    edit.load_directional_inversion(concept(edit, vectors=vectors))
    edit.unload_directional_inversion("<cat>")  # the later one moves up, in both
    made = edit.directional_inversions["<dog>"].embeddings["text_encoder"]
    for read in (edit.processor, edit.tokenizer):
        ids = read("a <dog>")["input_ids"][-vectors:]
        assert torch.equal(edit.text_encoder.get_input_embeddings().weight[ids], made)
        assert len(read("a <cat>")["input_ids"]) > 2
    edit.unload_directional_inversion()
    assert not differing(states(edit), before)


def test_the_same_tokenizer_in_both(edit, concept):
    edit.processor.tokenizer = edit.tokenizer
    assert find_text_encoders(edit)["text_encoder"].tokenizers == [edit.tokenizer]
    edit.load_directional_inversion(concept(edit))
    assert edit.tokenizer("<dog>")["input_ids"] == edit.processor("<dog>")["input_ids"]


def test_a_concept_that_another_pipeline_loaded(edit, concept):
    plain(edit).load_directional_inversion(concept(edit))
    before = states(edit)
    with pytest.raises(ValueError, match="text_encoder has <dog>, loaded through another tokenizer"):
        edit.load_directional_inversion(concept(edit, "<cat>"))
    assert not differing(states(edit), before)
    edit.unload_directional_inversion()
    edit.load_directional_inversion(concept(edit, "<cat>"))
    assert edit.tokenizer("<cat>")["input_ids"] == edit.processor("<cat>")["input_ids"]


def test_tokenizers_with_different_tokens(edit, concept):
    edit.processor.tokenizer.add_tokens(["<stock>"])
    before = states(edit)
    with pytest.raises(ValueError, match="text_encoder's tokenizer and its processor's have different tokens"):
        edit.load_directional_inversion(concept(edit))
    assert not differing(states(edit), before)


@pytest.mark.parametrize("other", ["of another model", "with another vocabulary"])
def test_a_processor_that_is_for_something_else(edit, concept, other, tmp_path, monkeypatch):
    if other == "of another model":
        parts = {**edit.components, "prompt_enhancer": edit.text_encoder}  # as LTX-2.5 has
        monkeypatch.setattr(type(edit), "components", parts)
    else:
        edit.processor.tokenizer = bert_tokenizer(tmp_path / "bert")
    assert find_text_encoders(edit)["text_encoder"].tokenizers == [edit.tokenizer]
    edit.load_directional_inversion(concept(edit))
    assert "<dog>" not in edit.processor.tokenizer.added_tokens_encoder
