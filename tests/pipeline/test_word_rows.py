"""The rows of words, alone and inside a prompt, on tokenizers of each kind."""

import pytest
import torch
from tiny_pipelines import clip_encoder, clip_tokenizer, gemma_encoder, gemma_tokenizer, t5_encoder, t5_tokenizer

from diffusers_dti.pipeline.text_encoders import TextEncoder, find_text_encoders
from diffusers_dti.pipeline.word_rows import token_ids_of, word_rows


@pytest.fixture(params=["clip", "gemma", "t5"])
def encoder(request, tmp_path):
    make_tokenizer = {"clip": clip_tokenizer, "gemma": gemma_tokenizer, "t5": t5_tokenizer}[request.param]
    make_model = {"clip": clip_encoder, "gemma": gemma_encoder, "t5": t5_encoder}[request.param]
    tokenizer = make_tokenizer(tmp_path / "t")
    return TextEncoder("text_encoder", tokenizer, make_model(tokenizer, 16))


def test_a_word_has_the_tokens_of_a_prompt(encoder):
    """The ids of a word are those that the tokenizer itself finds in prompts, in the middle and at the end."""
    tokenizer = encoder.tokenizer
    for words in ("dog", "red toy dog"):
        ids = token_ids_of(encoder, words)
        assert len(ids) == len(words.split())
        for prompt in (f"a photo of the {words}", f"the {words} on the beach"):
            found = tokenizer(prompt, add_special_tokens=False).input_ids
            assert any(found[i : i + len(ids)] == ids for i in range(len(found)))
        rows = word_rows({"text_encoder": encoder}, words, None)["text_encoder"]
        assert torch.equal(rows, encoder.weight[ids].detach())


def test_gemmas_word_is_another_row_inside_a_prompt(sana):
    encoder = find_text_encoders(sana)["text_encoder"]
    alone, inside = (sana.tokenizer.convert_tokens_to_ids(t) for t in ("dog", "▁dog"))
    assert token_ids_of(encoder, "dog", in_context=False) == [alone] and token_ids_of(encoder, "dog") == [inside] != [alone]
    # a word without a token of its own: the space before it belongs to the placeholder and is not a vector
    pieces = sana.tokenizer.convert_ids_to_tokens(token_ids_of(encoder, "qq"))
    assert pieces and "▁" not in pieces


@pytest.mark.parametrize("in_context", [False, True])
def test_words_without_tokens_are_refused(encoder, in_context):
    with pytest.raises(ValueError, match="has no known tokens"):
        token_ids_of(encoder, " " if len(encoder.tokenizer(" ", add_special_tokens=False).input_ids) == 0 else "", in_context)
