"""Prompts in a template: the kept prefix is exact, and the model's head is never computed."""

import pytest
import torch
from tiny_modern import qwen3_encoder, qwen_tokenizer
from tiny_pipelines import fresh_copy, gemma_encoder, gemma_tokenizer

from diffusers_dti.families import find_family, templated
from diffusers_dti.families.sana import Sana
from diffusers_dti.families.templated import TemplatedEncoder

SYSTEM = "an old photo of the blue tower near my red robot in a good painting of this wolf: "
PROMPTS = ["a dog on the beach", "a cat", "the dog and a cat in a chef outfit"]


class Templates(Sana):
    """A family that puts prompts into a template."""

    def __init__(self, template, text_length=64):
        self.clean_prompt, self.text_length, self.device = template, text_length, torch.device("cpu")


def in_template(prompt):
    return f"{SYSTEM}{prompt} at the end"


@pytest.fixture(params=["qwen", "gemma"])
def parts(request, tmp_path):
    torch.manual_seed(0)
    if request.param == "qwen":
        tokenizer = qwen_tokenizer(tmp_path / "qwen")
        return tokenizer, qwen3_encoder(tokenizer, 16, head=True)
    tokenizer = gemma_tokenizer(tmp_path / "gemma")
    return tokenizer, gemma_encoder(tokenizer, 16)


@pytest.mark.parametrize("drop", [0, 5, 17])
def test_the_kept_prefix_changes_nothing(parts, drop, monkeypatch):
    """States and gradients are those of the whole text, whether its beginning is dropped or not."""
    tokenizer, model = parts
    table = model.get_input_embeddings().weight
    word = tokenizer("a dog").input_ids[-1]
    calls, results = [], []
    decoder = model.base_model
    decoder.register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    for shortest in (10**6, templated.SHORTEST_PREFIX):
        monkeypatch.setattr(templated, "SHORTEST_PREFIX", shortest)
        encoder = TemplatedEncoder(Templates(in_template), tokenizer, model, layers=(1, -1), drop=drop)
        for _ in range(2):  # the second time from what is kept
            states, mask = encoder(PROMPTS)
        (gradient,) = torch.autograd.grad((states * mask[..., None]).square().sum(), table)
        results.append((states[mask > 0], mask, gradient[word]))
    whole, kept = calls[0], calls[-1]
    assert whole - kept == calls[2] >= 16 and calls == [whole, whole, calls[2], kept, kept]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert gradient[word].norm() > 0


def test_other_beginnings_are_encoded_whole(parts):
    """A prompt that the tokenizer joins to the template's end cannot use the prefix."""
    tokenizer, model = parts
    start = SYSTEM.strip()
    family = Templates(lambda prompt: start[:12] if prompt == "cut" else start + prompt)
    inputs = tokenizer([f"{start}a dog"], return_tensors="pt")
    with torch.no_grad():
        states, mask = TemplatedEncoder(family, tokenizer, model)(["cut", "a dog"])
        expected = model(**inputs, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(states[1][mask[1] > 0], expected[0], rtol=1e-4, atol=1e-5)


def test_the_head_is_never_computed(tmp_path):
    tokenizer = qwen_tokenizer(tmp_path / "qwen")
    model = qwen3_encoder(tokenizer, 16, head=True)
    model.lm_head.register_forward_hook(lambda *args: pytest.fail("the head is computed"))
    with pytest.raises(pytest.fail.Exception):
        model(torch.tensor([[1]]))
    TemplatedEncoder(Templates(in_template), tokenizer, model)(PROMPTS)


def test_padding_and_truncation(tmp_path):
    """To a fixed length, the states of padding are the model's own too; longer texts are cut."""
    tokenizer = qwen_tokenizer(tmp_path / "qwen")
    model = qwen3_encoder(tokenizer, 16)
    states, mask = TemplatedEncoder(Templates(str, 12), tokenizer, model, padded=True)(["a dog", "a dog " * 20])
    inputs = tokenizer(["a dog", "a dog " * 20], padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    expected = model(**inputs, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    assert mask.sum(-1).tolist() == [2, 12]


def test_a_template_that_leaves_no_place_for_the_prompt(modern):
    pipe = fresh_copy(modern("lumina2"))
    pipe.system_prompt = "a dog " * 200
    with pytest.raises(ValueError, match="Lumina 2 reads 256 tokens of a text.*shorten the pipeline's system prompt"):
        find_family(pipe).encode_prompts(["a dog"], [0])
