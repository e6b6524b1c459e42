"""Several starts: which ones there are, and that the best one trains as if it had been the only one."""

import pytest
import torch

from diffusers_dti import DTITrainer
from diffusers_dti.pipeline.text_encoders import find_text_encoders
from diffusers_dti.training import starts as module
from diffusers_dti.training.starts import possible_starts

SETTINGS = {"placeholder_token": "<dog>", "resolution": 32, "train_batch_size": 1, "max_train_steps": 6, "learning_rate": 0.1}


def names_of(trainer):
    found = []
    for start in possible_starts(trainer.family, trainer.config, "<dog>"):
        training = start.metadata["training"]
        found.append((training["initializer_token"], training["initializer_context"]))
    return found


@pytest.fixture
def losses(monkeypatch):
    """The held-out losses of the starts that are tried; they can be planted."""
    found, planted = [], []

    class Watched(module.Stepper):
        def heldout_loss(self, concept):
            loss = super().heldout_loss(concept)
            training = concept.initial.metadata["training"]
            found.append(((training["initializer_token"], training["initializer_context"]), loss.item()))
            return torch.tensor(planted.pop(0)) if planted else loss

    monkeypatch.setattr(module, "Stepper", Watched)
    return found, planted


def test_the_word_in_a_prompt_and_alone_where_they_differ(pipe):
    one = DTITrainer(pipe, **SETTINGS, initializer_token="dog")
    assert names_of(one) == [("dog", True)]
    two = DTITrainer(pipe, **SETTINGS, initializer_token="dog", num_starts=3)
    differ = False  # whether an encoder has two rows for the word
    for encoder in find_text_encoders(pipe).values():
        alone, inside = (encoder.tokenizer(text, add_special_tokens=False).input_ids for text in ("dog", "a dog"))
        differ |= inside[-len(alone) :] != alone
    assert names_of(two) == [("dog", True), ("dog", False)][: 2 if differ else 1]
    assert differ == (type(pipe).__name__ == "SanaPipeline")


def test_all_that_are_given_are_tried(sana):
    trainer = DTITrainer(sana, **SETTINGS, initializer_token=["dog", "cat"])
    assert names_of(trainer) == [("dog", True), ("cat", True)]
    more = DTITrainer(sana, **SETTINGS, initializer_token=["dog", "cat"], num_starts=3)
    assert names_of(more) == [("dog", True), ("cat", True), ("dog", False)]
    alone = DTITrainer(sana, **SETTINGS, initializer_token={"<dog>": ["dog", "cat"]}, initializer_context=False)
    assert names_of(alone) == [("dog", False), ("cat", False)]


def test_the_start_of_the_lowest_loss_is_taken_and_trained_anew(sana, photos, losses):
    _, planted = losses
    settings = SETTINGS | {"initializer_token": ["dog", "cat"], "num_starts": 3}
    for best, (word, in_context) in enumerate([("dog", True), ("cat", True), ("dog", False)]):
        planted[:] = [float(i != best) for i in range(3)]
        learned = DTITrainer(sana, **settings).fit(photos)
        sana.unload_directional_inversion()
        only = DTITrainer(sana, **SETTINGS, initializer_token=word, initializer_context=in_context).fit(photos)
        sana.unload_directional_inversion()
        assert torch.equal(learned.embeddings["text_encoder"], only.embeddings["text_encoder"])
        assert learned.metadata["initializer"] == word
        assert learned.metadata["training"]["initializer_context"] == in_context


def test_one_bar_counts_the_steps_of_all_trials(sana, photos, monkeypatch, capsys):
    monkeypatch.setattr(module, "TRIAL_STEPS", 2)
    DTITrainer(sana, **SETTINGS, initializer_token=["dog", "cat"]).fit(photos)
    assert "Trying starts:   0%|          | 0/4" in capsys.readouterr().err


def test_what_is_compared_is_the_held_out_loss_after_the_trial(sana, photos, losses, monkeypatch):
    monkeypatch.setattr(module, "TRIAL_STEPS", 4)
    found, _ = losses
    settings = SETTINGS | {"initializer_token": ["dog", "cat"]}
    DTITrainer(sana, **settings).fit(photos)
    sana.unload_directional_inversion()
    for (word, _), loss in found:
        trainer = DTITrainer(sana, **SETTINGS | {"initializer_token": word, "heldout_loss_steps": 4})
        trainer.fit(photos)
        sana.unload_directional_inversion()
        assert trainer.history[0]["step"] == 4 and trainer.history[0]["heldout_loss"] == pytest.approx(loss)


def test_a_resumed_run_has_the_start_that_it_had_and_tries_nothing(sana, photos, losses, tmp_path):
    found, planted = losses
    settings = SETTINGS | {
        "initializer_token": ["dog", "cat"],
        "num_starts": 3,
        "output_dir": tmp_path,
        "checkpointing_steps": 3,
    }
    planted[:] = [2.0, 1.0, 0.0]
    whole = DTITrainer(sana, **settings).fit(photos)
    sana.unload_directional_inversion()
    found.clear()
    again = DTITrainer(sana, **settings, resume_from_checkpoint="checkpoint-3").fit(photos)
    assert not found and torch.equal(again.embeddings["text_encoder"], whole.embeddings["text_encoder"])
    sana.unload_directional_inversion()
    other = settings | {"initializer_token": ["cat", "bird"], "num_starts": 1}
    with pytest.raises(ValueError, match="other settings"):
        DTITrainer(sana, **other, resume_from_checkpoint="checkpoint-3").fit(photos)
    assert not found
