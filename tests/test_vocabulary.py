"""Tokens and rows in and out again, exactly."""

import copy
import json

import pytest
import torch
from conftest import generate

from diffusers_dti import DirectionalInversion, vocabulary
from diffusers_dti.loading import text_pairs


def state(tokenizer, encoder):
    """All that unloading must put back, comparable."""
    if hasattr(tokenizer, "_tokenizer"):
        tokens = json.loads(tokenizer._tokenizer.to_str())
        tokens.pop("padding"), tokens.pop("truncation")  # every call sets them
    else:
        tokens = {
            "decoder": {i: repr(t) for i, t in tokenizer._added_tokens_decoder.items()},
            "encoder": dict(tokenizer._added_tokens_encoder),
            "trie": copy.deepcopy(tokenizer.tokens_trie.data),
            "total": tokenizer.total_vocab_size,
        }
    weight = vocabulary.table(encoder)
    return {
        "tokens": tokens,
        "tokenizer_class": type(tokenizer),
        "tokenizer_attributes": sorted(vars(tokenizer)),
        "length": len(tokenizer),
        "table": weight.detach().view(torch.uint8).numpy().tobytes(),
        "modules": [(n, type(m)) for n, m in encoder.named_modules()],
        "parameters": [(n, tuple(p.shape), p.requires_grad, p.dtype) for n, p in encoder.named_parameters()],
        "ties": len(vocabulary.embedding_modules(encoder)),
        "num_embeddings": encoder.get_input_embeddings().num_embeddings,
        "config": encoder.config.to_dict(),
        "eos": [getattr(m, "eos_token_id", None) for m in encoder.modules()],
        "attributes": sorted(vars(encoder)),
    }


def states(pipe):
    return {f"{c} {k}": v for c, pair in text_pairs(pipe).items() for k, v in state(*pair).items()}


def differing(a, b):
    """The names of what differs: the values are long."""
    return [k for k in a | b if a.get(k) != b.get(k)]


def test_100_loads_and_unloads_leave_no_trace(pipe, concept):
    for tokenizer, encoder in text_pairs(pipe).values():
        tokenizer.add_tokens(["<own>"])  # T18: a tokenizer's own tokens are not special in all families
        encoder.resize_token_embeddings(len(tokenizer))
    generate(pipe, "a dog")  # hooks that encoders install at their first call are not ours
    table = vocabulary.table(pipe.text_encoder)
    table.requires_grad_(False)
    before = states(pipe)
    for i in range(100):
        word = f"<dog{i}>"
        pipe.load_directional_inversion(concept(pipe, word, vectors=1 + i % 3, seed=i))
        assert states(pipe) != before
        pipe.unload_directional_inversion(word)
        assert not differing(states(pipe), before)


@pytest.mark.parametrize("first_out", ["<a>", "<b>", "<c>"])
def test_unloading_one_is_as_if_only_the_others_had_been_loaded(pipe, concept, first_out):
    words = {"<a>": 1, "<b>": 3, "<c>": 1}
    others = copy.deepcopy(pipe)
    for word, vectors in words.items():
        made = concept(pipe, word, vectors, seed=vectors, pooling="legacy" if word == "<c>" else "eos")
        pipe.load_directional_inversion(made)
        if word != first_out:
            others.load_directional_inversion(made)
    pipe.unload_directional_inversion(first_out)
    assert not differing(states(pipe), states(others))
    assert list(pipe.directional_inversions) == list(others.directional_inversions)
    text = "the <a> and <b> with a <c>"
    assert pipe.tokenizer(text).input_ids == others.tokenizer(text).input_ids
    torch.testing.assert_close(generate(pipe, text), generate(others, text), rtol=0, atol=0)


def test_a_stock_token_loaded_between_keeps_its_row(sd, concept):
    stock = {"<stock>": torch.full((16,), 0.1)}
    alone = copy.deepcopy(sd)
    alone.load_textual_inversion(stock)
    sd.load_directional_inversion(concept(sd, "<a>"))
    sd.load_textual_inversion(stock)
    sd.load_directional_inversion(concept(sd, "<b>", vectors=2))
    sd.unload_directional_inversion()
    for p in (sd, alone):
        id = p.tokenizer.convert_tokens_to_ids("<stock>")
        assert torch.equal(vocabulary.table(p.text_encoder)[id], stock["<stock>"])
    assert sd.tokenizer("a <stock>").input_ids == alone.tokenizer("a <stock>").input_ids
    assert torch.equal(vocabulary.table(sd.text_encoder), vocabulary.table(alone.text_encoder)[: len(sd.tokenizer)])


def test_spare_rows_are_used_and_put_back(sd, concept):
    """T4, T23: a table with more rows than the tokenizer has tokens never shrinks."""
    rows = len(sd.tokenizer) + 2
    sd.text_encoder.resize_token_embeddings(rows)
    with torch.no_grad():
        vocabulary.table(sd.text_encoder)[-2:] = torch.randn(2, 16)
    before = states(sd)
    parameter = vocabulary.table(sd.text_encoder)
    sd.load_directional_inversion(concept(sd, "<a>"))
    assert vocabulary.table(sd.text_encoder) is parameter  # nothing was copied
    sd.load_directional_inversion(concept(sd, "<b>", vectors=2))
    assert len(vocabulary.table(sd.text_encoder)) == rows + 1 == sd.text_encoder.config.vocab_size
    sd.unload_directional_inversion("<a>")
    alone = concept(sd, "<b>", vectors=2).embeddings["text_encoder"]
    assert torch.equal(vocabulary.table(sd.text_encoder)[rows - 2 :], alone) and sd.text_encoder.config.vocab_size == rows
    sd.unload_directional_inversion("<b>")
    assert not differing(states(sd), before)


def test_the_scale_is_over_the_original_vocabulary(pipe, concept):
    """T21: neither our rows nor a stock token's count, nor rows of norm 0."""
    for _, (tokenizer, encoder) in text_pairs(pipe).items():
        norms = vocabulary.table(encoder).detach().double().norm(dim=-1)
        expected = {r: getattr(norms[norms > 0], r)().item() for r in ("mean", "min", "max")}
        for word in ("<a>", "<b>"):
            pipe.load_directional_inversion(concept(pipe, word, scale=20.0, vectors=2))
        pipe.load_textual_inversion(
            {"<stock>": torch.full((encoder.config.hidden_size,), 9.0)}, tokenizer=tokenizer, text_encoder=encoder
        )
        for rule, value in expected.items():
            assert vocabulary.norm_statistic(tokenizer, encoder, rule) == pytest.approx(value, rel=1e-6)
        pipe.unload_directional_inversion()
    with pytest.raises(ValueError, match='must be "mean"'):
        vocabulary.norm_statistic(tokenizer, encoder, "median")


def test_the_table_grows_without_resizing(sdxl, concept, monkeypatch):
    """T5: `resize_token_embeddings` computes a mean and a covariance of the whole vocabulary first."""

    def refuse(*args, **kwargs):
        raise AssertionError("resized")

    for encoder in (sdxl.text_encoder, sdxl.text_encoder_2):
        monkeypatch.setattr(encoder, "resize_token_embeddings", refuse)
    before = [vocabulary.table(e).detach().clone() for e in (sdxl.text_encoder, sdxl.text_encoder_2)]
    sdxl.load_directional_inversion(concept(sdxl, vectors=2))
    for old, encoder in zip(before, (sdxl.text_encoder, sdxl.text_encoder_2)):
        assert torch.equal(vocabulary.table(encoder)[: len(old)], old) and len(vocabulary.table(encoder)) == len(old) + 2


def test_tied_weights_stay_tied(sd, concept):
    encoder = sd.text_encoder
    encoder.extra = torch.nn.Linear(16, len(sd.tokenizer), bias=False)
    encoder.extra.weight = encoder.get_input_embeddings().weight
    encoder.copy = torch.nn.Embedding(len(sd.tokenizer), 16)
    encoder.copy.weight = encoder.extra.weight
    sd.load_directional_inversion(concept(sd))
    assert encoder.extra.weight is encoder.copy.weight is encoder.get_input_embeddings().weight
    assert encoder.extra.out_features == encoder.copy.num_embeddings == len(sd.tokenizer)
    assert len(vocabulary.embedding_modules(encoder)) == 2


def test_a_taken_placeholder_is_refused_and_the_same_rows_are_adopted(sdxl, concept):
    made = concept(sdxl)
    sdxl.load_directional_inversion(made)
    before = states(sdxl)
    with pytest.raises(ValueError, match=r"<dog> is in the vocabulary.*already"):
        sdxl.load_directional_inversion(made)
    with pytest.raises(ValueError, match=r"dog</w>|dog is in the vocabulary"):
        sdxl.load_directional_inversion(made, token="dog</w>")
    assert not differing(states(sdxl), before)


def test_another_width_is_refused(sdxl, sd, concept):
    other = concept(sdxl, base_model="user/other")
    swapped = DirectionalInversion.from_embeddings(
        "<dog>", {"text_encoder": other.embeddings["text_encoder_2"]}, other.metadata
    )
    before = states(sd)
    with pytest.raises(ValueError, match="24 wide for text_encoder, whose embeddings are 16 wide.*user/other"):
        sd.load_directional_inversion(swapped)
    assert not differing(states(sd), before)
