"""A tracker that cannot be used is an error of the settings, before a model is opened."""

import re

import accelerate.tracking
import pytest

from diffusers_dti import DTIConfig


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    """accelerate would train without it."""
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    message = "report_to='wandb' needs a package that is not installed: pip install wandb"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        DTIConfig(report_to="wandb")


def test_trackers_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match=r"^report_to must be one of all, .*tensorboard.*, got 'nonsense'\.$"):
        DTIConfig(report_to="nonsense")
    with pytest.raises(ValueError, match=r"^report_to='tensorboard' writes files: it needs an `output_dir`\.$"):
        DTIConfig(report_to="tensorboard")
    assert DTIConfig(report_to="tensorboard", output_dir=tmp_path).report_to == "tensorboard"
