"""The worker: the library's own run, with its drawings beside it."""

import pytest
import torch
from conftest import WORLD
from diffusers import DiffusionPipeline
from PIL import Image, ImageChops

from diffusers_dti import DTITrainer
from diffusers_dti.studio import worker
from diffusers_dti.studio.job import WORD, Job
from diffusers_dti.studio.models import Opening

pytestmark = pytest.mark.studio
SETTINGS = {
    "placeholder_token": "<star>", "initializer_token": "star", "resolution": 32, "max_train_steps": 12,
    "validation_prompt": ["a {}"], "validation_steps": 6,
}  # fmt: skip
OPENING = Opening("float32", "cpu")


def test_it_learns_what_the_library_learns(star, tmp_path):
    job = Job.create(tmp_path, star, str(WORLD), SETTINGS)
    worker.learn(job, OPENING)
    pipe = DiffusionPipeline.from_pretrained(WORLD, dtype=torch.float32)
    trainer = DTITrainer(pipe, **SETTINGS)
    expected = trainer.fit(job.photos)
    for component, rows in job.concept().embeddings.items():
        torch.testing.assert_close(rows, expected.embeddings[component])
    assert job.progress == job.progress | {"step": 12, "steps": 12, "initializer": "star"}
    assert [entry["step"] for entry in job.history] == [10, 12]
    samples = job.samples(0)
    assert list(samples) == [WORD, 6, 12]
    alone = pipe("a star", generator=torch.Generator().manual_seed(42)).images[0]
    drawn = Image.open(samples[WORD])
    assert ImageChops.difference(drawn, alone).convert("L").getextrema()[1] <= 2  # of 255: the same seed and word
    before = job.progress
    worker.learn(job, Opening("no such dtype"))  # is done already, and opens nothing
    assert job.progress == before
