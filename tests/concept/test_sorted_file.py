"""Files with a sorted header."""

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_dti.concept import sorted_file


def test_safetensors_reads_what_it_would_have_written(tmp_path):
    tensors = {"<dog>": torch.randn(2, 3), "b": torch.ones(5, dtype=torch.float16)}
    metadata = {"format": "pt", "z": "1", "a": "ünï", "m": "x" * 13}
    sorted_file.save_file(tensors, tmp_path / "ours", metadata)
    save_file(tensors, tmp_path / "theirs", metadata)
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert all(torch.equal(ours[name], theirs[name]) for name in tensors) and ours.keys() == theirs.keys()
    with safe_open(tmp_path / "ours", "pt") as f:
        assert f.metadata() == metadata
    written = set()
    for _ in range(8):
        sorted_file.save_file(tensors, tmp_path / "again", metadata)
        written.add((tmp_path / "again").read_bytes())
    assert len(written) == 1
