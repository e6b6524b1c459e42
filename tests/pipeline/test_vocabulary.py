"""Add tokens and rows, and remove them again exactly."""

import copy
import random

import pytest
import torch
from helpers import differing, states
from tiny_pipelines import fresh_copy, generate

from diffusers_dti.pipeline import vocabulary
from diffusers_dti.pipeline.opening import DTYPE_ARGUMENT
from diffusers_dti.pipeline.text_encoders import TextEncoder, find_text_encoders
from diffusers_dti.pipeline.tokenizer import token_names


def test_100_loads_and_unloads_leave_no_trace(pipe, concept):
    for text_encoder in find_text_encoders(pipe).values():
        tokenizer, encoder = text_encoder.tokenizer, text_encoder.model
        tokenizer.add_tokens(["<own>"])  # in some families, a tokenizer's own added tokens are not special
        encoder.resize_token_embeddings(len(tokenizer))
    generate(pipe, "a dog")  # encoders install hooks of their own at their first call
    table = pipe.text_encoder.get_input_embeddings().weight
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
        assert torch.equal(p.text_encoder.get_input_embeddings().weight[id], stock["<stock>"])
    assert sd.tokenizer("a <stock>").input_ids == alone.tokenizer("a <stock>").input_ids
    assert torch.equal(
        sd.text_encoder.get_input_embeddings().weight, alone.text_encoder.get_input_embeddings().weight[: len(sd.tokenizer)]
    )


@pytest.mark.parametrize("seed", range(6))
def test_a_series_of_stock_and_our_loads_and_unloads(sd, concept, tmp_path, seed):
    """Stock unloading renumbers our tokens, too. After each change the rows by name are those of the tokens that remain."""
    from transformers import CLIPTokenizerFast

    sd.tokenizer.save_pretrained(tmp_path)
    # Stock unloading confuses the tokens that remain in a slow tokenizer, also without this package.
    sd.tokenizer = CLIPTokenizerFast.from_pretrained(tmp_path)
    choose, count = random.Random(seed), len(sd.tokenizer)
    sd.text_encoder.resize_token_embeddings(count + seed % 3)  # with spare rows, which stock loading cuts off
    before = states(sd)
    rows, ours, stock = {}, {}, {}  # rows by name; names by placeholder
    kinds = ["load ours", "load stock", "unload ours", "unload stock"]
    for number, kind in enumerate([*kinds[:2], *choose.choices(kinds, k=20)]):
        if kind == "load ours":
            made = concept(sd, f"<o{number}>", choose.choice((1, 1, 2, 3)), seed=number)
            sd.load_directional_inversion(made)
            ours[made.placeholder_token] = token_names(made.placeholder_token, made.num_vectors)
            rows |= zip(ours[made.placeholder_token], made.embeddings["text_encoder"])
        elif kind == "load stock":
            own = torch.randn(choose.choice((1, 2)), 16, generator=torch.Generator().manual_seed(number))
            sd.load_textual_inversion({f"<s{number}>": own})
            stock[f"<s{number}>"] = [f"<s{number}>", f"<s{number}>_1"][: len(own)]
            rows |= zip(stock[f"<s{number}>"], own)
        elif kind == "unload ours" and ours:
            gone = choose.sample(list(ours), choose.randint(1, len(ours)))
            sd.unload_directional_inversion(None if len(gone) == len(ours) else gone)
            ours = {placeholder: names for placeholder, names in ours.items() if placeholder not in gone}
        elif kind == "unload stock" and rows:
            word = choose.choice([*ours, *stock, *stock, None])
            sd.unload_textual_inversion((ours | stock).get(word))
            ours, stock = ({w: n for w, n in own.items() if word not in (w, None)} for own in (ours, stock))
        rows = {name: rows[name] for names in (ours | stock).values() for name in names}
        vocabulary, table = sd.tokenizer.get_vocab(), sd.text_encoder.get_input_embeddings().weight
        assert len(sd.tokenizer) == count + len(rows) and list(sd.directional_inversions) == list(ours), (number, kind)
        for name, row in rows.items():
            assert torch.equal(table[vocabulary[name]], row), (number, kind, name)
        for placeholder, names in ours.items():
            assert sd.tokenizer(placeholder, add_special_tokens=False).input_ids == [vocabulary[name] for name in names]
    sd.unload_directional_inversion()
    if stock:
        sd.unload_textual_inversion()
    kept = ("length", "tokenizer_class", "tokenizer_attributes", "eos")
    now = states(sd)
    assert not [name for name in differing(now, before) if name.endswith(kept)]
    assert now["text_encoder table"][: count * 64] == before["text_encoder table"][: count * 64]
    assert find_text_encoders(sd)["text_encoder"].recorded is None


def test_spare_rows_are_used_and_put_back(sd, concept):
    """A table with more rows than the tokenizer has tokens never shrinks."""
    rows = len(sd.tokenizer) + 2
    sd.text_encoder.resize_token_embeddings(rows)
    with torch.no_grad():
        sd.text_encoder.get_input_embeddings().weight[-2:] = torch.randn(2, 16)
    before = states(sd)
    parameter = sd.text_encoder.get_input_embeddings().weight
    sd.load_directional_inversion(concept(sd, "<a>"))
    assert sd.text_encoder.get_input_embeddings().weight is parameter  # nothing was copied
    sd.load_directional_inversion(concept(sd, "<b>", vectors=2))
    assert len(sd.text_encoder.get_input_embeddings().weight) == rows + 1 == sd.text_encoder.config.vocab_size
    sd.unload_directional_inversion("<a>")
    alone = concept(sd, "<b>", vectors=2).embeddings["text_encoder"]
    assert (
        torch.equal(sd.text_encoder.get_input_embeddings().weight[rows - 2 :], alone)
        and sd.text_encoder.config.vocab_size == rows
    )
    sd.unload_directional_inversion("<b>")
    assert not differing(states(sd), before)


def test_the_table_grows_without_resizing(sdxl, concept, monkeypatch):
    """`resize_token_embeddings` would compute the mean and covariance of the whole vocabulary first."""

    def refuse(*args, **kwargs):
        raise AssertionError("resized")

    for encoder in (sdxl.text_encoder, sdxl.text_encoder_2):
        monkeypatch.setattr(encoder, "resize_token_embeddings", refuse)
    before = [e.get_input_embeddings().weight.detach().clone() for e in (sdxl.text_encoder, sdxl.text_encoder_2)]
    sdxl.load_directional_inversion(concept(sdxl, vectors=2))
    for old, encoder in zip(before, (sdxl.text_encoder, sdxl.text_encoder_2)):
        assert (
            torch.equal(encoder.get_input_embeddings().weight[: len(old)], old)
            and len(encoder.get_input_embeddings().weight) == len(old) + 2
        )


def test_tied_weights_stay_tied(sd, concept):
    encoder = sd.text_encoder
    encoder.extra = torch.nn.Linear(16, len(sd.tokenizer), bias=False)
    encoder.extra.weight = encoder.get_input_embeddings().weight
    encoder.copy = torch.nn.Embedding(len(sd.tokenizer), 16)
    encoder.copy.weight = encoder.extra.weight
    sd.load_directional_inversion(concept(sd))
    assert encoder.extra.weight is encoder.copy.weight is encoder.get_input_embeddings().weight
    assert encoder.extra.out_features == encoder.copy.num_embeddings == len(sd.tokenizer)
    assert len(TextEncoder("text_encoder", sd.tokenizer, encoder).embedding_modules()) == 2


def test_a_taken_placeholder_is_refused(sdxl, concept):
    made = concept(sdxl)
    sdxl.load_directional_inversion(made)
    before = states(sdxl)
    with pytest.raises(
        ValueError, match=r"<dog> is already loaded: replace it with `replace=True`.*unload_directional_inversion\('<dog>'\)"
    ):
        sdxl.load_directional_inversion(made)
    for replace in (False, True):  # words of others are not replaced
        with pytest.raises(ValueError, match=r"dog</w> is in the vocabulary of text_encoder already"):
            sdxl.load_directional_inversion(made, token="dog</w>", replace=replace)
    assert not differing(states(sdxl), before)
    sdxl.load_textual_inversion({"<stock>": torch.ones(16)})
    for replace in (False, True):
        with pytest.raises(ValueError, match=r"<stock> is in the vocabulary.*`unload_textual_inversion` takes it out"):
            sdxl.load_directional_inversion(made, token="<stock>", replace=replace)
    with pytest.raises(ValueError, match="<dog>_1 and <dog> cannot be loaded together"):
        sdxl.load_directional_inversion(made, token="<dog>_1")


def reopened(pipe, folder, **kwargs):
    pipe.save_pretrained(folder)
    return type(pipe).from_pretrained(folder, **kwargs)


def test_reused_concepts_are_unloaded_one_by_one(sd, concept, tmp_path):
    before = states(sd)
    made = [concept(sd), concept(sd, "<b>", vectors=2, seed=3)]
    for x in made:
        sd.load_directional_inversion(x)
    again = reopened(sd, tmp_path)
    rows = len(again.text_encoder.get_input_embeddings().weight)
    for x in made:
        again.load_directional_inversion(x)
        assert len(again.text_encoder.get_input_embeddings().weight) == rows  # nothing was added
        again.unload_directional_inversion(x.placeholder_token)
        rows -= x.num_vectors
        assert (
            rows
            == len(again.text_encoder.get_input_embeddings().weight)
            == len(again.tokenizer)
            == again.text_encoder.config.vocab_size
        )
    assert not [k for k in differing(states(again), before) if "length" in k or "table" in k or "num_embeddings" in k]


def test_reusing_rows_does_not_shrink_a_table_with_spare_rows(sd, concept, tmp_path):
    rows = len(sd.tokenizer) + 2
    sd.text_encoder.resize_token_embeddings(rows)
    made = concept(sd, vectors=2)
    sd.load_directional_inversion(made)
    again = reopened(sd, tmp_path)
    again.load_directional_inversion(made)
    again.unload_directional_inversion()
    assert len(again.text_encoder.get_input_embeddings().weight) == rows == again.text_encoder.config.vocab_size


@pytest.mark.parametrize("how", ["bfloat16", "another scale", "stock"])
def test_rows_are_reused_at_another_precision_and_scale(sd, concept, tmp_path, how):
    made = concept(sd)
    if how == "stock":
        sd.load_textual_inversion({"<dog>": made.embeddings["text_encoder"][0]})
    else:
        sd.load_directional_inversion(made, token_scale="mean" if how == "another scale" else None)
        if how == "bfloat16":
            sd.to(torch.bfloat16)
    again = reopened(sd, tmp_path, **{DTYPE_ARGUMENT: torch.float32})
    again.load_directional_inversion(made)
    row = again.text_encoder.get_input_embeddings().weight[again.tokenizer.convert_tokens_to_ids("<dog>")]
    assert torch.equal(row, made.embeddings["text_encoder"][0])


def test_undoing_a_load_keeps_the_reused_rows(sdxl, concept, tmp_path, monkeypatch):
    made = concept(sdxl)
    sdxl.load_directional_inversion(made)
    again = reopened(sdxl, tmp_path)
    before, set_state, calls = states(again), vocabulary._set_state, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return set_state(*args)

    monkeypatch.setattr(vocabulary, "_set_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        again.load_directional_inversion(made, token_scale=2.0)
    assert not differing(states(again), before)


def test_tokens_without_rows(sd, concept):
    """The tokenizer has more tokens than the table has rows, before loading and after."""
    sd.tokenizer.add_tokens(["<x>", "<y>"])
    before = states(sd)
    sd.load_directional_inversion(concept(sd))
    sd.unload_directional_inversion()
    assert not differing(states(sd), before)
    sd.load_directional_inversion(concept(sd))
    sd.tokenizer.add_tokens(["<z>"])
    sd.unload_directional_inversion()
    sd.tokenizer("a <z>")
    rows = len(sd.text_encoder.get_input_embeddings().weight)
    assert rows == sd.text_encoder.config.vocab_size and [rows] == before["text_encoder num_embeddings"]


def test_another_tokenizer_in_between(sd, concept):
    before, fresh = states(sd), copy.deepcopy(sd.tokenizer)
    sd.load_directional_inversion(concept(sd))
    sd.tokenizer = fresh
    assert TextEncoder("text_encoder", fresh, sd.text_encoder).original_rows().sum() == len(fresh)
    sd.unload_directional_inversion()
    assert not differing(states(sd), before)


def test_two_tokenizers_for_one_encoder_are_refused(sdxl, concept):
    """Both would count on from the same number, and the second concept would take the first one's row."""
    other = fresh_copy(sdxl)  # with tokenizers of its own
    other.text_encoder, other.text_encoder_2 = sdxl.text_encoder, sdxl.text_encoder_2
    sdxl.load_directional_inversion(concept(sdxl, vectors=2))
    before = states(sdxl), states(other)
    with pytest.raises(ValueError, match="^text_encoder has <dog>, loaded through another tokenizer, .* as `from_pipe` does"):
        other.load_directional_inversion(concept(sdxl, "<cat>", seed=1))
    assert not differing(states(sdxl), before[0]) and not differing(states(other), before[1])
    other.tokenizer, other.tokenizer_2 = sdxl.tokenizer, sdxl.tokenizer_2
    other.load_directional_inversion(concept(sdxl, "<cat>", seed=1))
    assert list(sdxl.directional_inversions) == ["<dog>", "<cat>"]


def test_one_tokenizer_for_two_encoders_is_refused(sdxl, concept):
    sdxl.tokenizer_2 = sdxl.tokenizer
    with pytest.raises(ValueError, match=r"share one tokenizer.*deepcopy"):
        sdxl.load_directional_inversion(concept(sdxl))


def test_decoding_works_after_unloading(sd, concept, tmp_path):
    """Transformers 4 wraps the decoder of the fast CLIP tokenizer when the tokenizer is made."""
    from transformers import AutoTokenizer

    sd.tokenizer.save_pretrained(tmp_path)
    sd.tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = sd.tokenizer("a dog on the beach").input_ids
    text = sd.tokenizer.decode(ids)
    sd.load_directional_inversion(concept(sd))
    sd.unload_directional_inversion()
    assert sd.tokenizer.decode(ids) == text
