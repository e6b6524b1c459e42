"""The rows that training starts from."""

import pytest
import torch
from tiny_modern import qwen3_encoder, qwen_tokenizer
from tiny_pipelines import t5_encoder, t5_tokenizer

from diffusers_dti.pipeline.text_encoders import TextEncoder, find_text_encoders
from diffusers_dti.pipeline.word_rows import word_rows
from diffusers_dti.training.initializer import contextual_rows


def test_a_words_rows_are_the_tables(sdxl):
    pairs = find_text_encoders(sdxl)
    rows = word_rows(pairs, "red toy dog", None)
    for component, encoder in pairs.items():
        ids = encoder.tokenizer.convert_tokens_to_ids(["red</w>", "toy</w>", "dog</w>"])
        assert torch.equal(rows[component], encoder.weight[ids].detach())
        assert rows[component].dtype == torch.float32 and not rows[component].requires_grad


def test_more_vectors_take_them_in_turn(sdxl):
    rows = word_rows(find_text_encoders(sdxl), "toy dog", 3)["text_encoder"]
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    with pytest.raises(ValueError, match="has 2 vectors in text_encoder: num_vectors must be 2 or more"):
        word_rows(find_text_encoders(sdxl), "toy dog", 1)


def test_a_concepts_rows(sdxl, sd, concept):
    made = concept(sdxl, vectors=2)
    rows = word_rows(find_text_encoders(sdxl), made, None)
    assert all(torch.equal(rows[c], e) for c, e in made.embeddings.items())
    with pytest.raises(ValueError, match="<dog>, has nothing for text_encoder_2"):
        word_rows(find_text_encoders(sdxl), concept(sd), None)


def test_words_that_are_none(sd, tmp_path):
    with pytest.raises(ValueError, match="'  ' has no known tokens"):
        word_rows(find_text_encoders(sd), "  ", None)
    tokenizer = t5_tokenizer(tmp_path / "t")
    with pytest.raises(ValueError, match="犬.*has no known tokens"):
        word_rows({"text_encoder": TextEncoder("text_encoder", tokenizer, t5_encoder(tokenizer, 16))}, "犬", None)


def test_the_states_of_a_model_with_a_head(tmp_path):
    """Models that predict tokens do not name their last states."""
    tokenizer = qwen_tokenizer(tmp_path / "qwen")
    model = qwen3_encoder(tokenizer, 16, head=True)
    rows = contextual_rows({"text_encoder": TextEncoder("text_encoder", tokenizer, model)}, "a dog", None)["text_encoder"]
    with torch.no_grad():
        expected = model.base_model(torch.tensor([tokenizer("a dog").input_ids])).last_hidden_state[0]
    torch.testing.assert_close(rows, expected)
