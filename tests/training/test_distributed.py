"""The processes of a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_two_processes_know_each_other(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys\n"
        "from diffusers_dti.training.distributed import processes\n"
        "process = processes()\n"
        "file = pathlib.Path(sys.argv[1], str(process.process_index))\n"
        "file.write_text(f'{process.num_processes} {process.is_main_process} {process.device.type}')\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launch, "--rdzv_endpoint", "localhost:0", str(script), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / str(i)).read_text() for i in (0, 1)] == ["2 True cpu", "2 False cpu"]
