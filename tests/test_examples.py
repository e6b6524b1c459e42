"""The example scripts, with less of everything."""

import re
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


@pytest.mark.long
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


def test_failures(tmp_path, monkeypatch, capsys):
    """Less training, and a cure that two sheets share. It is learned once."""
    import failures

    few, masked = {"max_train_steps": 2}, failures.CASES["background"][2].data
    cured = failures.Run("cured", few)
    cases = {"a": (failures.Run("masked", few, masked), cured), "b": (failures.Run("loaded", few, token_scale="max"), cured)}
    learned, learn = [], failures.learn
    monkeypatch.setattr(failures, "CASES", cases)
    monkeypatch.setattr(failures, "learn", lambda pipe, run: learned.append(run.label) or learn(pipe, run))
    run(failures, monkeypatch, "--out", tmp_path)
    assert learned == ["masked", "cured", "loaded"] and capsys.readouterr().out.count("  prompt ") == 4
    assert Image.open(tmp_path / "a.png").size == Image.open(tmp_path / "b.png").size


def test_the_gallery_has_every_failure():
    import failures

    page = (Path(__file__).parent.parent / "docs" / "failures.md").read_text()
    assert re.findall(r"\(failures/(\w+)\.png\)", page) == list(failures.CASES)


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


@pytest.fixture
def small_vocabularies(benchmarks, monkeypatch):
    import pipelines

    monkeypatch.setattr(pipelines, "VOCABULARY", dict.fromkeys(pipelines.FAMILIES, 500))


@pytest.mark.parametrize("family", ["sdxl", "sana", "wan"])
def test_a_step_does_the_work_of_its_floor(family, small_vocabularies):
    """The benchmark itself raises if the numbers of operations differ. In bfloat16 and accumulated, as on a GPU."""
    import pipelines
    import steps

    line = steps.row(family, steps.measure(steps.Case(family), 2))
    assert line.startswith(f"| {family} | ") and line.count(" | ") == 5
    configs = {family: pipelines.SMALL[family]}  # other than `SMALL` itself: in the resolution and dtype of full models
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pipelines.FULL_RESOLUTION, family, pipelines.RESOLUTION[family] // 4)
        case = steps.Case(family, 1, 1 if family == "sdxl" else 2, configs)
        assert case.build().vae.dtype == torch.bfloat16
        assert len(steps.measure(case, 1)["floor"]) == 1


def test_the_profile_of_a_step(small_vocabularies):
    import steps

    parts, operators, outside = steps.profile(steps.Case("sana"), 2).strip("| ").split(" | ")[1:]
    assert "backward" in parts and "denoiser, forward" in parts and operators.count("%") == 3 and 0 < float(outside[:-1]) < 100


def test_full_models_have_the_sizes_of_the_real_ones(small_vocabularies):
    """Without memory, on torch's "meta" device: millions of parameters, as published; the encoders' without vocabulary."""
    import pipelines

    millions = {
        "sdxl": {"text_encoder": 85.1, "text_encoder_2": 631.4, "unet": 2567.5, "vae": 83.7},
        "sana": {"text_encoder": 2024.5, "transformer": 1604.5, "vae": 312.3},
        "wan": {"text_encoder": 4630.8, "transformer": 1419.0, "vae": 126.9},
    }
    for family, sizes in millions.items():
        pipe = pipelines.build(family, pipelines.FULL, "meta", torch.bfloat16)
        for name, expected in sizes.items():
            model = getattr(pipe, name)
            count = sum(p.numel() for p in model.parameters())
            if name.startswith("text"):
                count -= model.get_input_embeddings().weight.numel()
            assert count / 1e6 == pytest.approx(expected, abs=0.1), (family, name)


def test_growth(small_vocabularies, monkeypatch, capsys):
    import growth

    monkeypatch.setattr(growth, "VALUES", {"photos": (2,), "batch": (2,), "vectors": (2,), "concepts": (2,)})
    run(growth, monkeypatch, "sana", "--steps", 2, "--repeat", 1, "--what", "photos", "vectors", "concepts")
    printed = capsys.readouterr().out
    assert [line.split(" |")[0] for line in printed.splitlines()[2:]] == ["| photos 2", "| vectors 2", "| concepts 2"]


def test_the_whole_table(small_vocabularies, sdxl, tmp_path, monkeypatch, capsys):
    """All in this process, since importing diffusers takes 6 s."""
    import many_words
    import peers
    import table

    monkeypatch.setattr(table, "in_new_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(many_words, "build", lambda family: sdxl)
    monkeypatch.setattr(peers, "run", lambda command: (1.0, 700.0))
    measured = {"diffusers-dti": [(10.0, 6.0, 700.0)] * 2, "another": [(20.0, 6.0, 700.0), (30.0, 6.0, 700.0)]}
    monkeypatch.setattr(peers, "measure", lambda args: measured if args.model == tmp_path / "sana" else {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run(table, monkeypatch, "sana", "--quick", "--models", tmp_path, "--photos", tmp_path)
    printed = capsys.readouterr().out
    rows = dict(line.strip("| ").split(" | ") for line in printed[printed.index("| step, ours") :].splitlines())
    assert rows["a process, another, CPU ms a step"] == "25.0 [20.0, 30.0], 2.50 times ours"
    assert rows["full size, on a GPU"] == "not measured" and rows["import, CPU s"] == "1.00"
    assert 0.2 < float(rows["step, ours / floor, CPU"]) < 5 and float(rows["load 60 in one call, CPU ms a concept"]) > 0
    with pytest.raises(SystemExit):
        run(table, monkeypatch, "sana", "--models", "models")


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


@pytest.mark.parametrize(("interval", "expected"), [(None, 256), (1, 384), (2, 384), (3, 384)])
def test_the_memory_that_checkpoints_take(interval, expected, benchmarks):
    """Two parts that each save the input of their SiLU, 128 bytes. Their own inputs take as much."""
    import memory

    layers = torch.nn.Linear(8, 8), torch.nn.SiLU(), torch.nn.Linear(8, 8)
    parts = [torch.nn.Sequential(*layers).requires_grad_(False) for _ in range(2)]
    saved = memory.Saved({id(p) for part in parts for p in part.parameters()})
    states = torch.ones(4, 8, requires_grad=True)
    for part in parts:
        states = saved.run(part, states)
    assert saved.bytes(interval) == expected


SCRIPTS = (
    "quickstart.py",
    "protocol.py",
    "two_tokens.py",
    "blend.py",
    "sana.py",
    "wan.py",
    "train_dti.py",
    "benchmarks/text_length.py",
    "benchmarks/many_words.py",
    "benchmarks/steps.py",
    "benchmarks/peers.py",
    "benchmarks/growth.py",
    "benchmarks/table.py",
    "benchmarks/memory.py",
    "benchmarks/subjects.py",
    "worlds/gates.py",
    "worlds/study.py",
    "worlds/failures.py",
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
