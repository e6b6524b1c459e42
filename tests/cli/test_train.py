"""`dti train --subjects_per_batch`: many subjects at a time, in one process and in two."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from diffusers_dti import DirectionalInversion
from diffusers_dti.cli import main, train
from diffusers_dti.data import photo_record

ROOT = Path(__file__).parents[2]
SMALL = ["--resolution", "16", "--train_batch_size", "2", "--max_train_steps", "3", "--heldout_loss_steps", "0"]


def dti(*arguments):
    return main([str(a) for a in arguments])


@pytest.fixture
def subjects(photos, tmp_path):
    """A JSON file of four subjects, one of them torn, with templates, a style and captions of their own."""
    own = {
        "rex": {"class": "dog", "template": "my {}"},
        "torn": {"class": "dog"},
        "tom": {"class": "red cat", "learnable_property": "style"},
        "toy2": {"class": "toy", "images": ["0.png", "1.png"], "template": ["a {} on the beach", "a red {}"]},
    }
    for name, entry in own.items():
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i, photo in enumerate(photos):
            photo.save(folder / f"{i}.png")
        entry["path"] = str(folder)
    (tmp_path / "photos" / "torn" / "0.png").write_bytes(b"no picture")
    file = tmp_path / "subjects.json"
    file.write_text(json.dumps(own))
    return file


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_same(found, expected):
    for component, v in expected.directions.items():
        torch.testing.assert_close(found.directions[component], v, rtol=0, atol=2e-5)
    assert found.metadata == expected.metadata


def test_batches_learn_and_write_what_single_runs_do(model, subjects, tmp_path, capsys, monkeypatch):
    """With one that fails, and one that is finished already."""
    sizes, original = [], train.fit_together
    monkeypatch.setattr(train, "fit_together", lambda *args: sizes.append(len(args[0])) or original(*args))
    command = ["train", subjects, "--model", model, *SMALL, "--checkpointing_steps", 2, "--output_dir"]
    assert dti(*command, tmp_path / "single") == 1 and not sizes
    alone = capsys.readouterr()
    assert dti(*command, tmp_path / "batches", "--instances", "rex") == 0
    assert dti(*command, tmp_path / "batches", "--subjects_per_batch", 3) == 1 and sizes == [3]
    said = capsys.readouterr()
    assert "rex: already learned, in" in said.out and "toy2: learned, in" in said.out
    assert "torn: failed, OSError" in said.err and said.out.splitlines()[-1] == alone.out.splitlines()[-1]
    assert said.out.splitlines()[-1] == "3 of 4 learned; failed: torn."
    assert files_in(tmp_path / "batches") == files_in(tmp_path / "single")
    for name in ("rex", "tom", "toy2"):
        folders = [tmp_path / way / name for way in ("batches", "single")]
        assert_same(*(DirectionalInversion.from_pretrained(folder) for folder in folders))
        records = [json.loads((folder / photo_record.RECORD).read_text()) for folder in folders]
        assert records[0]["photos"] == records[1]["photos"]
    assert dti(*command, tmp_path / "batches", "--subjects_per_batch", 2, "--instances", "rex", "tom") == 0
    assert sizes == [3] and "2 of 2 learned." in capsys.readouterr().out


def test_what_is_lost_in_a_batch(model, subjects, tmp_path, capsys, monkeypatch):
    """A full disk loses one, and keeps it elsewhere; models that fail lose their batch, and not the next one."""
    save, calls, original = DirectionalInversion.save_pretrained, [], train.fit_together

    def full(self, folder):
        if Path(folder) == tmp_path / "out" / "rex":
            raise OSError("no space left on device")
        save(self, folder)

    def fit(*args):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("too many")
        return original(*args)

    monkeypatch.setattr(DirectionalInversion, "save_pretrained", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(train, "fit_together", fit)
    command = ["train", subjects, "--model", model, *SMALL, "--instances", "rex", "tom", "toy2", "--output_dir"]
    assert dti(*command, tmp_path / "out", "--subjects_per_batch", 2) == 1
    said = capsys.readouterr()
    assert "rex: failed, OSError" in said.err and "What was learned is in" in said.err and "tom: learned" in said.out
    assert "toy2: failed, OutOfMemoryError: too many" in said.err
    assert "1 of 3 learned; failed: rex, toy2." in said.out


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("subjects.json", ["--method", "dco"], "An adapter changes the denoiser, which the subjects of a batch share"),
        ("photos/rex", [], "--subjects_per_batch is for the subjects of a JSON file."),
    ],
)
def test_what_is_not_for_batches_is_one_line(model, subjects, tmp_path, capsys, data, options, message):
    command = ["train", tmp_path / data, "--model", model, *SMALL, "--output_dir", tmp_path / "out", "--subjects_per_batch", 2]
    if data.endswith(".json"):
        options = [*options, "--instances", "rex", "tom"]
    assert dti(*command, *options) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_two_processes_each_take_their_own_subjects(model, subjects, tmp_path):
    """The first one has rex and tom, one after the other, with adapters; the second one the torn one and toy2."""
    common = [subjects, "--model", model, *SMALL, "--adapter", "lora", "--output_dir"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--rdzv_backend", "c10d"]
    launch += ["--rdzv_endpoint", "localhost:0", "-m", "diffusers_dti.cli", "train", *common, tmp_path / "two"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [str(x) for x in [*launch, "--subjects_per_batch", 1]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and done.stderr.count("torn: failed, OSError") == 1, done.stderr[-3000:]
    assert sorted(line.split(":")[0] for line in done.stdout.splitlines() if ": learned" in line) == ["rex", "tom", "toy2"]
    assert done.stdout.splitlines().count("3 of 4 learned; failed: torn.") == 1
    assert dti("train", *common, tmp_path / "one", "--instances", "rex", "toy2") == 0
    for name in ("rex", "toy2"):
        assert_same(*(DirectionalInversion.from_pretrained(tmp_path / way / name) for way in ("two", "one")))
