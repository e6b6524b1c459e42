"""`initializer_token="auto"`: words ranked by the denoiser's loss on the photos."""

import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import differing, everything, same, states
from PIL import Image
from tiny_pipelines import WORDS

from diffusers_dti import DTIConfig, DTITrainer
from diffusers_dti.data.images import load_photos
from diffusers_dti.pipeline.text_encoders import find_text_encoders
from diffusers_dti.training import propose
from diffusers_dti.training.propose import NOUNS, candidate_words, propose_initializers

SETTINGS = {"placeholder_token": "<x>", "resolution": 32, "train_batch_size": 2, "max_train_steps": 2}
CANDIDATES = ["dog", "cat", "toy", "tower", "zogory"]


def sample(batch, i):
    """Return one sample of a batch as a batch."""
    tensors = {k: getattr(batch, k)[i : i + 1] for k in ("latents", "noise", "timesteps")}
    weights = None if batch.weights is None else batch.weights[i : i + 1]
    lists = {k: getattr(batch, k)[i : i + 1] for k in ("prompts", "original_sizes", "crop_corners", "zero_pads")}
    return replace(batch, weights=weights, **tensors, **lists)


@pytest.mark.parametrize("name", ["sdxl", "sd", "sana", "sprint", "wan", "wan22"])
def test_the_ranking_is_that_of_single_losses(name, request, photos, monkeypatch):
    """Every word on the same 16 draws, each with `Family.loss` of that sample alone."""
    pipe = request.getfixturevalue(name)
    trainer = DTITrainer(pipe, **SETTINGS)
    family, batches = trainer.family, []
    original = family.sample_losses
    monkeypatch.setattr(family, "sample_losses", lambda batch, c: batches.append(batch) or original(batch, c))
    mask = Image.new("L", photos[0].size)
    mask.paste(255, (0, 0, 8, 16))
    ranked = propose_initializers(family, trainer.config, load_photos(photos, None, [mask, None, None]), CANDIDATES)
    draws, losses = {word: [] for word in CANDIDATES}, {word: [] for word in CANDIDATES}
    for batch in batches:
        assert len(batch.prompts) <= 2 * SETTINGS["train_batch_size"]
        for i, prompt in enumerate(batch.prompts):
            single, word = sample(batch, i), prompt.removeprefix("a photo of a ")
            draws[word].append((single.latents, single.noise, single.weights, single.timesteps, *single.original_sizes))
            with torch.no_grad():
                losses[word].append(family.loss(single, family.encode_prompts([f"a photo of a {word}"], [0])).item())
    assert all(same(draws[word], draws["dog"]) for word in CANDIDATES)
    assert sorted(t.item() for _, _, _, t, _ in draws["dog"]) == [int((i + 0.5) / 16 * 1000) for i in range(16)]
    # Each of the 3 photos comes 5 or 6 times; two of them have the same size.
    assert sorted(Counter(size for *_, size in draws["dog"]).values()) in ([5, 11], [6, 10])
    assert len({noise.sum().item() for _, noise, *_ in draws["dog"]}) == 16
    assert any(weights is not None for _, _, weights, *_ in draws["dog"])
    means = {word: sum(own) / 16 for word, own in losses.items()}
    assert [word for word, _ in ranked] == sorted(CANDIDATES, key=means.get) and len(set(means.values())) > 1
    for word, loss in ranked:
        assert loss == pytest.approx(means[word], rel=1e-6)


def test_bars_for_the_encoding_and_the_ranking(sdxl, photos, capsys):
    trainer = DTITrainer(sdxl, **SETTINGS)
    propose_initializers(trainer.family, trainer.config, load_photos(photos), CANDIDATES)
    shown = capsys.readouterr()
    assert not shown.out and "Encoding photos:   0%|          | 0/3" in shown.err and "Ranking 5 initializers:" in shown.err


def test_each_round_keeps_the_best_quarter(sdxl, photos, monkeypatch):
    """Against the same rounds written out, on planted losses by word and draw."""
    words = [f"w{i:03}" for i in range(100)]
    planted = torch.rand(len(words), 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    trainer, draws, asked = DTITrainer(sdxl, **SETTINGS), [], Counter()

    def sample_losses(batch, conditioning):
        noise = batch.noise[0].sum().item()
        if noise not in draws:
            draws.append(noise)
        numbers = [int(prompt[-3:]) for prompt in batch.prompts]
        asked.update(numbers)
        return planted[numbers, draws.index(noise)]

    monkeypatch.setattr(trainer.family, "sample_losses", sample_losses)
    monkeypatch.setattr(trainer.family, "encode_prompts", lambda *args: {})
    ranked = propose_initializers(trainer.family, trainer.config, load_photos(photos), words)
    remaining = range(100)
    for count, kept in ((2, 25), (8, 8), (16, 8)):
        remaining = sorted(remaining, key=lambda i: planted[i, :count].sum())[:kept]
    assert [word for word, _ in ranked] == [words[i] for i in remaining]
    assert [loss for _, loss in ranked] == pytest.approx([planted[i].mean().item() for i in remaining])
    assert Counter(asked.values()) == {2: 75, 8: 17, 16: 8}


def test_a_loss_that_is_not_a_number_never_wins(sdxl, photos, monkeypatch):
    trainer = DTITrainer(sdxl, **SETTINGS)
    monkeypatch.setattr(
        trainer.family, "sample_losses", lambda batch, c: torch.tensor([math.nan if "dog" in p else 1 for p in batch.prompts])
    )
    ranked = propose_initializers(trainer.family, trainer.config, load_photos(photos), CANDIDATES)
    assert [word for word, _ in ranked] == [*CANDIDATES[1:], "dog"]  # equals in the order given


def test_ranking_changes_nothing_and_repeats(pipe, photos):
    trainer = DTITrainer(pipe, **SETTINGS)
    trainer.family.encode_prompts(["a dog"], [0])  # transformers' own hooks come with the first call
    pipe.text_encoder.train()
    pipe.vae.eval()
    before, random = states(pipe), torch.get_rng_state()
    weights = {n: p.clone() for n, p in trainer.family.present_denoisers().popitem()[1].state_dict().items()}
    first = propose_initializers(trainer.family, trainer.config, load_photos(photos), WORDS[-12:])
    assert propose_initializers(trainer.family, trainer.config, load_photos(photos), WORDS[-12:]) == first
    other_seed = replace(trainer.config, seed=1)
    assert propose_initializers(trainer.family, other_seed, load_photos(photos), WORDS[-12:]) != first
    assert not differing(before, states(pipe)) and torch.equal(random, torch.get_rng_state())
    assert pipe.text_encoder.training and not pipe.vae.training
    assert same(weights, dict(trainer.family.present_denoisers().popitem()[1].state_dict()))


def test_candidates_are_whole_words_of_every_encoder(pipe, concept):
    pipe.load_directional_inversion(concept(pipe, "newword"))
    encoders = find_text_encoders(pipe)
    words = candidate_words(encoders)
    assert words == sorted(set(words)) and "newword" not in words
    assert all(re.fullmatch("[a-z]{3,}", word) for word in words)
    for word in {*WORDS, *words}:
        added = set()
        for encoder in encoders.values():
            length = len(encoder.tokenizer("a photo of a").input_ids)
            added.add(len(encoder.tokenizer(f"a photo of a {word}").input_ids) - length)
        assert (word in words) == (added == {1} and len(word) > 2)


def test_of_a_large_vocabulary_only_nouns(pipe, monkeypatch):
    monkeypatch.setattr(propose, "MAX_WORDS", 20)
    nouns = candidate_words(find_text_encoders(pipe))
    assert {"cat", "chef", "dog", "teapot", "tower", "toy"} <= set(nouns) <= set(NOUNS.read_text().split())
    assert not {"and", "near", "red", "sharp"} & set(nouns)


def test_the_nouns():
    nouns = NOUNS.read_text().split("\n")
    assert nouns.pop() == "" and nouns == sorted(set(nouns)) and 300 <= len(nouns) <= 400
    assert all(re.fullmatch("[a-z]{3,}", noun) for noun in nouns)


def test_a_vocabulary_without_words(sdxl, photos, monkeypatch, tmp_path):
    (tmp_path / "nouns.txt").write_text("tower\ntwoer\n")
    monkeypatch.setattr(propose, "MAX_WORDS", 5)
    monkeypatch.setattr(propose, "NOUNS", tmp_path / "nouns.txt")
    assert candidate_words(find_text_encoders(sdxl)) == ["tower"]
    (tmp_path / "nouns.txt").write_text("twoer\n")
    before = states(sdxl)
    with pytest.raises(ValueError, match='no words for initializer_token="auto"'):
        DTITrainer(sdxl, **SETTINGS, initializer_token="auto").fit(photos)
    assert not differing(before, states(sdxl))


def plant(monkeypatch, *best):
    """Make the ranking find these words, one in each call, and return the photos that it was called with."""
    calls = []

    def planted(family, config, photos):
        calls.append(photos)
        return [(best[len(calls) - 1], 0.25), ("tower", 0.5)]

    monkeypatch.setattr(propose, "propose_initializers", planted)
    return calls


def test_a_run_is_that_of_the_chosen_word(pipe, photos, caplog):
    trainer = DTITrainer(pipe, **SETTINGS, initializer_token="auto")
    ranked = propose_initializers(trainer.family, trainer.config, load_photos(photos))
    learned = trainer.fit(photos)
    word = ranked[0][0]
    assert trainer.config.initializer_token == word and type(trainer.config) is type(DTITrainer(pipe).config)
    assert learned.metadata["initializer"] == learned.metadata["training"]["initializer_token"] == word
    for other, loss in ranked[:5]:
        assert other in caplog.text and f"{loss:.5f}" in caplog.text
    pipe.unload_directional_inversion()
    given = DTITrainer(pipe, **SETTINGS, initializer_token=word).fit(photos)
    assert given.metadata == learned.metadata
    assert all(torch.equal(rows, learned.embeddings[c]) for c, rows in given.embeddings.items())


def test_fit_leaves_the_rest_as_it_was(sdxl, photos):
    trainer = DTITrainer(sdxl, **SETTINGS, initializer_token="auto")
    sdxl.encode_prompt("a dog")  # transformers' own hooks come with the first call
    before, vocabularies = everything(sdxl), states(sdxl)
    trainer.fit(photos)
    assert same(before, everything(sdxl))
    sdxl.unload_directional_inversion()
    assert not differing(vocabularies, states(sdxl))


def test_every_concept_has_its_own_word(sdxl, photos, monkeypatch):
    calls = plant(monkeypatch, "cat", "dog", "wolf")
    settings = SETTINGS | {"placeholder_token": None}
    trainer = DTITrainer(sdxl, **settings, initializer_token={"<a>": "auto", "<b>": "toy"})
    learned = trainer.fit({"<a>": photos[:1], "<b>": photos[1:]})
    assert trainer.config.initializer_token == {"<a>": "cat", "<b>": "toy"} and [len(own) for own in calls] == [1]
    assert {word: c.metadata["initializer"] for word, c in learned.items()} == {"<a>": "cat", "<b>": "toy"}
    trainer = DTITrainer(sdxl, **settings, initializer_token="auto")
    trainer.fit({"<c>": photos[:1], "<d>": photos[1:]})
    assert trainer.config.initializer_token == {"<c>": "dog", "<d>": "wolf"} and [len(own) for own in calls] == [1, 1, 2]


def test_a_resumed_run_keeps_its_word(sdxl, photos, tmp_path, monkeypatch):
    calls = plant(monkeypatch, "toy", "toy")
    auto = SETTINGS | {"initializer_token": "auto", "max_train_steps": 4, "lr_scheduler": "constant"}
    whole = DTITrainer(sdxl, **auto).fit(photos)
    sdxl.unload_directional_inversion()
    running = auto | {"output_dir": tmp_path, "checkpointing_steps": 2, "resume_from_checkpoint": "latest"}
    DTITrainer(sdxl, **running | {"max_train_steps": 2}).fit(photos)  # there is nothing to resume from yet
    sdxl.unload_directional_inversion()
    trainer = DTITrainer(sdxl, **running)
    again = trainer.fit(photos)
    assert len(calls) == 2 and trainer.config.initializer_token == "toy" and trainer.history[-1]["step"] == 4
    assert all(torch.equal(rows, again.embeddings[c]) for c, rows in whole.embeddings.items())


def test_all_processes_take_the_word_of_the_first(sdxl, photos, monkeypatch):
    plant(monkeypatch, "toy")
    monkeypatch.setattr(propose, "broadcast", lambda words: words.__setitem__(0, "cat"))
    trainer = DTITrainer(sdxl, **SETTINGS, initializer_token="auto")
    assert trainer.fit(photos).metadata["initializer"] == trainer.config.initializer_token == "cat"


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_autocast_is_that_of_training(sdxl, photos, monkeypatch, precision):
    trainer, seen = DTITrainer(sdxl, **SETTINGS, mixed_precision=precision), set()
    predict = trainer.family.predict

    def spy(*args):
        seen.add(torch.is_autocast_enabled("cpu"))
        return predict(*args)

    monkeypatch.setattr(trainer.family, "predict", spy)
    propose_initializers(trainer.family, trainer.config, load_photos(photos), ["dog"])
    assert seen == {precision == "bf16"}


@pytest.mark.parametrize("given", ["auto", {"<a>": "dog", "<b>": "auto"}])
def test_a_style_has_no_noun(given):
    with pytest.raises(ValueError, match="looks for a noun, and a style has none"):
        DTIConfig(initializer_token=given, learnable_property="style")
    assert DTIConfig(initializer_token=given).initializer_token == given
