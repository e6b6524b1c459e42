"""`dti studio`: what it says without Gradio, and how it reads its options. The page itself: tests/studio."""

import pytest

from diffusers_dti.cli import main, studio


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(studio, "find_spec", lambda name: None)
    assert main(["studio"]) == 1
    assert 'pip install "diffusers-dti[studio]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("examples/worlds/sdxl=32", ("examples/worlds/sdxl", 32)),
        ("user/model", ("user/model", None)),
        ("models/a=b", ("models/a=b", None)),
        ("=32", ("=32", None)),
    ],
)
def test_a_model_may_have_a_resolution(text, expected):
    assert studio._read_model(text) == expected
