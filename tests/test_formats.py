"""The file, read back by safetensors and by us."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_dti import formats


def write(path, rows, **header):
    scale = torch.linalg.vector_norm(rows, dim=-1)
    formats.write(path, "<dog>", rows, {"component": "text_encoder", "scale": scale.tolist(), **header})


def test_the_file_is_one_tensor_with_a_header(tmp_path):
    rows = torch.randn(2, 8)
    write(tmp_path / "sub" / "learned_embeds.safetensors", rows, initializer="dog")
    with safe_open(tmp_path / "sub" / "learned_embeds.safetensors", framework="pt") as f:
        assert list(f.keys()) == ["<dog>"] and torch.equal(f.get_tensor("<dog>"), rows)
        metadata = f.metadata()
    assert metadata["format"] == "pt"
    header = json.loads(metadata["dti"])
    assert header["version"] == formats.VERSION and header["initializer"] == "dog" and len(header["scale"]) == 2
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["learned_embeds.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "learned_embeds.safetensors"
    old = torch.randn(1, 8)
    write(path, old)

    def torn(tensors, filename, metadata):
        with open(filename, "wb") as f:
            f.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(formats, "save_file", torn)
    with pytest.raises(OSError, match="no space"):
        write(path, torch.randn(1, 8))
    assert torch.equal(formats.read(path)[1], old)
    assert list(tmp_path.iterdir()) == [path]


def test_plain_diffusers_files_have_no_header(tmp_path):
    save_file({"<cat>": torch.ones(8, dtype=torch.float16)}, tmp_path / "a.safetensors")
    name, rows, header = formats.read(tmp_path / "a.safetensors")
    assert name == "<cat>" and rows.shape == (1, 8) and rows.dtype == torch.float32 and header is None


def test_unreadable_files_say_why(tmp_path):
    path = tmp_path / "learned_embeds.safetensors"
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="not a safetensors file"):
        formats.read(path)
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"one tensor.*\['a', 'b'\]"):
        formats.read(path)
    with pytest.raises(ValueError, match="pickle"):
        formats.read(tmp_path / "learned_embeds.bin")
    rows = torch.nn.functional.normalize(torch.randn(1, 8))
    for scale, version, message in ((1.001, formats.VERSION, "not the norms"), (1.0, formats.VERSION + 1, "update")):
        header = json.dumps({"version": version, "component": "text_encoder", "scale": [scale]})
        save_file({"<dog>": rows}, path, metadata={"dti": header})
        with pytest.raises(ValueError, match=message):
            formats.read(path)
    header = json.dumps({"version": formats.VERSION, "component": "text_encoder", "scale": [1.00005]})
    save_file({"<dog>": rows}, path, metadata={"dti": header})
    formats.read(path)  # within 1e-4


@pytest.mark.parametrize(("component", "name"), [("text_encoder", "learned_embeds"), ("text_encoder_2", "learned_embeds_2")])
def test_names_and_components(component, name):
    assert formats.file_name(component) == f"{name}.safetensors"
    assert formats.component_of(f"{name}.safetensors") == component
    assert formats.component_of("anything.safetensors") == "text_encoder"
