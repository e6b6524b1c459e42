"""`dti env`, compared with the package's own metadata and with what the modules say of themselves."""

import getpass
import importlib
import platform
from pathlib import Path

import pytest
import torch

from diffusers_dti.cli import env, main


@pytest.fixture
def printed(capsys):
    assert main(["env"]) == 0
    return dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())


def test_the_versions_are_those_of_the_modules(printed):
    for name in ("diffusers_dti", "torch", "diffusers", "transformers", "peft", "safetensors", "huggingface_hub", "accelerate"):
        assert printed[name.replace("_", "-")].strip() == importlib.import_module(name).__version__
    assert printed["Python"].strip() == platform.python_version()
    assert {"matplotlib", "pillow-heif"} < printed.keys()  # the extras
    assert not {"pytest", "ruff", "pip"} & printed.keys()


def test_nothing_private_is_printed(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", "/home/someone/hub")
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    private = ["hf_", "/home", str(Path.home()), str(Path.cwd()), platform.node()]
    if getpass.getuser() != "root":
        private.append(getpass.getuser())
    assert not [word for word in private if word in out]


def test_a_missing_package_is_named_with_its_extra():
    required = ["no-such-one>=1", "no-such-two (<2,>=1) ; extra == 'plot'", 'no-such-three==1; extra == "test-studio"']
    required.append("no-such-two>=1; extra == 'studio'")
    assert env._versions(required) == {"no-such-one": "not installed", "no-such-two": "not installed (extra plot)"}


def test_a_gpu_is_named_with_its_memory(monkeypatch):
    class Properties:
        name, total_memory = "A100", 80 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: Properties)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert env._devices() == "A100 (80 GiB), A100 (80 GiB), CUDA 12.8"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert env._devices() == "Apple GPU (MPS)"
