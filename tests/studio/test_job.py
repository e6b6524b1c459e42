"""Jobs: everything about one is in its folder."""

import json

import pytest
from PIL import Image

from diffusers_dti.studio.job import WORD, Job, all_jobs

pytestmark = pytest.mark.studio
SETTINGS = {"placeholder_token": "<dog>", "validation_prompt": ["a {}"], "max_train_steps": 5}


@pytest.fixture
def job(star, tmp_path):
    return Job.create(tmp_path, star, "some/model", SETTINGS)


def test_a_job_is_found_again(job, star, tmp_path):
    (found,) = all_jobs(tmp_path)
    assert found == job and found.model == "some/model" and found.settings == SETTINGS and found.prompts == ["a {}"]
    assert found.status == "waiting" and found.name.endswith("-dog") and found.progress == {} and found.history == []
    assert sorted(path.name for path in found.photos.iterdir()) == [path.name for path in star]
    assert found.concept_folder is None and found.notices == ""
    with pytest.raises(ValueError, match="Nothing has been learned yet"):
        found.concept()
    found.set_status("failed", "no memory")
    assert (job.status, job.error) == ("failed", "no memory")
    second = Job.create(tmp_path, star, "some/model", SETTINGS)
    assert all_jobs(tmp_path) == [job, second]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": " "}, "Choose a model"),
        ({"uploads": []}, "No photos yet"),
        ({"settings": SETTINGS | {"max_train_steps": 0}}, "max_train_steps"),
        ({"settings": SETTINGS | {"placeholder_token": " dog"}}, "dog"),
    ],
)
def test_a_bad_job_leaves_nothing(change, message, star, tmp_path):
    given = {"uploads": star, "model": "some/model", "settings": SETTINGS} | change
    with pytest.raises(ValueError, match=message):
        Job.create(tmp_path, **given)
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_is_being_written(job):
    job.run.mkdir()
    (job.run / "train_log.jsonl").write_text('{"step": 10, "loss": 0.5}\n{"step": 20, "lo')
    assert job.history == [{"step": 10, "loss": 0.5}]
    job.log.write_text("A warning.\n<dog>:  10%|#  | 1/10\rand\n<dog>:  20%|## | 2/10\n\nAnother.\n")
    assert job.notices == "A warning.\nand\nAnother."


def test_samples_are_in_the_order_of_steps(job):
    image = Image.new("RGB", (4, 4))
    for step in (100, 25, WORD):
        job.add_sample(step, 0, image)
    job.add_sample(25, 10, image)
    assert list(job.samples(0)) == [WORD, 25, 100] and list(job.samples(10)) == [25] and job.samples(1) == {}


def test_a_status_that_nobody_writes(job):
    (job.folder / "status.json").write_text(json.dumps({"status": "<b>"}))
    with pytest.raises(ValueError, match="is damaged"):
        _ = job.status
