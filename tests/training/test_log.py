"""The record of a run: its file, the progress bar, the tracker."""

import json

import pytest
from PIL import Image

from diffusers_dti import DTIConfig
from diffusers_dti.families.stable_diffusion import StableDiffusionXL
from diffusers_dti.training.log import LOG_NAME, STRIP_NAME, TrainingLog, logger

DOG = {"loss": 0.5, "angle": 2.0, "norm": 0.4}
CAT = {"loss": 0.1, "angle": 4.0, "norm": 0.6}


def start(folder, step=0, name="<dog>", **settings):
    config = DTIConfig(output_dir=folder, max_train_steps=30, **settings).resolve(StableDiffusionXL)
    return TrainingLog(config, name, step, {"seed": 42, "templates": None, "placeholder_token": name})


def entries(folder):
    return [json.loads(line) for line in (folder / LOG_NAME).read_text().splitlines()]


def scalars(folder, name):
    """What TensorBoard's own reader finds in a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (p for p in folder.rglob("events.out.tfevents.*") if p.parent.name == "diffusers-dti")
    return [(e.step, pytest.approx(e.value)) for e in EventAccumulator(str(events)).Reload().Scalars(name)]


def test_entries_are_written_at_once(tmp_path, capsys):
    log = start(tmp_path)
    assert (tmp_path / LOG_NAME).read_text() == ""
    log.write_metrics(10, {"<dog>": DOG}, 0)
    assert entries(tmp_path) == log.history == [{"step": 10, **DOG}]
    log.write_metrics(20, {"<dog>": DOG | {"loss": 0.25}}, 0)
    assert entries(tmp_path) == log.history and log.history[1]["loss"] == 0.25
    log.close()
    bar = capsys.readouterr().err
    assert "<dog>" in bar and "loss=0.2500" in bar and "angle=2.0°" in bar


def test_several_concepts_have_means_and_their_own_values(tmp_path):
    log = start(tmp_path, name="<dog>, <cat>")
    log.write_metrics(10, {"<dog>": DOG, "<cat>": CAT}, 0)
    log.close()
    (entry,) = entries(tmp_path)
    own = {f"{key}/{word}": v for word, values in (("<dog>", DOG), ("<cat>", CAT)) for key, v in values.items()}
    assert entry == {"step": 10, "loss": pytest.approx(0.3), "angle": 3.0, "norm": pytest.approx(0.5), **own}


def test_skipped_updates_are_counted_and_reported(tmp_path, caplog):
    log = start(tmp_path)
    logger.addHandler(caplog.handler)
    try:
        log.write_metrics(10, {"<dog>": DOG}, 3)
    finally:
        logger.removeHandler(caplog.handler)
    log.close()
    assert entries(tmp_path)[0]["skipped"] == 3 and "3 row updates skipped so far" in caplog.text


def test_a_resumed_log_keeps_what_was_before_the_checkpoint(tmp_path):
    log = start(tmp_path)
    for step in (10, 20, 30):
        log.write_metrics(step, {"<dog>": DOG}, 0)
    log.close()
    with (tmp_path / LOG_NAME).open("a") as file:
        file.write("[" * 100_000 + "]" * 100_000 + "\n")  # another program's
        file.write('{"step": 40, "lo')  # torn off when the run was killed
    resumed = start(tmp_path, step=20)
    assert [x["step"] for x in resumed.history] == [10, 20] == [x["step"] for x in entries(tmp_path)]
    resumed.write_metrics(25, {"<dog>": DOG}, 0)
    resumed.close()
    assert [x["step"] for x in entries(tmp_path)] == [10, 20, 25]
    start(tmp_path).close()  # from the start: the old entries belong to another run
    assert entries(tmp_path) == []


def test_lines_that_are_no_entries_are_left_out(tmp_path):
    """A disk that failed, or another program, may leave anything in the file."""
    log = start(tmp_path)
    log.write_metrics(10, {"<dog>": DOG}, 0)
    log.close()
    with (tmp_path / LOG_NAME).open("ab") as file:
        for line in (
            b"\xff\xfe\x00",
            b"[1]",
            b"3",
            b"null",
            b'{"loss": 1}',
            b'{"step": "9", "loss": 1}',
            b'{"step": 10, "loss": [1]}',
        ):
            file.write(line + b"\n")
        file.write(b'{"step": 15, "loss": null, "angle": 1, "norm": 1}\n')
    resumed = start(tmp_path, step=20)
    resumed.close()
    assert [x["step"] for x in resumed.history] == [10, 15] == [x["step"] for x in entries(tmp_path)]


def test_a_log_is_never_half_written(tmp_path, monkeypatch):
    log = start(tmp_path)
    log.write_metrics(10, {"<dog>": DOG}, 0)
    log.close()
    monkeypatch.setattr(json, "dumps", lambda *a: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        start(tmp_path, step=10)
    monkeypatch.undo()
    assert entries(tmp_path) == [{"step": 10, **DOG}] and [p.name for p in tmp_path.iterdir()] == [LOG_NAME]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = start(None)
    log.write_metrics(10, {"<dog>": DOG}, 0)
    log.add_images(10, [Image.new("RGB", (16, 16))])
    log.close()
    assert len(log.history) == 1 and list(log.images) == [10] and not list(tmp_path.iterdir())


def test_images_become_a_strip_over_the_steps(tmp_path):
    log = start(tmp_path)
    log.add_images(10, [Image.new("RGB", (16, 16), "red")])
    narrow = Image.open(tmp_path / STRIP_NAME).width
    log.add_images(20, [Image.new("RGB", (16, 16), "blue")])
    log.close()
    assert list(log.images) == [10, 20] and Image.open(tmp_path / STRIP_NAME).width == 2 * narrow


def test_a_tracker_gets_the_entries_and_the_settings(tmp_path):
    log = start(tmp_path, report_to="tensorboard")
    log.write_metrics(10, {"<dog>": DOG}, 0)
    log.write_metrics(20, {"<dog>": CAT}, 0)
    log.close()
    assert scalars(tmp_path, "loss") == [(10, 0.5), (20, 0.1)] and scalars(tmp_path, "angle") == [(10, 2.0), (20, 4.0)]
    (settings,) = tmp_path.rglob("hparams.yml")
    assert "seed: 42" in settings.read_text() and "templates: None" in settings.read_text()


def test_a_tracker_that_cannot_be_closed_is_a_warning(tmp_path, monkeypatch, caplog):
    log = start(tmp_path, report_to="tensorboard")
    (tracker,) = log.accelerator.trackers

    def offline():
        raise RuntimeError("offline")

    monkeypatch.setattr(tracker, "finish", offline)
    logger.addHandler(caplog.handler)
    try:
        log.close()
    finally:
        logger.removeHandler(caplog.handler)
    assert "The tracker could not be closed: offline" in caplog.text


def test_other_processes_are_silent(tmp_path, monkeypatch, capsys):
    from diffusers_dti.training import log as module

    class Second:
        is_main_process = False

    monkeypatch.setattr(module, "processes", Second)
    log = start(tmp_path, report_to="tensorboard")
    log.write_metrics(10, {"<dog>": DOG}, 0)
    log.add_images(10, [Image.new("RGB", (16, 16))])
    log.close()
    assert len(log.history) == 1 and not list(tmp_path.iterdir()) and "loss" not in capsys.readouterr().err


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644)])
def test_the_umask_decides_who_may_read_the_log(tmp_path, umask, mode, set_umask):
    set_umask(umask)
    log = start(tmp_path)
    log.write_metrics(10, {"<dog>": DOG}, 0)
    log.close()
    assert (tmp_path / LOG_NAME).stat().st_mode & 0o777 == mode
