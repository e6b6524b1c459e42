"""The rates of a run, as its rows see them."""

import math

import pytest
import torch

from diffusers_dti import DTITrainer
from diffusers_dti.sphere import angle

SETTINGS = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "train_batch_size": 1}
SHARES = {
    "constant": [1, 1, 1, 1, 1, 1],
    "linear": [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
    "cosine": [1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873],
    "late": [1, 1, 1, 1, 1, 0.5],
}


@pytest.mark.parametrize("schedule", SHARES)
def test_every_step_turns_by_the_rate_of_its_schedule(sdxl, photos, schedule):
    rows, turned = [], []

    def look(trainer, step):
        rows.append(rows_of(trainer))
        turned.append(angle(rows[-2], rows[-1]).item())

    def rows_of(trainer):
        (concept,) = loops[-1].concepts
        return concept.rows["text_encoder"].direction.detach().clone()

    from diffusers_dti.training import trainer as module

    loops = []

    class Watched(module.Loop):
        def __init__(self, *args):
            super().__init__(*args)
            loops.append(self)
            rows.append(self.concepts[0].rows["text_encoder"].direction.detach().clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Loop", Watched)
        trainer = DTITrainer(
            sdxl, **SETTINGS, lr_scheduler=schedule, learning_rate=0.3, scale_lr=False, max_train_steps=6, optimizer="rsgd"
        )
        trainer.fit(photos, callback_on_step_end=look)
    expected = torch.tensor([math.atan(0.3 * share) for share in SHARES[schedule]])
    torch.testing.assert_close(torch.tensor(turned), expected, rtol=1e-4, atol=0)
