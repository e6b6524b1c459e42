"""Our file, read back with safetensors and with our own reader."""

import json
import os
import re
import stat
import threading

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_dti import DirectionalInversion
from diffusers_dti.concept import formats
from diffusers_dti.concept.convert import convert


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


@pytest.mark.skipif(os.name != "posix", reason="files have other permissions")
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


ROWS = torch.nn.functional.normalize(torch.ones(1, 8))
WHOLE = {"version": formats.VERSION, "component": "text_encoder", "scale": [1.0]}


def saved(folder, header, rows=ROWS, word="<dog>"):
    """Save a file with a header of our kind, given as JSON values or as text."""
    path = folder / "learned_embeds.safetensors"
    save_file({word: rows}, path, {"dti": header if isinstance(header, str) else json.dumps(WHOLE | header)})
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"component": 3}, "its component is 3, not one of"),
        ({"component": []}, "its component is [], not one of"),
        ({"component": [], "placeholder_token": "<x>"}, "its component is [], not one of"),
        ({"component": "unet", "placeholder_token": "<x>"}, "its component is 'unet', not one of"),
        ({"component": "x" * 5000}, "its component is 'xxx"),
        ({"version": True}, "its version is True"),
        ({"version": 10**4000}, "its version is 1000"),
        ({"scale": True}, "its scale must be a list of numbers, got True"),
        ({"scale": [True]}, "its scale must be a list of numbers, got [True]"),
        ({"scale": ["1.0"]}, "its scale must be a list of numbers, got ['1.0']"),
        ({"scale": [[1.0]]}, "its scale must be a list of numbers, got [[1.0]]"),
        ({"scale": [10**400]}, "int too large to convert to float"),
        ({"scale": [1e39]}, "its scales [inf] are not the norms of the rows"),
        ({"scale": [2.0] * 5000}, "its scales [2.0, 2.0"),
        ({"initializer": "\ud800"}, "surrogates not allowed"),
        ({"initializer": 3}, "its initializer must be text of at most 255 characters, got 3"),
        ({"base_model": ["x"]}, "its base_model must be text of at most 255 characters, got ['x']"),
        ({"base_model": "x" * 256}, "its base_model must be text of at most 255 characters, got 'xxx"),
        ({"family": {}}, "its family must be text of at most 255 characters, got {}"),
        ({"pooling": [1]}, "its pooling must be text of at most 255 characters, got [1]"),
        ({"prefix_space": True}, "its prefix_space must be text of at most 255 characters, got True"),
        ({"training": [1]}, "its training must be a mapping, got [1]"),
        ({"versions": 3}, "its versions must be a mapping, got 3"),
        ({"encoders": []}, "its encoders must be a mapping, got []"),
        ({"encoders": {"text_encoder": 3}}, "its encoders must be keys by component"),
        ('{"version": 1, "placeholder_token": "' + "x" * 256 + '"}', "its placeholder_token must be text of at most 255"),
        ('{"version": 1, "placeholder_token": "\\ud800"}', "surrogates not allowed"),
    ],
)
def test_headers_with_values_of_another_type_are_refused(tmp_path, header, message):
    path = saved(tmp_path, header)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} .*{re.escape(message)}") as caught:
        DirectionalInversion.from_pretrained(path)
    assert len(str(caught.value)) < len(str(path)) + 300


def test_a_header_may_say_more_and_say_nothing(tmp_path):
    header = {"initializer": None, "training": {}, "note": {"anything": [1, "x" * 1000]}, "scale_rule": 0.4}
    assert DirectionalInversion.from_pretrained(saved(tmp_path, header)).metadata == header


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_rows_that_are_no_real_numbers_are_refused(tmp_path, dtype):
    """In a file of ours, one of another program, and a state dict."""
    rows = torch.zeros(1, 8, dtype=dtype)
    rows[0, 0] = 1
    ours, other = saved(tmp_path, {}, rows), tmp_path / "other.safetensors"
    save_file({"<dog>": rows}, other)
    said = re.escape(f"floating-point rows (n, d) expected, got (1, 8) of {dtype}")
    for source in (ours, other, {"<dog>": rows}, {"text_encoder": rows}):
        name = "This state dict" if isinstance(source, dict) else re.escape(str(source))
        with pytest.raises(ValueError, match=f"^{name} .*{said}"):
            DirectionalInversion.from_pretrained(source, "<dog>")


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_rows_of_every_precision_are_read(tmp_path, dtype):
    rows = torch.tensor([[0.0, 0.5, -2.0, 1.5]]).to(dtype)  # are exact in all of them
    save_file({"<dog>": rows}, tmp_path / "other.safetensors")
    for source in (tmp_path / "other.safetensors", {"<dog>": rows}, {"text_encoder": rows}):
        read = DirectionalInversion.from_pretrained(source, "<dog>").embeddings["text_encoder"]
        torch.testing.assert_close(read, torch.tensor([[0.0, 0.5, -2.0, 1.5]]))


@pytest.mark.parametrize("rows", [[1.0], "rows", np.ones((1, 8)), torch.ones(1, 2, 8), torch.ones(1, 0)])
def test_a_state_dict_of_anything_but_rows_is_refused(rows):
    with pytest.raises(ValueError, match=r"^This state dict cannot be used: floating-point rows \(n, d\) expected, got"):
        DirectionalInversion.from_pretrained({"text_encoder": rows}, "<dog>")


def test_messages_cut_the_texts_of_files(tmp_path):
    """Keys of safetensors files can be as long as one likes."""
    path, long = tmp_path / "x.safetensors", "k" * 3000
    for tensors in (
        {f"{long}{i}": torch.ones(1) for i in range(20)},
        {"clip_l": torch.ones(1, 8), f"{long}_out": torch.ones(1, 8)},
        {f"bundle_emb.{long}{i}.clip_l": torch.ones(1, 8) for i in range(5)},
        {f"bundle_emb.x.{long}": torch.ones(1, 8)},
        {f"bundle_emb.x.{long}_out": torch.ones(1, 8)},
        {long: torch.ones(1, 8)},
    ):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}") as caught:
            DirectionalInversion.from_pretrained(path)
        assert len(str(caught.value)) < len(str(path)) + 600, str(caught.value)
    with pytest.raises(ValueError, match="must hold one tensor") as caught:
        save_file({f"{long}{i}": torch.ones(1) for i in range(20)}, path, {"dti": json.dumps(WHOLE)})
        DirectionalInversion.from_pretrained(path)
    assert len(str(caught.value)) < len(str(path)) + 300


def test_what_cannot_be_read_is_not_written(tmp_path):
    for metadata in ({"family": 3}, {"training": "x"}, {"initializer": "\ud800"}, {"encoders": {"text_encoder": 3}}):
        dog = DirectionalInversion.from_embeddings("<dog>", {"text_encoder": ROWS}, metadata)
        with pytest.raises(ValueError, match=r"^The metadata of <dog> cannot be saved: .*(its|surrogates)"):
            dog.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_a_file_says_about_a_concept_is_checked_under_its_name(tmp_path):
    save_file({" <dog>": ROWS}, tmp_path / "x.safetensors")
    save_file({"<dog>": 0 * ROWS}, tmp_path / "y.safetensors")
    for name, message in (
        ("x", "The placeholder token must be a word"),
        ("y", "text_encoder: rows must be finite and not zero"),
    ):
        path = tmp_path / f"{name}.safetensors"
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {message}"):
            DirectionalInversion.from_pretrained(path)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {message}"):
            convert(path, "comfyui", tmp_path / "out")


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
