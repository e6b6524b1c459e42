"""Placeholders and what pipelines do to prompts before they tokenize them."""

import diffusers
import pytest
import torch
from helpers import differing, states
from tiny_pipelines import generate

from diffusers_dti.pipeline import prompt_check


def test_upper_case_is_refused_where_prompts_are_lower_cased(sana, wan, concept, photos):
    """SANA lower-cases prompts, so `<Dog>` would never match. Wan does not, and there `<Dog>` is not `<dog>`."""
    from diffusers_dti import DTITrainer

    before = states(sana)
    message = "SanaPipeline lower-cases prompts, so <Dog> would never match: use <dog>"
    with pytest.raises(ValueError, match=message):
        sana.load_directional_inversion(concept(sana, "<Dog>"))
    with pytest.raises(ValueError, match=message):
        DTITrainer(sana, placeholder_token="<Dog>", initializer_token="dog", resolution=32).fit(photos)
    assert not differing(states(sana), before)
    sana.load_directional_inversion(concept(sana, "<Dog>"), token="<dog>")
    assert torch.equal(generate(sana, "A <DOG> on the beach"), generate(sana, "a <dog> on the beach"))
    for vectors in (1, 3):
        wan.load_directional_inversion(concept(wan, "<Dog>", vectors))
        upper, lower = generate(wan, "a <Dog> on the beach"), generate(wan, "a <dog> on the beach")
        assert not torch.equal(upper, lower)
        wan.unload_directional_inversion()
        assert torch.equal(generate(wan, "a <dog> on the beach"), lower) and not torch.equal(generate(wan, "a <Dog>"), upper)


@pytest.mark.parametrize("word", ["“dog”", "＜dog＞", "<my  dog>", "<a&amp;b>", "<cafe\u0301>"])
def test_placeholders_that_cleaning_changes_are_refused(wan, concept, photos, word):
    """Wan's pipelines clean quotes, spaces, entities and accents before they tokenize a prompt."""
    from diffusers_dti import DTITrainer

    before = states(wan)
    with pytest.raises(ValueError, match="cleans prompts before tokenizing them, which would remove .*plain letters"):
        wan.load_directional_inversion(concept(wan), token=word)
    with pytest.raises(ValueError, match="cleans prompts"):
        DTITrainer(wan, placeholder_token=word, initializer_token="dog", resolution=32).fit(photos)
    assert not differing(states(wan), before)


def test_placeholders_survive_caption_cleaning_or_a_warning_says_so(sana, concept, caplog, tmp_path):
    """`clean_caption=True` removes `<dog>` as HTML, but keeps a name of letters. If it is the default, a warning says so."""
    from tiny_pipelines import t5_encoder, t5_tokenizer

    for word, vectors in (("<dog>", 1), ("<rex>", 3), ("mydog", 1), ("myrex", 3)):
        sana.load_directional_inversion(concept(sana, word, vectors))
    for word in ("<dog>", "<rex>", "mydog", "myrex"):
        kept = generate(sana, f"a {word} on the beach", clean_caption=True)
        same = torch.equal(kept, generate(sana, "a on the beach", clean_caption=True))
        assert same == word.startswith("<")
        assert not torch.equal(generate(sana, f"a {word} on the beach"), generate(sana, "a on the beach"))
    tokenizer = t5_tokenizer(tmp_path / "t")
    pixart = diffusers.PixArtSigmaPipeline(tokenizer, t5_encoder(tokenizer, 16), None, None, diffusers.DDIMScheduler())
    pixart.load_directional_inversion(concept(pixart, "mydog"))
    assert not caplog.text
    pixart.load_directional_inversion(concept(pixart))
    assert "PixArtSigmaPipeline removes <dog> from prompts unless it is called with clean_caption=False" in caplog.text


@pytest.mark.parametrize("vectors", [1, 3])
def test_prompts_that_ftfy_cleans(wan, concept, vectors):
    """Wan's pipeline cleans text before it tokenizes it. The placeholder and its vectors survive."""
    wan.load_directional_inversion(concept(wan, "<dog>", vectors))
    plain = generate(wan, "a <dog> on the beach & a cat")
    assert torch.equal(generate(wan, "  a <dog>\n on the   beach &amp; a cat "), plain)
    assert not torch.equal(generate(wan, "a dog on the beach & a cat"), plain)


@pytest.mark.parametrize(("word", "warned"), [("dog", True), ("Dog", True), ("<dog>", False), ("dogcat", False)])
def test_an_ordinary_word_as_a_placeholder_is_warned_about(sdxl, concept, photos, monkeypatch, word, warned):
    """In loading and in training. The word itself could no longer be written."""
    from diffusers_dti import DTITrainer

    said = []
    monkeypatch.setattr(prompt_check.logger, "warning", said.append)
    expected = [
        f"{word} is an ordinary word of the vocabulary, and means the concept while that is loaded: to keep the "
        f"word, choose another placeholder, such as <{word}>."
    ]
    sdxl.load_directional_inversion(concept(sdxl, word))
    assert said == expected * warned
    sdxl.unload_directional_inversion()
    settings = {"placeholder_token": word, "initializer_token": "cat", "resolution": 16, "max_train_steps": 1}
    DTITrainer(sdxl, **settings).fit(photos)
    assert said == expected * warned * 2


def test_an_ordinary_word_of_sentencepiece_is_warned_about(wan, concept, monkeypatch):
    """T5's vocabulary has it with a space before it. Gemma's has both, and then the word is refused as taken."""
    said = []
    monkeypatch.setattr(prompt_check.logger, "warning", said.append)
    wan.load_directional_inversion([concept(wan, "zzz"), concept(wan, "<dog>")])
    assert not said
    wan.load_directional_inversion(concept(wan, "dog"))
    assert len(said) == 1 and said[0].startswith("dog is an ordinary word")


def test_a_concept_that_a_reopened_pipeline_has_is_not_an_ordinary_word(sd, concept, tmp_path, monkeypatch):
    made = concept(sd, "zog")
    sd.load_directional_inversion(made)
    sd.save_pretrained(tmp_path)
    again, said = type(sd).from_pretrained(tmp_path), []
    monkeypatch.setattr(prompt_check.logger, "warning", said.append)
    again.load_directional_inversion(made)
    assert not said
