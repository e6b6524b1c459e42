"""The folder of a run: one run at a time, tidy, and kept when the run is ended from outside."""

import os
import signal
import threading

import pytest
import torch

from diffusers_dti import DirectionalInversion, DTITrainer, atomic
from diffusers_dti.training.checkpoint import find_checkpoint
from diffusers_dti.training.output import LOCK, uninterrupted, writing

pytestmark = pytest.mark.skipif(os.name != "posix", reason="runs are ended by other signals")
SETTINGS = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 16, "train_batch_size": 1}


@pytest.fixture(autouse=True)
def usual_handlers():
    """As in a terminal: `nohup` and a shell's `&` start programs that ignore some signals."""
    usual = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL}
    earlier = {name: signal.signal(getattr(signal, name), handler) for name, handler in usual.items()}
    yield
    for name, handler in earlier.items():
        signal.signal(getattr(signal, name), handler)


def test_a_second_run_in_the_same_folder_is_refused(sdxl, photos, tmp_path):
    def second(trainer, step):
        with pytest.raises(OSError, match="Another run writes to .*: choose another `output_dir`, or wait"):
            DTITrainer(sdxl, **SETTINGS | {"placeholder_token": "<cat>"}, output_dir=tmp_path).fit(photos)
        asked.append(step)

    asked = []
    DTITrainer(sdxl, **SETTINGS, output_dir=tmp_path, max_train_steps=1).fit(photos, callback_on_step_end=second)
    assert asked == [1] and not (tmp_path / LOCK).exists()
    with writing(tmp_path):  # the next one may
        pass


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_a_checkpoint(sdxl, photos, tmp_path, name):
    number = getattr(signal, name)

    def end(trainer, step):
        if step == 3:
            os.kill(os.getpid(), number)

    trainer = DTITrainer(sdxl, **SETTINGS, output_dir=tmp_path, max_train_steps=9)
    with pytest.raises(KeyboardInterrupt, match=name):
        trainer.fit(photos, callback_on_step_end=end)
    assert (tmp_path / "checkpoint-3").is_dir() and list(trainer.inversions) == ["<dog>"]
    assert signal.getsignal(number) is signal.SIG_DFL and sdxl.directional_inversions == {}


def test_a_signal_amid_the_last_checkpoint_waits(sdxl, photos, tmp_path, monkeypatch):
    """A launcher ends the other processes when one has failed, and by then they may write their checkpoint already."""
    sync = atomic._sync

    def sync_and_end(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(atomic, "_sync", sync)
        sync(*args)

    def fail(trainer, step):
        if step == 2:
            monkeypatch.setattr(atomic, "_sync", sync_and_end)
            raise RuntimeError("The other process is gone.")

    trainer = DTITrainer(sdxl, **SETTINGS, output_dir=tmp_path, max_train_steps=9)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM") as raised:
        trainer.fit(photos, callback_on_step_end=fail)
    assert isinstance(raised.value.__context__, RuntimeError)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-2" and list(trainer.inversions) == ["<dog>"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_waits_for_the_end_of_a_step(name):
    number, done = getattr(signal, name), []
    with pytest.raises(KeyboardInterrupt, match=name), writing(None), uninterrupted():
        os.kill(os.getpid(), number)
        done.append("first")
    with pytest.raises(KeyboardInterrupt, match=name), writing(None), uninterrupted():
        os.kill(os.getpid(), number)
        done.append("second")
        os.kill(os.getpid(), number)
        done.append("never")
    with writing(None), uninterrupted():
        done.append("third")
    with pytest.raises(KeyboardInterrupt), writing(None):
        os.kill(os.getpid(), number)
        done.append("never")
    assert done == ["first", "second", "third"]


def test_handlers_of_others_stay():
    mine = lambda number, frame: None  # noqa: E731
    earlier = signal.signal(signal.SIGTERM, mine)
    try:
        with writing(None):
            assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, earlier)
    inside = []
    thread = threading.Thread(target=lambda: inside.append(writing(None).__enter__()))
    thread.start()
    thread.join()
    assert inside == [None]  # in another thread, no handler can be set


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_trained(sdxl, photos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written to: choose another `output_dir`"):
        DTITrainer(sdxl, **SETTINGS, output_dir=tmp_path / "file" / "run").fit(photos)
    assert sdxl.directional_inversions == {}


def test_what_was_learned_is_not_lost_if_it_cannot_be_saved(sdxl, photos, tmp_path, monkeypatch, caplog):
    def full(self, folder):
        raise OSError("no space left on device")

    monkeypatch.setattr(DirectionalInversion, "save_pretrained", full)
    learned = DTITrainer(sdxl, **SETTINGS, output_dir=tmp_path, max_train_steps=2).fit(photos)
    assert "could not be saved in" in caplog.text and "trainer.save_pretrained" in caplog.text
    assert torch.equal(sdxl.directional_inversions["<dog>"].embeddings["text_encoder"], learned.embeddings["text_encoder"])


def test_leftovers_of_killed_runs_are_removed(sdxl, photos, tmp_path):
    for name in (".checkpoint-2.0123456789ab.partial", ".checkpoint-4.0123456789ab.earlier"):
        (tmp_path / name).mkdir()
    (tmp_path / ".learned_embeds.safetensors.0123456789ab.partial.safetensors").write_text("half")
    (tmp_path / ".mine").write_text("")
    DTITrainer(sdxl, **SETTINGS, output_dir=tmp_path, max_train_steps=1).fit(photos)
    hidden = sorted(path.name for path in tmp_path.glob(".*"))
    assert hidden == [".mine"] and (tmp_path / "checkpoint-4").is_dir()  # it had been moved aside
