"""The processes of a run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusers_dti import DirectionalInversion, DTITrainer
from diffusers_dti.training import distributed

ROOT = Path(__file__).parents[2]


def test_without_a_launcher_there_is_one_process():
    process = distributed.processes()
    assert (process.num_processes, process.process_index, process.is_main_process) == (1, 0, True)


@pytest.mark.parametrize(("flag", "cpu"), [(None, False), ("false", False), ("true", True)])
def test_the_launchers_flag_for_the_cpu_is_read(flag, cpu, monkeypatch):
    """A machine without a GPU is on the CPU in any case, so the argument is looked at."""
    arguments = []
    monkeypatch.setattr(distributed, "PartialState", lambda **kwargs: arguments.append(kwargs))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if flag is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", flag)
    distributed.processes()
    assert arguments == [{"cpu": cpu}]


def test_alone_is_a_single_process():
    process = distributed.processes()
    with distributed.alone():
        own = distributed.processes()
        own.wait_for_everyone()
        with distributed.alone():
            assert (own.num_processes, own.process_index, own.is_main_process, own.device) == (1, 0, True, process.device)
        assert distributed.processes() is own
    assert type(distributed.processes()) is type(process)


def test_a_single_process_has_only_its_own():
    values, tensor = ["own"], torch.ones(2)
    distributed.broadcast(values)
    assert values == ["own"] and distributed.average(tensor) is tensor and distributed.Reunion().gather(3) == [3]


MEETING = """
import pathlib, sys, time
import torch
from diffusers_dti.training.distributed import Reunion, alone, average, broadcast, processes

process = processes()
me, reunion = process.process_index, Reunion()
values, with_all = [me + 5], average(torch.tensor([me + 1.0])).item()
broadcast(values)
with alone():
    own = processes()
    by_itself = average(torch.tensor([me + 1.0])).item() - me
    time.sleep(me)
    met = reunion.gather(me * 10)
seen = [process.num_processes, process.is_main_process, process.device.type, own.num_processes, own.is_main_process]
pathlib.Path(sys.argv[1], str(me)).write_text(repr([*seen, with_all, values, by_itself, met]))
"""


def test_two_processes_know_each_other(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(MEETING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launch, "--rdzv_endpoint", "localhost:0", str(script), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    for number in (0, 1):
        expected = [2, number == 0, "cpu", 1, True, 1.5, [5], 1.0, [0, 10]]
        assert (tmp_path / str(number)).read_text() == repr(expected)


KILLED = """
import os, signal, sys
from pathlib import Path
from diffusers import DiffusionPipeline
import torch
from diffusers_dti import DTITrainer

torch.set_num_threads(1)
folder, step = Path(sys.argv[1]), int(sys.argv[2])
trainer = DTITrainer(
    DiffusionPipeline.from_pretrained(f"{folder}/model"), initializer_token="dog", resolution=16, train_batch_size=2,
    max_train_steps=4, output_dir=folder / "run", resume_from_checkpoint="latest",
)

def end(trainer, now):
    if now == step and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

trainer.fit(folder / "photos", callback_on_step_end=end)
"""


@pytest.mark.skipif(os.name != "posix", reason="processes end in other ways")
def test_a_process_is_killed_and_the_run_resumes(sdxl, photos, tmp_path):
    """The other one writes a checkpoint; from it, two processes go on, and so does one."""
    sdxl.save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    for number, photo in enumerate(photos):
        photo.save(tmp_path / "photos" / f"{number}.png")
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    launch += ["--rdzv_endpoint", "localhost:0", str(script), str(tmp_path)]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([*launch, "2"], cwd=ROOT, capture_output=True, text=True, env=env)
    assert killed.returncode != 0 and [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    shutil.copytree(tmp_path / "run", tmp_path / "one")
    resumed = subprocess.run([*launch, "0"], cwd=ROOT, capture_output=True, text=True, env=env)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    settings = {"initializer_token": "dog", "resolution": 16, "train_batch_size": 4, "max_train_steps": 4}
    whole = DTITrainer(sdxl, **settings).fit(tmp_path / "photos")
    sdxl.unload_directional_inversion()
    settings |= {"output_dir": tmp_path / "one", "resume_from_checkpoint": "latest"}
    found = [DirectionalInversion.from_pretrained(tmp_path / "run"), DTITrainer(sdxl, **settings).fit(tmp_path / "photos")]
    for component, v in whole.directions.items():
        for concept in found:
            torch.testing.assert_close(concept.directions[component], v, rtol=0, atol=1e-5)
