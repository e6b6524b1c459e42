"""Our file, read back with safetensors and with our own reader."""

import json
import os
import stat
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_dti.concept import formats


def write(folder, rows, **header):
    formats.write(folder, "<dog>", rows, {c: torch.linalg.vector_norm(r, dim=-1) for c, r in rows.items()}, header)


def test_the_file_is_one_tensor_with_a_header(tmp_path):
    rows = torch.randn(2, 8)
    write(tmp_path / "sub", {"text_encoder": rows}, initializer="dog")
    with safe_open(tmp_path / "sub" / "learned_embeds.safetensors", framework="pt") as f:
        assert list(f.keys()) == ["<dog>"] and torch.equal(f.get_tensor("<dog>"), rows)
        metadata = f.metadata()
    assert metadata["format"] == "pt"
    header = json.loads(metadata["dti"])
    assert header["version"] == formats.VERSION and header["initializer"] == "dog" and len(header["scale"]) == 2
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["learned_embeds.safetensors"]


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    old = {"text_encoder": torch.randn(1, 8), "text_encoder_2": torch.randn(1, 8)}
    write(tmp_path, old)
    there, save_file = sorted(tmp_path.iterdir()), formats.save_file

    def torn(tensors, filename, metadata):
        if json.loads(metadata["dti"])["component"] == "text_encoder_2":
            raise OSError("no space left on device")
        save_file(tensors, filename, metadata)

    monkeypatch.setattr(formats, "save_file", torn)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, {c: torch.randn(1, 8) for c in old})
    assert sorted(tmp_path.iterdir()) == there
    for path, rows in zip(there, old.values()):
        assert torch.equal(*formats.read(path).rows.values(), rows)


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_saved_files_have_the_mode_of_ordinary_files(tmp_path, umask, monkeypatch):
    """Under a private umask too, and without opening what another thread creates at the same time."""
    earlier, other = os.umask(umask), tmp_path / "other"
    save_file = formats.save_file

    def save_with_company(*args, **kwargs):
        thread = threading.Thread(target=other.touch)
        thread.start()
        thread.join()
        save_file(*args, **kwargs)

    monkeypatch.setattr(formats, "save_file", save_with_company)
    original = os.umask
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask belongs to all threads"))
    try:
        write(tmp_path / "concept", {"text_encoder": torch.randn(1, 8), "text_encoder_2": torch.randn(1, 8)})
    finally:
        monkeypatch.undo()
        original(earlier)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (*(tmp_path / "concept").iterdir(), other)}
    assert set(modes.values()) == {0o666 & ~umask} and len(modes) == 3, modes


def test_a_concept_replaces_the_whole_of_an_earlier_one(tmp_path):
    write(tmp_path, {"text_encoder": torch.randn(1, 8), "text_encoder_2": torch.randn(1, 8)})
    write(tmp_path, {"text_encoder_2": torch.randn(1, 8)})
    assert [p.name for p in tmp_path.iterdir()] == ["learned_embeds_2.safetensors"]


def test_plain_diffusers_files_have_no_header(tmp_path):
    save_file({"<cat>": torch.ones(8, dtype=torch.float16)}, tmp_path / "a.safetensors")
    name, rows, scales, metadata, *_ = formats.read(tmp_path / "a.safetensors")
    assert name == "<cat>" and torch.equal(rows["text_encoder"], torch.ones(1, 8)) and not scales
    assert rows["text_encoder"].dtype == torch.float32 and metadata == {"encoders": {"text_encoder": None}}


def test_unreadable_files_say_why(tmp_path):
    path = tmp_path / "learned_embeds.safetensors"
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="not a safetensors file"):
        formats.read(path)
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"one tensor.*\['a', 'b'\]"):
        formats.read(path)
    rows = torch.nn.functional.normalize(torch.randn(1, 8))
    for scale, version, message in ((1.001, formats.VERSION, "not the norms"), (1.0, formats.VERSION + 1, "update")):
        header = json.dumps({"version": version, "component": "text_encoder", "scale": [scale]})
        save_file({"<dog>": rows}, path, metadata={"dti": header})
        with pytest.raises(ValueError, match=message):
            formats.read(path)
    header = json.dumps({"version": formats.VERSION, "component": "text_encoder", "scale": [1.00005]})
    save_file({"<dog>": rows}, path, metadata={"dti": header})
    formats.read(path)  # within 1e-4


@pytest.mark.parametrize(
    "header",
    [
        '{"scale": [1.0]}', '{"version": 1}', "[1]", "{", '{"version": "1", "component": "text_encoder", "scale": [1.0]}',
        '{"version": 1, "component": "text_encoder", "scale": null}', '{"version": 1, "component": "unet", "scale": [1.0]}',
        '{"version": 1, "component": "text_encoder", "scale": [NaN]}',
        pytest.param("[" * 100_000 + "]" * 100_000, id="nested"),
    ],
)  # fmt: skip
def test_wrong_or_damaged_headers_are_refused(tmp_path, header):
    path = tmp_path / "learned_embeds.safetensors"
    save_file({"<dog>": torch.nn.functional.normalize(torch.ones(1, 8))}, path, metadata={"dti": header})
    with pytest.raises(ValueError, match=r"learned_embeds\.safetensors has a header that cannot be used"):
        formats.read(path)


@pytest.mark.parametrize(("component", "name"), [("text_encoder", "learned_embeds"), ("text_encoder_2", "learned_embeds_2")])
def test_names_and_components(component, name):
    assert formats.file_name(component) == f"{name}.safetensors"
    assert formats.component_of(f"{name}.safetensors") == component
    assert formats.component_of("anything.safetensors") == "text_encoder"


@pytest.mark.parametrize("components", [7, [{}], ["text_encoder", "elsewhere"], "text_encoder"])
def test_a_header_with_damaged_components_is_refused(tmp_path, components):
    write(tmp_path, {"text_encoder": torch.ones(1, 8)})
    path = tmp_path / "learned_embeds.safetensors"
    with safe_open(path, "pt") as f:
        header = json.loads(f.metadata()["dti"]) | {"components": components}
    save_file(load_file(path), path, metadata={"dti": json.dumps(header)})
    with pytest.raises(ValueError, match="damaged header: its components are"):
        formats.read(path)
