"""The held-out loss against losses that are computed one by one."""

import pytest
import torch
from PIL import Image

from diffusers_dti import DTITrainer
from diffusers_dti.training import loop as loop_module
from diffusers_dti.training.heldout import HELDOUT_SAMPLES, heldout_loss

SETTINGS = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "train_batch_size": 2, "seed": 5}


@pytest.fixture
def stepper(monkeypatch):
    """The steppers of the loops that run, newest last."""
    made = []

    class Watched(loop_module.Stepper):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(loop_module, "Stepper", Watched)
    return made


def test_it_is_the_mean_loss_of_fixed_draws(pipe, photos, stepper):
    found = []

    def look(trainer, step):
        (concept,) = stepper[0].concepts
        family, samples = trainer.family, concept.samples
        each = []
        for batch in samples.heldout_batches(HELDOUT_SAMPLES, 1, torch.device("cpu")):
            with torch.no_grad():
                predicted = family.predict(batch, family.encode_prompts(batch.prompts, [0]))
            each.append((predicted.double() - family.target(batch).double()).square().mean().item())
        found.append([heldout_loss(family, samples, size).item() for size in (2, 5, 16)])
        assert found[-1] == pytest.approx([sum(each) / 16] * 3, rel=1e-5)

    trainer = DTITrainer(pipe, **SETTINGS, max_train_steps=3, learning_rate=0.2, heldout_loss_steps=2)
    trainer.fit(photos, callback_on_step_end=look)
    assert [entry["step"] for entry in trainer.history if "heldout_loss" in entry] == [2, 3]
    assert [entry["heldout_loss"] for entry in trainer.history] == pytest.approx([found[1][0], found[2][0]])
    assert len({losses[0] for losses in found}) == 3  # it follows the rows


def test_the_draws_cover_the_noise_levels_and_photos_and_are_not_those_of_training(sana, photos, stepper):
    DTITrainer(sana, **SETTINGS, zero_pad=True, max_train_steps=1).fit(photos)
    samples = stepper[0].concepts[0].samples
    heldout = list(samples.heldout_batches(16, 6, torch.device("cpu")))
    assert [len(batch.prompts) for batch in heldout] == [6, 6, 4]
    levels = torch.cat([batch.timesteps for batch in heldout])
    assert levels.tolist() == [int((i + 0.5) * 1000 / 16) for i in range(16)]
    assert not any(zeros for batch in heldout for zeros in batch.zero_pads)
    training = samples.batch(0, 200, torch.device("cpu"))
    assert not any(torch.equal(noise, other) for noise in heldout[0].noise for other in training.noise)
    again = next(samples.heldout_batches(16, 6, torch.device("cpu")))
    assert torch.equal(again.noise, heldout[0].noise) and again.prompts == heldout[0].prompts


def test_measuring_changes_nothing_of_what_is_learned(sdxl, photos):
    rows = []
    for steps in (0, 1):
        trainer = DTITrainer(sdxl, **SETTINGS, max_train_steps=4, heldout_loss_steps=steps)
        rows.append(trainer.fit(photos).embeddings["text_encoder"])
        assert sum("heldout_loss" in entry for entry in trainer.history) == (4 if steps else 0)
        sdxl.unload_directional_inversion()
    assert torch.equal(*rows)


def test_several_concepts_each_have_their_own(sdxl, photos):
    words = {"<dog>": photos, "<cat>": [Image.new("RGB", (32, 32), "red")] * 2}
    settings = {k: v for k, v in SETTINGS.items() if k != "placeholder_token"}
    trainer = DTITrainer(sdxl, **settings, max_train_steps=1)
    trainer.fit(words)
    (entry,) = trainer.history
    assert entry["heldout_loss"] == pytest.approx((entry["heldout_loss/<dog>"] + entry["heldout_loss/<cat>"]) / 2)
    assert entry["heldout_loss/<dog>"] != entry["heldout_loss/<cat>"]
