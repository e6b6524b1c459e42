"""The queue: one job at a time, stopped, failed, resumed, and found again by another server."""

import threading
import time

import pytest
from conftest import WORLD

from diffusers_dti.studio.job import Job
from diffusers_dti.studio.models import Models, Opening
from diffusers_dti.studio.runner import Runner

pytestmark = pytest.mark.studio
SETTINGS = {"placeholder_token": "<star>", "initializer_token": "star", "resolution": 32, "max_train_steps": 3}
OPENING = Opening("float32", "cpu")


def wait(job, *statuses, seconds=90):
    for _ in range(10 * seconds):
        if job.status in statuses:
            return
        time.sleep(0.1)
    raise AssertionError(f"{job.status}: {job.notices}")


def test_the_queue(star, tmp_path):
    left = Job.create(tmp_path / "jobs", star, str(WORLD), SETTINGS)
    left.set_status("running")  # by a server that was killed
    models = Models(OPENING)
    runner = Runner(tmp_path / "jobs", models, OPENING)
    with pytest.raises(OSError, match="Another studio uses"):
        Runner(tmp_path / "jobs", models, OPENING)
    missing = runner.add(star, str(tmp_path / "nothing"), SETTINGS)
    waiting = runner.add(star, str(WORLD), SETTINGS)
    runner.stop(waiting)
    assert waiting.status == "stopped"
    wait(left, "running")
    with pytest.raises(ValueError, match="A concept is being learned"), models.opened(str(WORLD)):
        pass
    wait(left, "done", "failed")
    assert left.status == "done" and left.concept().placeholder_token == "<star>"
    wait(missing, "failed")
    assert "nothing" in missing.error
    runner.resume(left)  # is done
    assert left.status == "done"
    runner.resume(waiting)
    wait(waiting, "running")
    runner.stop(waiting)  # before its first step, or soon after
    wait(waiting, "stopped", "done")


def test_a_run_waits_for_the_images_of_the_page(star, tmp_path):
    models, entered, release = Models(OPENING), threading.Event(), threading.Event()
    models._opening = type("Fake", (), {"open": lambda *_: object()})()

    def draw():
        with models.opened("some model"):
            entered.set()
            release.wait(60)

    threading.Thread(target=draw, daemon=True).start()
    assert entered.wait(10)
    runner = Runner(tmp_path / "jobs", models, OPENING)
    job = runner.add(star, str(WORLD), SETTINGS)
    wait(job, "running")
    time.sleep(0.3)
    assert not job.log.exists()  # no process yet
    runner.stop(job)
    release.set()
    wait(job, "stopped")
    assert job.log.read_bytes() == b""
