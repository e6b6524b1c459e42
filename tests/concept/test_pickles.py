"""Pickles made to take much memory or to run code. The files here are small: each would take a thousand times its size."""

import re
import warnings
import zipfile

import pytest
import torch
from torch.torch_version import TorchVersion

from diffusers_dti import DirectionalInversion

ROWS = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))


def read(path):
    return DirectionalInversion.from_pretrained(path, "<dog>", allow_pickle=True)


def repack(source, target, compression=zipfile.ZIP_STORED, code=None, twice=False):
    """Write a file of torch once more, with another compression, or with other code as its pickle."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            is_pickle = name.endswith("data.pkl")
            new.writestr(name, code if is_pickle and code else old.read(name))
            if is_pickle and twice:
                new.writestr(name.replace("data", "DATA"), old.read(name))


@pytest.fixture
def plain(tmp_path):
    """Write a concept as torch does."""
    torch.save({"<dog>": ROWS}, tmp_path / "plain.pt")
    assert torch.equal(read(tmp_path / "plain.pt").embeddings["text_encoder"].round(decimals=5), ROWS.round(decimals=5))
    return tmp_path / "plain.pt"


def expanded():
    return {"<dog>": torch.ones(1).expand(1_000, 768)}


def one_tensor_under_many_names():
    rows = torch.ones(1, 768)
    return {"<dog>" if i == 0 else f"<dog>_{i}": rows for i in range(1_000)}


def expanded_in_a1111s_layout():
    return {"string_to_param": {"*": torch.ones(1).expand(1_000, 768)}, "name": "dog"}


def expanded_in_a_parameter_dict():
    return {"string_to_param": torch.nn.ParameterDict({"*": torch.ones(1).expand(1_000, 768)})}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "make", [expanded, one_tensor_under_many_names, expanded_in_a1111s_layout, expanded_in_a_parameter_dict]
)
def test_tensors_larger_than_their_file_are_refused(tmp_path, make, old):
    torch.save(make(), tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
    size = (tmp_path / "a.pt").stat().st_size
    assert size < 500_000
    if old and make is expanded_in_a_parameter_dict:
        pytest.skip("torch before 1.6 saved a module's code with it, which its own weights_only refuses")
    with pytest.raises(ValueError, match=rf"a\.pt has {size} bytes and would take 3072000 in memory: .*stored in full"):
        read(tmp_path / "a.pt")


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    torch.save({"<dog>": torch.ones(1_000, 768)}, tmp_path / "large.pt")
    repack(tmp_path / "large.pt", tmp_path / "a.pt", zipfile.ZIP_DEFLATED)
    size = (tmp_path / "a.pt").stat().st_size
    assert size < 10_000
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match=rf"a\.pt has {size} bytes and would take 307\d{{4}} in memory"):
        read(tmp_path / "a.pt")


def call(function, argument):
    """Return the pickle of a call with a number: torch's `weights_only` allows several functions that make something large."""
    return b"\x80\x02c" + function.encode() + b"\n\x8a\x05" + argument.to_bytes(5, "little") + b"\x85R."


@pytest.mark.parametrize(
    "function", ["builtins\nbytearray", "__builtin__\nbytearray", "torch\nTensor", "torch\nUntypedStorage"]
)
def test_a_pickle_that_makes_something_large_is_refused_before_it_runs(plain, tmp_path, function, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("it ran"))
    repack(plain, tmp_path / "a.pt", code=call(function, 10**9))
    torch.save({"<dog>": ROWS}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pt").read_bytes()
    third = old.index(b"\x80\x02}q\x00X\x05\x00\x00\x00<dog>")  # behind a number, a version and what the machine was
    (tmp_path / "b.pt").write_bytes(old[:third] + call(function, 10**9) + old[third:])
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match=rf"{name} is damaged, or a pickle of more than tensors"):
            read(tmp_path / name)


def test_two_pickles_in_an_archive_are_refused(plain, tmp_path):
    """torch looks for names in any case."""
    repack(plain, tmp_path / "a.pt", twice=True)
    with pytest.raises(ValueError, match=r"a\.pt is damaged, or a pickle of more than tensors"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", ["sparse", "quantized", "meta", "complex"])
def test_only_dense_real_tensors_are_read(tmp_path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about sparse and quantized tensors
        made = {
            "sparse": lambda: ROWS.to_sparse(),
            "quantized": lambda: torch.quantize_per_tensor(ROWS, 0.1, 0, torch.qint8),
            "meta": lambda: ROWS.to("meta"),
            "complex": lambda: ROWS.to(torch.complex64),
        }[kind]()
        torch.save({"<dog>": made}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt (is damaged, or a pickle of more than tensors|cannot be read: rows \(n, d\))"):
        read(tmp_path / "a.pt")


def test_a_state_dict_of_sparse_rows_is_refused():
    with pytest.raises(ValueError, match=r"rows \(n, d\) expected, got \(2, 16\)"):
        DirectionalInversion.from_pretrained({"<dog>": ROWS.to_sparse()})


@pytest.mark.parametrize("version", ["2.4.0", "2.5.1+cu121", "2.9.1", "2.10.0a0"])
def test_an_older_torch_is_refused(plain, version, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("read"))
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    with pytest.raises(ValueError, match=rf"is a pickle, .* torch 2\.10 .* {re.escape(version)} .*Upgrade") as caught:
        read(plain)
    assert "CVE-2026-24747" in str(caught.value) and "dti convert" in str(caught.value)


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0+cpu", "2.11.1"])
def test_a_newer_torch_reads_it(plain, version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    assert read(plain).num_vectors == 2
