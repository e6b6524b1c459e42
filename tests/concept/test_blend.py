"""The command `dti blend`, and the example."""

import re
import sys

import pytest
from PIL import Image

from diffusers_dti import DirectionalInversion
from diffusers_dti.cli import main

CALL = ["--call", "num_inference_steps=1", "height=16", "width=16"]


@pytest.fixture
def ends(sdxl, concept, tmp_path):
    for number, name in enumerate(("dog", "cat")):
        concept(sdxl, f"<{name}>", vectors=2, seed=number).save_pretrained(tmp_path / name)
    return [str(tmp_path / name) for name in ("dog", "cat")]


def dti(*arguments):
    return main([str(a) for a in arguments])


def test_the_strip(model, ends, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["blend", *ends, "--model", model, "--steps", 3, "--output_dir", out, "--save_concepts", *CALL]
    command += ["--prompts", "a {} on the beach", "a red {}", "--seeds", 0, 7]
    assert dti(*command) == 0
    assert re.findall(r"Generating:\s+0%\|\s*\| 0/(\d+)", capsys.readouterr().err) == ["12"]  # one bar over all points
    pictures = sorted(out.rglob("*/*/*.png"))
    names = [f"{seed}/{n}.png" for seed in (0, 7) for n in ("00_a_on_the_beach", "01_a_red")]
    assert [str(p.relative_to(out)) for p in pictures] == [f"{t}/{n}" for t in ("0.000", "0.500", "1.000") for n in names]
    strip = Image.open(out / "strip.png")
    assert strip.width > 3 * 192 and strip.height > 4 * 192
    # the ends are what `dti generate` draws of the two, and the middle is something else
    for t, name, end in (("0.000", "dog", ends[0]), ("1.000", "cat", ends[1])):
        prompts = ["--prompts", f"a <{name}> on the beach", "--seeds", 7, "--output_dir", tmp_path / name]
        assert dti("generate", "--model", model, "--concepts", end, *prompts, *CALL) == 0
        (alone,) = (tmp_path / name / "7").glob("*.png")
        # drawn in other batches: the last digit may differ
        both = [list(Image.open(p).tobytes()) for p in (alone, out / t / "7" / "00_a_on_the_beach.png")]
        assert max(abs(a - b) for a, b in zip(*both, strict=True)) <= 1
    assert len({Image.open(p).tobytes() for p in pictures}) == len(pictures)
    middle = DirectionalInversion.from_pretrained(ends[0]).slerp(DirectionalInversion.from_pretrained(ends[1]), 0.5)
    kept = DirectionalInversion.from_pretrained(out / "0.500")
    for component, v in middle.directions.items():
        assert kept.placeholder_token == "<dog>" and (kept.directions[component] - v).abs().max() < 1e-6
    times = [p.stat().st_mtime_ns for p in pictures]
    assert dti(*command) == 0 and [p.stat().st_mtime_ns for p in pictures] == times  # nothing is drawn twice


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompts", "a <dog>"], "'a <dog>' does not have it"),
        (["--prompts", "a {}", "--steps", "1"], "--steps must be at least 2"),
    ],
)
def test_one_line_says_what_is_wrong(ends, tmp_path, capsys, more, message):
    assert dti("blend", *ends, "--model", "is/not/opened", "--output_dir", tmp_path / "out", *more) == 1
    err = capsys.readouterr().err
    assert err.startswith("dti blend: ") and message in err and not (tmp_path / "out").exists()


def test_what_cannot_be_mixed(sdxl, concept, ends, tmp_path, capsys):
    concept(sdxl, "<one>").save_pretrained(tmp_path / "one")
    arguments = ["--model", "is/not/opened", "--prompts", "a {}", "--output_dir", tmp_path / "out"]
    assert dti("blend", ends[0], tmp_path / "one", *arguments) == 1
    assert "same encoders and number of vectors" in capsys.readouterr().err


def test_the_example(tmp_path, monkeypatch, capsys):
    """With hardly any training, and fewer pictures."""
    import blend

    few = blend.prompt_scenes()[:3]
    monkeypatch.setattr(blend, "prompt_scenes", lambda: few)
    monkeypatch.setattr(blend, "POINTS", 2)
    monkeypatch.setattr(blend, "SHOWN", 1)
    monkeypatch.setattr(sys, "argv", ["blend.py", "--steps", "2", "--out", str(tmp_path)])
    blend.main()
    lines = re.findall(r"t = (\S+)" + r" +(\S+)" * 5, capsys.readouterr().out)
    assert [x[0] for x in lines] == ["0.00", "1.00"] * 2 and lines[0] == lines[2]
    assert all(0 <= float(v) <= 1 for x in lines for v in x)
    assert Image.open(tmp_path / "blend.png").width > 300
    assert DirectionalInversion.from_pretrained(tmp_path / "a").metadata["initializer"] == "circle"
