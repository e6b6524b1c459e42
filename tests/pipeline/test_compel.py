"""Prompt weighting with compel, where the placeholder is one word too, for any number of vectors."""

import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_dti.pipeline.text_encoders import find_text_encoders

compel = pytest.importorskip("compel")
ROOT = Path(__file__).parents[2]
SD, SDXL = (
    compel.ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED,
    compel.ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def weighting(pipe, manager=None, **kwargs):
    """Make a `Compel` for each encoder, as in compel's README."""
    both = [(pipe.tokenizer, pipe.text_encoder)]
    if hasattr(pipe, "text_encoder_2"):
        both.append((pipe.tokenizer_2, pipe.text_encoder_2))
    return [
        compel.Compel(
            tokenizer=tokenizer, text_encoder=encoder, textual_inversion_manager=manager, requires_pooled=i == 1,
            returned_embeddings_type=SDXL if len(both) == 2 else SD, **kwargs,
        )
        for i, (tokenizer, encoder) in enumerate(both)
    ]  # fmt: skip


def weighted(pipe, prompt, **kwargs):
    """Return embeddings, (1, length, d), and the pooled vector of the second encoder, or None without one."""
    first, *second = weighting(pipe, **kwargs)
    embeds, pooled = first(prompt), None
    if second:
        more, pooled = second[0](prompt)
        embeds = torch.cat([embeds, more], dim=-1)
    return embeds, pooled


def encoded(pipe, prompt):
    """Return the same from the pipeline itself."""
    if hasattr(pipe, "text_encoder_2"):
        embeds, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
        return embeds, pooled
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0], None


def by_hand(pipe, words, weights, drop=None):
    """Apply compel's rule to token ids of our own: move away from the empty prompt by each token's weight.

    `words` are in the vocabulary, or are lists of the vectors' own tokens. Positions at `drop` are masked.
    """
    parts = []
    for name in ("", "_2")[: 1 + hasattr(pipe, "text_encoder_2")]:
        tokenizer, encoder = getattr(pipe, f"tokenizer{name}"), getattr(pipe, f"text_encoder{name}")
        ids, scale = [tokenizer.bos_token_id], [1.0]
        for word, weight in zip(words, weights):
            tokens = word if isinstance(word, list) else [f"{word}</w>"]
            ids += tokenizer.convert_tokens_to_ids(tokens)
            scale += [weight] * len(tokens)
        assert tokenizer.unk_token_id not in ids[1:]
        length = tokenizer.model_max_length
        prompt, empty = ([*x, tokenizer.eos_token_id] for x in (ids, ids[:1]))
        prompt, empty = (torch.tensor([x + [tokenizer.pad_token_id] * (length - len(x))]) for x in (prompt, empty))
        mask = torch.ones_like(prompt)
        if drop is not None:
            mask[:, drop] = 0
        states = encoder(prompt, mask, output_hidden_states=True)
        states, none = (
            x.hidden_states[-2] if hasattr(pipe, "text_encoder_2") else x.last_hidden_state
            for x in (states, encoder(empty, output_hidden_states=True))
        )
        scale = torch.tensor(scale + [1.0] * (length - len(scale)))[:, None]
        parts.append(none + (states - none) * scale)
    return torch.cat(parts, dim=-1)


def tokens_of(pipe, concept):
    """Find the concept's own tokens by their rows."""
    rows, table = concept.embeddings["text_encoder"], pipe.text_encoder.get_input_embeddings().weight
    ids = [int((table == row).all(-1).nonzero()) for row in rows]
    return pipe.tokenizer.convert_ids_to_tokens(ids)


@pytest.fixture(params=[1, 3])
def loaded(unet_pipe, concept, request):
    """Make a pipeline with a concept, and return the tokens that replace `<dog>` too."""
    for tokenizer in [e.tokenizer for e in find_text_encoders(unet_pipe).values()]:
        if hasattr(tokenizer, "_wrap_decode_method_backend_tokenizer"):  # copies of CLIP's tokenizer lack the wrapper
            tokenizer._wrap_decode_method_backend_tokenizer()
    made = unet_pipe.load_directional_inversion(concept(unet_pipe, vectors=request.param))
    tokens = tokens_of(unet_pipe, made)
    assert len(tokens) == request.param
    return unet_pipe, tokens


@pytest.mark.parametrize("prompt", ["a <dog> on the beach", "a <dog>, a cat and <dog> near the tower", "a dog"])
def test_without_weights_it_is_the_pipelines_own(loaded, prompt):
    pipe, _ = loaded
    for ours, theirs in zip(weighted(pipe, prompt), encoded(pipe, prompt)):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("syntax, weight", [("<dog>++", 1.1**2), ("(<dog>)1.3", 1.3)])
def test_a_weight_is_for_all_vectors(loaded, syntax, weight):
    pipe, tokens = loaded
    embeds, _ = weighted(pipe, f"a {syntax} on the beach")
    expected = by_hand(pipe, ["a", tokens, "on", "the", "beach"], [1, weight, 1, 1, 1])
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-5)
    assert (embeds - encoded(pipe, "a <dog> on the beach")[0]).abs().max() > 1e-2
    # Compel's manager for stock textual inversions writes the tokens as text again. It is not needed, and does no harm.
    managed, _ = weighted(pipe, f"a {syntax} on the beach", manager=compel.DiffusersTextualInversionManager(pipe))
    assert torch.equal(managed, embeds)


def test_a_weight_below_one_masks_all_vectors(loaded):
    pipe, tokens = loaded
    embeds, _ = weighted(pipe, "a (<dog>)0.7 on the beach")
    words, weights = ["a", tokens, "on", "the", "beach"], [1, 0.7, 1, 1, 1]
    without = by_hand(pipe, words, weights, drop=slice(2, 2 + len(tokens)))
    share = math.tan(0.3 * math.pi / 2)
    expected = (by_hand(pipe, words, weights) + share * without) / (1 + share)
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-5)


def test_the_placeholder_in_groups_and_blends(loaded):
    pipe, tokens = loaded
    embeds, _ = weighted(pipe, "a (red <dog>)1.2 on the beach")
    expected = by_hand(pipe, ["a", "red", tokens, "on", "the", "beach"], [1, 1.2, 1.2, 1, 1, 1])
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-5)
    embeds, _ = weighted(pipe, '("a <dog>", "a cat").blend(0.75, 0.25)')
    expected = 0.75 * encoded(pipe, "a <dog>")[0] + 0.25 * encoded(pipe, "a cat")[0]
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-5)


def test_long_prompts_keep_vectors_together(loaded):
    """Chunks have 24 tokens and end after whole words, although the first has room for one vector more."""
    pipe, tokens = loaded
    words = ["red"] * 21
    embeds, _ = weighted(pipe, f"{' '.join(words)} <dog>++ on the beach", truncate_long_prompts=False)
    chunks = [(words, [1] * 21), ([tokens, "on", "the", "beach"], [1.21, 1, 1, 1])]
    expected = torch.cat([by_hand(pipe, *chunk) for chunk in chunks], dim=1)
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-5)


# from compel 2.2 on, whose releases need Jupyter's notebook or transformers 5
one_call = pytest.mark.skipif(not hasattr(compel, "CompelForSDXL"), reason="this compel has no such class")


@one_call
def test_sdxl_in_one_call(loaded):
    pipe, _ = loaded
    if not hasattr(pipe, "text_encoder_2"):
        made = compel.CompelForSD(pipe)("a <dog>++ on the beach", negative_prompt="blurry")
        assert made.pooled_embeds is None
    else:
        made = compel.CompelForSDXL(pipe)("a <dog>++ on the beach", negative_prompt="blurry")
        torch.testing.assert_close(made.negative_pooled_embeds, encoded(pipe, "blurry")[1], rtol=0, atol=1e-6)
        # Compel does not weight the pooled vector, and reads the signs as text.
        assert torch.equal(made.pooled_embeds, encoded(pipe, "a <dog>++ on the beach")[1])
    torch.testing.assert_close(made.embeds, weighted(pipe, "a <dog>++ on the beach")[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(made.negative_embeds, encoded(pipe, "blurry")[0], rtol=0, atol=1e-6)


@one_call
def test_the_code_of_the_docs(sdxl, concept, tmp_path, monkeypatch):
    block = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "prompts.md").read_text(), re.S)[0]
    monkeypatch.chdir(tmp_path)
    concept(sdxl, vectors=2).save_pretrained("user/dti-dog")
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda name, **kwargs: sdxl)
    monkeypatch.setattr(type(sdxl), "to", lambda self, device: self)
    original, small = type(sdxl).__call__, {"num_inference_steps": 1, "height": 16, "width": 16}
    monkeypatch.setattr(type(sdxl), "__call__", lambda self, **kwargs: original(self, **kwargs | small))
    names: dict = {}
    exec(block, names)
    assert names["image"].size == (16, 16)
    assert torch.equal(names["weighted"].embeds, weighted(sdxl, "a <dog>++ on the beach")[0])
