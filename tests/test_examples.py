"""The example scripts, with less of everything."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from diffusers_dti.families import find_family


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()


def test_two_tokens(tmp_path, monkeypatch, capsys):
    import two_tokens

    run(two_tokens, monkeypatch, "--steps", 8, "--out", tmp_path)
    assert "background" in capsys.readouterr().out and (tmp_path / "validation.png").is_file()


@pytest.mark.parametrize("name", ["sana", "wan"])
def test_a_checkpoint_and_photos_of_ones_own(name, request, photos, tmp_path, monkeypatch):
    """A tiny pipeline in the checkpoint's place."""
    import sana
    import wan

    module, pipe = {"sana": sana, "wan": wan}[name], request.getfixturevalue(name)
    for i, photo in enumerate(photos):
        photo.save(tmp_path / f"{i}.png")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda model, **kwargs: {"some/model": pipe}[model])
    family, call = type(find_family(pipe)), type(pipe).__call__
    monkeypatch.setattr(family, "defaults", family.defaults | {"resolution": 32})
    small = {"height": 32, "width": 32, "num_inference_steps": 1} | (
        {"use_resolution_binning": False} if name == "sana" else {"num_frames": 5}
    )
    monkeypatch.setattr(type(pipe), "__call__", lambda self, *args, **kwargs: call(self, *args, **kwargs | small))
    arguments = ["--model", "some/model", "--photos", tmp_path, "--steps", 2, "--out", tmp_path / "out"]
    run(module, monkeypatch, *arguments, "--initializer", "dog")
    assert pipe.directional_inversions["<mine>"].metadata["initializer"] == "dog"
    assert (tmp_path / "out" / "mine" / "learned_embeds.safetensors").is_file()
    if name == "sana":
        assert Image.open(tmp_path / "out" / "sana.png").size == (32, 32)
    else:
        assert Image.open(tmp_path / "out" / "wan.gif").n_frames == 5
    with pytest.raises(SystemExit):
        run(module, monkeypatch, "--model", "some/model")


@pytest.mark.parametrize("name", ["sana", "wan"])
def test_in_the_small_world(name, tmp_path, monkeypatch, capsys):
    import sana
    import wan

    run({"sana": sana, "wan": wan}[name], monkeypatch, "--steps", 2, "--out", tmp_path)
    printed = capsys.readouterr().out
    assert "Directional Textual Inversion" in printed and f"See {tmp_path / f'{name}.png'}" in printed
    assert Image.open(tmp_path / f"{name}.png").width > 1000
    if name == "wan":
        assert Image.open(tmp_path / "wan.gif").size == (256, 256) and Image.open(tmp_path / "wan.gif").n_frames == 5


def test_the_protocol(tmp_path, monkeypatch, capsys):
    import protocol

    run(protocol, monkeypatch, "--methods", "dti", "ti", "--steps", 2, "--seeds", 0, "--out", tmp_path)
    table = (tmp_path / "evaluation" / "results.md").read_text()
    assert "| ti@mean | " in table and "| run | dinov2 | siglip | subject | prompt | pictures |" in table
    assert "tiny random models and mean nothing" in capsys.readouterr().out
    assert (tmp_path / "images" / "sheet.png").is_file() and (tmp_path / "evaluation" / "results.png").is_file()


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples" / "benchmarks")


def test_many_words(sdxl, tmp_path, benchmarks):
    import many_words

    times = many_words.measure(sdxl, 60, tmp_path)
    assert len(times) == 9 and min(times.values()) > 0 and sdxl.directional_inversions == {}
    many_words.load_by_stock(sdxl)
    assert "<stock>" in sdxl.tokenizer.get_vocab() and "<stock>" in sdxl.tokenizer_2.get_vocab()
    tokens = many_words.tokenizer(2000)
    assert len(tokens) == 2000 and len(tokens("some words").input_ids) > 2


@pytest.mark.parametrize("family", ["sdxl", "sana", "wan"])
def test_a_step_does_the_work_of_its_floor(family, benchmarks, monkeypatch):
    """The benchmark itself raises if the numbers of operations differ."""
    import pipelines
    import steps

    real = pipelines.tokenizer
    monkeypatch.setattr(pipelines, "tokenizer", lambda size, length=77: real(500, length))
    line = steps.row(family, steps.measure(family, 1, 2))
    assert line.startswith(f"| {family} | ") and line.count(" | ") == 5


def test_subjects_at_a_time(benchmarks):
    import subjects

    pipe, short = subjects.open_world("sdxl"), {"max_train_steps": 2, "learning_rate": 0.01, "heldout_loss_steps": 0}
    alone, figures = subjects.learn(pipe, 2, 1, 0, **short)
    both, _ = subjects.learn(pipe, 2, 2, 0, **short)
    turned, _ = subjects.learn(pipe, 2, 2, 0, turned=1e-2, **short)
    assert figures["seconds"] > figures["steps"] > 0 and subjects.angles(alone, alone).max() == 0
    assert subjects.angles(both, alone).max() < 1e-2 < subjects.angles(turned, alone).min()
    assert 0 < subjects.score(pipe, alone[:1], 0)["subject"] <= 1 and pipe.directional_inversions == {}


def test_programs_that_learned_something_else_are_not_compared(benchmarks, tmp_path):
    import peers

    for rows, message in (({}, r"has \[\] vectors in 0 files"), ({"<zog>": torch.ones(2, 8)}, r"has \[2\] vectors in 1 files")):
        if rows:
            save_file(rows, tmp_path / "learned_embeds.safetensors")
        with pytest.raises(RuntimeError, match=message):
            peers.check_learned(tmp_path)
    save_file({"<zog>": torch.ones(8)}, tmp_path / "learned_embeds.safetensors")
    peers.check_learned(tmp_path)
    with pytest.raises(RuntimeError, match="failed:\n.*no such thing"):
        peers.run(["-c", "raise SystemExit('no such thing')"])


SCRIPTS = (
    "quickstart.py",
    "protocol.py",
    "two_tokens.py",
    "blend.py",
    "sana.py",
    "wan.py",
    "benchmarks/text_length.py",
    "benchmarks/many_words.py",
    "benchmarks/steps.py",
    "benchmarks/peers.py",
    "benchmarks/subjects.py",
    "worlds/gates.py",
    "worlds/study.py",
)


START_ALL = """
import contextlib, io, runpy, sys
from pathlib import Path

paths = list(sys.path)
for script in sys.argv[1:]:
    before = set(sys.modules)
    sys.argv, sys.path[:] = [script, "--help"], [str(Path(script).parent), *paths]  # as python itself does
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
    else:
        raise AssertionError(f"{script} has no --help")
    for name in set(sys.modules) - before:
        if "/examples/" in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]  # the next script has to find it by itself
"""


def test_every_script_starts_from_anywhere(tmp_path):
    """Without the paths that pytest sets. In one process for all, since importing diffusers takes 6 s."""
    folder = Path(__file__).parent.parent / "examples"
    subprocess.run([sys.executable, "-c", START_ALL, *(folder / script for script in SCRIPTS)], cwd=tmp_path, check=True)
