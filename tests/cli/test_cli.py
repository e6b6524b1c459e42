"""The command `dti`, on pipelines that are opened from their folders."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Literal, Optional

import pytest
import torch
from helpers import no_hanging
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_dti import DirectionalInversion, DTIConfig
from diffusers_dti.cli import COMMANDS, main, train
from diffusers_dti.cli.arguments import scale, seed, setting
from diffusers_dti.cli.settings import given_settings, parser_options
from diffusers_dti.families import FAMILIES
from diffusers_dti.training import propose
from diffusers_dti.training.samples import STYLE_TEMPLATES, prepare_samples

ROOT = Path(__file__).parents[2]
SMALL = ["--resolution", "16", "--train_batch_size", "2", "--max_train_steps", "3"]
CALL = ["--call", "num_inference_steps=1", "height=16", "width=16"]


@pytest.fixture
def subjects(photos, tmp_path):
    """A JSON file of two good subjects with a bad one between them."""
    entries = {}
    for name, word in (("rex", "dog"), ("torn", "dog"), ("tom", "cat")):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i, photo in enumerate(photos):
            photo.save(folder / f"{i}.png")
        entries[name] = {"path": str(folder), "class": word, "initialization": f"red {word}"}
    (tmp_path / "photos" / "torn" / "0.png").write_bytes(b"no picture")
    file = tmp_path / "subjects.json"
    file.write_text(json.dumps(entries))
    return file


def dti(*arguments):
    return main([str(a) for a in arguments])


def bars(capsys):
    """Return the name and length of each bar of ours that was shown, in order."""
    found = re.findall(r"(Generating|Scoring):\s+0%\|\s*\| 0/(\d+)", capsys.readouterr().err)
    return [(name, int(total)) for name, total in found]


def size_of(path):
    with Image.open(path) as image:
        return image.size


def test_help_costs_the_registration_and_nothing_more():
    script = (
        "import sys\n"
        "import diffusers_dti\n"
        "registration = set(sys.modules)\n"
        "from diffusers_dti.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "unwanted = ('training', 'families', 'evaluation', 'data')\n"
        "assert not [m for m in sys.modules if m.startswith(tuple(f'diffusers_dti.{name}' for name in unwanted))]\n"
        "more = {m for m in sys.modules if m not in registration and m.partition('.')[0] not in sys.stdlib_module_names}\n"
        "assert more == {'diffusers_dti.cli'}, more\n"  # no model of diffusers or transformers, for instance
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert all(name in out for name in COMMANDS)


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "diffusers_dti.cli", "--help"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert out.startswith("usage: dti ") and all(name in out for name in COMMANDS)


def test_letters_that_the_output_cannot_encode_are_escaped(tmp_path):
    """As in `dti inspect out/dog > report.txt` on Windows."""
    concept = DirectionalInversion.from_embeddings("<dög犬>", {"text_encoder": torch.ones(1, 768)})
    concept.save_pretrained(tmp_path)
    command = [sys.executable, "-m", "diffusers_dti.cli", "inspect", str(tmp_path)]
    env = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    assert "<dög\\u72ac>" in done.stdout.decode("cp1252")


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        dti("--version")
    assert re.fullmatch(r"dti \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_ends_with_an_example_of_the_documentation(command, capsys):
    """The tests of these pages run the documentation's commands."""
    with pytest.raises(SystemExit):
        dti(command, "--help")
    example = capsys.readouterr().out.rstrip().rpartition("\n")[2].strip()
    assert f"{example} ".startswith(f"dti {command} ")
    pages = [ROOT / "docs" / f"{name}.md" for name in ("quickstart", "command_line", "concepts", "formats", "studio")]
    assert any(example in page.read_text().splitlines() for page in pages)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command):
    parser = argparse.ArgumentParser()
    import_module(f"diffusers_dti.cli.{command}").add_arguments(parser)
    silent = [action.dest for action in parser._actions if not action.help]
    assert not silent and (len(parser._actions) > 2 or command == "env")


def test_every_setting_is_an_option_with_help(capsys):
    with pytest.raises(SystemExit):
        dti("train", "--help")
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(DTIConfig):
        assert re.search(rf"--{field.name}\b", text)
        assert " ".join(field.metadata["help"].split()) in text
    for said in ("of the von Mises-Fisher prior", "pools CLIP's text vector", "the strength of the DCO loss"):
        assert said in text
    for choices in ("--method {dti,ti,crossinit,dco,oft}", "--pooling {eos,legacy}", "--adapter {lora,oft}"):
        assert choices in text
    for family in FAMILIES:
        assert family.name in text


def test_every_default_is_in_the_help():
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    helps = {action.dest: action.help for action in parser._actions}
    assert all("by default" in helps[field.name] for field in fields(DTIConfig))
    assert helps["resolution"].endswith(
        "; by default 768 for SDXL, 512 for Stable Diffusion 1.5 and 2.x and Wan, 1024 for SANA and Z-Image and Lumina 2 and "
        "Stable Diffusion 3 and Flux and FLUX.2 klein and Qwen-Image and PixArt"
    )
    assert helps["num_starts"].endswith("; by default 1") and helps["optimizer"].endswith("; by default rsgd")
    assert helps["seed"].endswith("; by default 42") and helps["scale_lr"].endswith("; by default on")


@pytest.mark.parametrize(
    ("annotation", "choices", "expected"),
    [
        (int | None, None, {"type": int}),
        (float | None, None, {"type": float}),
        (str | Path | None, None, {"type": str}),
        (str | Sequence[str] | None, None, {"nargs": "+"}),
        (Literal["eos", "legacy"], None, {"metavar": "{eos,legacy}"}),
        (Literal["lora", "oft"] | None, None, {"metavar": "{lora,oft}"}),
        (Optional[Literal["bf16"]], None, {"metavar": "{bf16}"}),  # noqa: UP045 (the spelling of Python 3.9)
        (str | float, None, {"type": scale}),
        (Literal["mean"] | float, None, {"type": scale, "metavar": "{mean,NUMBER}"}),
        (str, ("dti", "ti"), {"metavar": "{dti,ti}"}),
        (str, lambda: ("dti", "ti"), {"metavar": "{dti,ti}"}),
    ],
)
def test_options_follow_the_annotation(annotation, choices, expected):
    assert parser_options(annotation, choices) == expected


def test_options_are_read_as_the_settings_types():
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    line = "photos --model m --token_scale 0.5 --kappa 1e-3 --no-scale_lr --random_flip --max_train_steps 7 --method ti"
    args = parser.parse_args([*line.split(), "--validation_prompt", "a {}", "my {}", "--templates", "the {}"])
    assert given_settings(args) == {
        "token_scale": 0.5, "kappa": 1e-3, "scale_lr": False, "random_flip": True, "max_train_steps": 7, "method": "ti",
        "validation_prompt": ["a {}", "my {}"], "templates": ["the {}"],
    }  # fmt: skip
    assert parser.parse_args([*line.split(), "--token_scale", "mean"]).token_scale == "mean"


def test_seeds_are_of_64_bits(capsys):
    assert seed("-7") == -7 and seed(str(2**63 - 1)) == 2**63 - 1
    for wrong in ("1.5", "one", str(2**63), str(-(2**63) - 1)):
        with pytest.raises(SystemExit):
            dti("generate", "--model", "m", "--concepts", "c", "--prompts", "a {}", "--output_dir", "out", "--seeds", wrong)
        assert f"{wrong!r} is not a whole number of 64 bits, from -2**63 to 2**63 - 1" in capsys.readouterr().err


def test_values_of_call_options():
    assert setting("guidance_scale=5") == ("guidance_scale", 5) and setting("a=b=c") == ("a", "b=c")
    assert setting("a=" + "[" * 100_000) == ("a", "[" * 100_000)


def test_a_folder_of_photos(model, subjects, tmp_path, capsys):
    own = ["--placeholder_token", "<rex>", "--initializer_token", "dog", "--output_dir", tmp_path / "out"]
    command = ["train", tmp_path / "photos" / "rex", "--model", model, *SMALL, *own]
    assert dti(*command) == 0
    learned = DirectionalInversion.from_pretrained(tmp_path / "out")
    assert learned.placeholder_token == "<rex>" and learned.metadata["initializer"] == "dog"
    written = (tmp_path / "out" / "learned_embeds.safetensors").stat().st_mtime_ns
    assert dti(*command) == 0 and "already learned" in capsys.readouterr().out
    assert (tmp_path / "out" / "learned_embeds.safetensors").stat().st_mtime_ns == written
    assert dti(*command, "--kappa", 0.5) == 1  # nothing that was trained is lost
    said = capsys.readouterr().err
    assert "with other settings (kappa): choose another --output_dir, or learn it anew with --overwrite." in said
    assert (tmp_path / "out" / "learned_embeds.safetensors").stat().st_mtime_ns == written
    assert dti(*command, "--overwrite") == 0 and "already learned" in capsys.readouterr().out  # it is what was asked for
    assert (tmp_path / "out" / "learned_embeds.safetensors").stat().st_mtime_ns == written


def test_overwriting(model, subjects, tmp_path, capsys, monkeypatch):
    """The earlier concept stays until the new one is whole, which is the one that an empty folder would get."""
    own = ["--placeholder_token", "<rex>", "--initializer_token", "dog"]
    command = ["train", tmp_path / "photos" / "rex", "--model", model, *SMALL, *own, "--checkpointing_steps", 2, "--output_dir"]
    out, fresh, other = tmp_path / "out", tmp_path / "fresh", ["--kappa", 0.5]

    def files():
        return {p.name: p.read_bytes() for p in out.iterdir() if p.suffix == ".safetensors"}

    assert dti(*command, out, "--method", "dco") == 0
    before = files()
    assert before.keys() == {"learned_embeds.safetensors", "learned_embeds_2.safetensors", "pytorch_lora_weights.safetensors"}
    assert dti(*command, out, *other, "--overwrite", "--resume_from_checkpoint", "latest") == 1
    assert "--overwrite learns anew, and --resume_from_checkpoint goes on" in capsys.readouterr().err

    save = DirectionalInversion.save_pretrained

    def full(self, folder):
        if Path(folder).is_relative_to(out):
            raise OSError("no space left on device")
        save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(DirectionalInversion, "save_pretrained", full)
        patch.setattr(tempfile, "tempdir", str(tmp_path))
        assert dti(*command, out, *other, "--overwrite") == 1
    elsewhere = re.search(r"could not be written to. What was learned is in (.+)\.\n", capsys.readouterr().err)[1]
    assert files() == before and DirectionalInversion.from_pretrained(elsewhere).metadata["training"]["kappa"] == 0.5
    assert dti(*command, out, *other, "--overwrite") == 0 and "learned, in" in capsys.readouterr().out
    assert dti(*command, fresh, *other) == 0
    for name in ("learned_embeds.safetensors", "learned_embeds_2.safetensors"):
        assert (out / name).read_bytes() == (fresh / name).read_bytes() != before[name]
    assert files().keys() == before.keys() - {"pytorch_lora_weights.safetensors"}  # it belonged to the earlier concept
    save_file({"mine": torch.ones(1)}, out / "pytorch_lora_weights.safetensors")
    assert dti(*command, out, "--overwrite") == 0 and "pytorch_lora_weights.safetensors" in files()  # this one to nobody here


def test_a_word_is_chosen_once(model, subjects, tmp_path, capsys, monkeypatch):
    """A second command finds the concept complete, and a longer run resumes it, both with the first one's word."""
    monkeypatch.setattr(propose, "candidate_words", lambda encoders: ["cat", "toy"])
    own = ["--placeholder_token", "<rex>", "--initializer_token", "auto", "--output_dir", tmp_path / "out"]
    resuming = ["--checkpointing_steps", "2", "--resume_from_checkpoint", "latest"]
    command = ["train", tmp_path / "photos" / "rex", "--model", model, *SMALL, *own, *resuming, "--lr_scheduler", "constant"]
    assert dti(*command) == 0
    word = DirectionalInversion.from_pretrained(tmp_path / "out").metadata["initializer"]
    assert word in ("cat", "toy")
    monkeypatch.delattr(propose, "propose_initializers")
    assert dti(*command) == 0 and "already learned" in capsys.readouterr().out
    assert dti(*command, "--kappa", 0.5) == 1
    assert "with other settings (kappa): choose another" in capsys.readouterr().err
    assert dti(*command, "--max_train_steps", "5") == 0
    longer = DirectionalInversion.from_pretrained(tmp_path / "out").metadata
    assert longer["initializer"] == word and longer["training"]["max_train_steps"] == 5


def test_several_words_may_be_given(model, subjects, tmp_path, capsys):
    own = ["--placeholder_token", "<rex>", "--initializer_token", "dog", "cat", "--output_dir", tmp_path / "out"]
    command = ["train", tmp_path / "photos" / "rex", "--model", model, *SMALL, *own]
    assert dti(*command) == 0
    assert DirectionalInversion.from_pretrained(tmp_path / "out").metadata["initializer"] in ("dog", "cat")
    assert dti(*command) == 0 and "already learned" in capsys.readouterr().out
    style = ["--initializer_token", "auto", "--learnable_property", "style", "--output_dir", tmp_path / "style"]
    assert dti(*command, *style) == 1 and "looks for a noun, and a style has none" in capsys.readouterr().err


def test_a_concept_may_be_the_initializer(model, subjects, tmp_path, capsys, monkeypatch):
    """A text with a slash is the path of a concept. Tokenized as words it would train as well, from anything."""
    common = ["train", tmp_path / "photos" / "rex", "--model", model, *SMALL, "--placeholder_token", "<rex>"]
    assert dti(*common, "--initializer_token", "red dog", "--output_dir", tmp_path / "star") == 0
    assert "rex: 'red dog' has 2 tokens: the concept has 2 vectors." in capsys.readouterr().out
    for number, path in enumerate((tmp_path / "star", tmp_path / "star" / "learned_embeds.safetensors")):
        command = [*common, "--initializer_token", path, "--learning_rate", 1e-9, "--output_dir", tmp_path / str(number)]
        assert dti(*command) == 0
        assert "rex: '<rex>' has 2 vectors: the concept has 2 vectors." in capsys.readouterr().out
        assert dti(*command) == 0 and "already learned" in capsys.readouterr().out
        start, learned = (DirectionalInversion.from_pretrained(tmp_path / f) for f in ("star", str(number)))
        for component, directions in start.directions.items():
            torch.testing.assert_close(learned.directions[component], directions, rtol=0, atol=1e-5)
    (tmp_path / "dog").mkdir()
    start.save_pretrained(tmp_path / "dog")
    monkeypatch.chdir(tmp_path)  # a word stays a word
    assert dti(*common, "--initializer_token", "dog", "--output_dir", "word") == 0
    assert DirectionalInversion.from_pretrained("word").metadata["initializer"] == "dog"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("photos/rex", "photos/rex has no learned_embeds.safetensors"),
        ('{"<rex>": "dog"}', "--initializer_token takes words and concepts: a mapping from placeholders is for `DTITrainer`."),
    ],
)
def test_an_initializer_that_is_no_word_and_no_concept_is_refused(subjects, tmp_path, capsys, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    own = ["--placeholder_token", "<rex>", "--initializer_token", given, "--output_dir", "out"]
    assert dti("train", "photos/rex", "--model", "is not opened", *own) == 1
    assert message in capsys.readouterr().err


def test_words_may_be_found_for_every_subject_of_a_file(model, subjects, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(propose, "candidate_words", lambda encoders: ["red", "toy"])
    command = ["train", subjects, "--model", model, *SMALL, "--instances", "rex", "tom", "--output_dir", tmp_path / "out"]
    assert dti(*command, "--initializer_token", "dog") == 1
    assert 'initializers come from the file, or are "auto"' in capsys.readouterr().err
    for said in ("learned", "already learned"):
        assert dti(*command, "--initializer_token", "auto") == 0
        assert f"rex: {said}" in capsys.readouterr().out
    for name in ("rex", "tom"):
        assert DirectionalInversion.from_pretrained(tmp_path / "out" / name).metadata["initializer"] in ("red", "toy")


def test_a_failing_subject_stops_no_other(model, subjects, tmp_path, capsys):
    command = ["train", subjects, "--model", model, *SMALL, "--output_dir", tmp_path / "out", "--method", "dco"]
    assert dti(*command) == 1
    said = capsys.readouterr()
    assert "torn: failed, OSError" in said.err and "2 of 3 learned; failed: torn." in said.out
    for name, word in (("rex", "dog"), ("tom", "cat")):
        learned = DirectionalInversion.from_pretrained(tmp_path / "out" / name)
        assert (learned.placeholder_token, learned.metadata["initializer"]) == (f"<{name}>", word)
        assert (tmp_path / "out" / name / "pytorch_lora_weights.safetensors").is_file()
    assert not (tmp_path / "out" / "torn" / "learned_embeds.safetensors").exists()
    assert dti(*command, "--instances", "tom") == 0 and "already learned" in capsys.readouterr().out
    other = ["--output_dir", tmp_path / "other", "--initialize_from", "initialization", "--instances", "rex"]
    assert dti("train", subjects, "--model", model, *SMALL, *other) == 0
    assert DirectionalInversion.from_pretrained(tmp_path / "other" / "rex").num_vectors == 2


def test_styles_are_learned_and_evaluated_as_styles(model, photos, tmp_path, monkeypatch):
    """One of the authors' list, whose caption it is trained with, and one that says it itself, with built-in templates."""
    photos[0].save(tmp_path / "04.png")
    own = {"url": None, "path": "04.png", "images": None, "class": "red toy", "template": "A village in {} style."}
    file, trained = tmp_path / "styles.json", {}
    file.write_text(json.dumps({"04": own, "said": {"path": "04.png", "class": "toy", "learnable_property": "style"}}))

    def keep(family, config, encoders, placeholder, given):
        samples = prepare_samples(family, config, encoders, placeholder, given)
        trained[placeholder] = samples.templates
        return samples

    monkeypatch.setattr("diffusers_dti.training.samples.prepare_samples", keep)
    monkeypatch.chdir(tmp_path)
    assert dti("train", file, "--model", model, *SMALL, "--learnable_property", "style", "--output_dir", "style") == 0
    assert dti("train", file, "--model", model, *SMALL, "--instances", "said", "--output_dir", "plain") == 0
    assert trained == {"<04>": ("A village in {} style.",), "<said>": STYLE_TEMPLATES}
    for folder in ("style/04", "style/said", "plain/said"):
        assert DirectionalInversion.from_pretrained(folder).metadata["training"]["learnable_property"] == "style"
    (tmp_path / "metric.py").write_text(METRIC.replace("== 3", "== 1"))
    command = ["evaluate", file, "--model", model, "--runs", "style", "--metrics", "metric.py:counted", "--output_dir", "out"]
    assert dti(*command, "--instances", "04", "--learnable_property", "style", "--seeds", 0, *CALL) == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 41 and "04 a lighthouse on a cliff in red toy style" in calls


def test_dreambench_plus(model, photos, tmp_path):
    for name in ("captions", "images"):
        (tmp_path / "bench" / name / "object").mkdir(parents=True)
    photos[0].save(tmp_path / "bench" / "images" / "object" / "07.jpg")
    (tmp_path / "bench" / "captions" / "object" / "07.txt").write_text("toy\na toy in the snow\na red toy\n")
    common = [tmp_path / "bench", "--model", model, "--instances", "object_07_toy"]
    assert dti("train", *common, *SMALL, "--output_dir", tmp_path / "run") == 0
    learned = DirectionalInversion.from_pretrained(tmp_path / "run" / "object_07_toy")
    assert (learned.placeholder_token, learned.metadata["initializer"]) == ("<object_07_toy>", "toy")
    (tmp_path / "metric.py").write_text(METRIC.replace("== 3", "== 1"))
    own = ["--runs", tmp_path / "run", "--metrics", f"{tmp_path / 'metric.py'}:counted", "--output_dir", tmp_path / "out"]
    assert dti("evaluate", *common, *own, "--seeds", 0, *CALL) == 0
    assert (tmp_path / "calls").read_text().splitlines() == ["object_07_toy a toy in the snow", "object_07_toy a red toy"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--instances", "nobody", "--output_dir", "o"], "nobody"),
        ([], "--output_dir is needed"),
        (["--placeholder_token", "<x>", "--output_dir", "o"], "placeholders are the subjects' names"),
        (["--method", "lora", "--output_dir", "o"], "method must be one of"),
    ],
)
def test_one_line_says_what_is_wrong(model, subjects, capsys, more, message):
    assert dti("train", subjects, "--model", model, *more) == 1
    err = capsys.readouterr().err
    assert err.startswith("dti train: ") and message in err and "Traceback" not in err


@pytest.fixture
def runs(model, subjects, tmp_path):
    for method in ("dti", "dco"):
        out = ["--output_dir", tmp_path / "runs" / method, "--instances", "rex", "tom"]
        assert dti("train", subjects, "--model", model, *SMALL, "--method", method, *out) == 0
    return tmp_path / "runs"


def test_generate(model, runs, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a <rex> on the beach\n\na <rex> and a <tom>\n")
    command = ["generate", "--model", model, "--concepts", runs / "dti" / "rex", runs / "dco" / "tom", *CALL]
    command += ["--prompt_file", tmp_path / "prompts.txt", "--seeds", 0, 7, "--output_dir", tmp_path / "out"]
    assert dti(*command) == 0
    names = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png"))
    drawn = [f"{seed}/{n}.png" for seed in (0, 7) for n in ("00_a_rex_on_the_beach", "01_a_rex_and_a_tom")]
    assert names == [*drawn, "sheet.png"]
    times = [(tmp_path / "out" / n).stat().st_mtime_ns for n in drawn]
    assert dti(*command) == 0  # nothing is drawn twice
    assert [(tmp_path / "out" / n).stat().st_mtime_ns for n in drawn] == times
    (tmp_path / "out" / drawn[0]).unlink()
    assert dti(*command, "--batch_size", 1) == 0 and (tmp_path / "out" / drawn[0]).is_file()
    assert (tmp_path / "out" / drawn[1]).stat().st_mtime_ns == times[1]
    assert dti(*command, "--token_scale", "max") == 0  # another picture
    assert (tmp_path / "out" / drawn[1]).stat().st_mtime_ns != times[1]
    assert size_of(tmp_path / "out" / "sheet.png")[0] > 2 * 192


def test_a_batch_draws_what_its_pictures_would_be_alone(model, runs, tmp_path):
    for size in (1, 3):
        command = ["generate", "--model", model, "--concepts", runs / "dco" / "rex", *CALL, "--batch_size", size]
        command += ["--prompts", "a <rex>", "a dog", "a toy", "--output_dir", tmp_path / str(size), "--seeds", 3]
        assert dti(*command) == 0
    for one in (tmp_path / "1" / "3").glob("*.png"):
        a, b = (torch.tensor(list(Image.open(p).tobytes()), dtype=torch.int) for p in (one, tmp_path / "3" / "3" / one.name))
        assert (a - b).abs().max() <= 1


METRIC = """
from pathlib import Path

def counted(pictures, texts, subject):
    with (Path(__file__).parent / "calls").open("a") as file:
        file.write("".join(f"{subject.name} {text}\\n" for text in texts))
    assert len(subject.photos) == 3
    return {"subject": [float(p.width) for p in pictures], "prompt": [float(len(t)) for t in texts]}
"""


def test_evaluate(model, subjects, runs, tmp_path, capsys):
    (tmp_path / "metric.py").write_text(METRIC)
    (tmp_path / "prompts.txt").write_text("a {} on the beach\na red {}\n")
    command = ["evaluate", subjects, "--model", model, "--instances", "rex", "tom", "--output_dir", tmp_path / "evaluation"]
    command += ["--runs", runs / "dti", runs / "dco", f"{runs / 'dti'}@max", "--metrics", f"{tmp_path / 'metric.py'}:counted"]
    command += ["--prompt_file", tmp_path / "prompts.txt", "--seeds", 0, 1, *CALL]
    assert dti(*command, "--skip_generation") == 1 and "images of rex are missing" in capsys.readouterr().err
    assert not (tmp_path / "evaluation" / "results.json").exists()
    assert dti(*command) == 0
    assert bars(capsys) == [("Generating", 24), ("Scoring", 24)]  # over all runs and subjects
    result = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert list(result) == ["dti", "dco", "dti@max"] and {r["pictures"] for r in result.values()} == {8}
    assert result["dti"]["subjects"]["rex"]["subject"]["mean"] == 16
    # the class word is in the token's place
    assert result["dti"]["mean"]["prompt"]["mean"] == (len("a dog on the beach") + len("a red dog")) / 2
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3 * 8 and "tom a cat on the beach" in calls
    assert "| dti@max | 16.000" in (tmp_path / "evaluation" / "results.md").read_text()
    assert size_of(tmp_path / "evaluation" / "results.png")[0] > 500
    folder = tmp_path / "evaluation" / "pictures"
    one = folder / "dti" / "rex" / "0" / "00_a_dog_on_the_beach.png"
    rescaled = folder / "dti@max" / "rex" / "0" / one.name
    assert Image.open(one).tobytes() != Image.open(rescaled).tobytes()
    assert dti(*command) == 0 and len((tmp_path / "calls").read_text().splitlines()) == 24  # nothing is scored twice
    one.unlink()
    assert dti(*command, "--skip_generation") == 1
    err = capsys.readouterr().err
    assert "1 of 4 images of rex are missing" in err and one.name in err


def test_baselines_are_in_the_same_tables(model, subjects, runs, tmp_path, capsys):
    (tmp_path / "metric.py").write_text(METRIC)
    (tmp_path / "prompts.txt").write_text("a {} on the beach\n")
    command = ["evaluate", subjects, "--model", model, "--instances", "rex", "--output_dir", tmp_path / "evaluation", *CALL]
    command += ["--metrics", f"{tmp_path / 'metric.py'}:counted", "--prompt_file", tmp_path / "prompts.txt", "--seeds", 0]
    assert dti(*command) == 1 and "nothing to evaluate: give --runs, --baselines or both" in capsys.readouterr().err
    described = [*command, "--runs", runs / "dti", "--baselines", "class", "description"]
    assert dti(*described) == 1
    assert 'dti evaluate: rex has no "description" for the baseline: add the field' in capsys.readouterr().err
    assert not (tmp_path / "evaluation").exists()  # nothing was generated before
    entries = json.loads(subjects.read_text())
    entries["rex"]["description"] = "red dog on a ball"
    subjects.write_text(json.dumps(entries))
    assert dti(*described) == 0
    result = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert list(result) == ["dti", "class", "description"]
    assert {r["mean"]["prompt"]["mean"] for r in result.values()} == {len("a dog on the beach")}
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "evaluation" / "pictures").rglob("*.png")}
    assert dti(*command, "--baselines", "class", "description") == 0  # without a run, and nothing is drawn twice
    assert list(json.loads((tmp_path / "evaluation" / "results.json").read_text())) == ["class", "description"]
    assert written == {p: p.stat().st_mtime_ns for p in (tmp_path / "evaluation" / "pictures").rglob("*.png")}
    assert len((tmp_path / "calls").read_text().splitlines()) == len(written) == 3


def test_scores_against_photos_that_training_did_not_see(model, subjects, runs, tmp_path, capsys):
    """The runs of the fixture have seen all photos. They are refused, also once their record is gone."""
    (tmp_path / "metric.py").write_text(METRIC.replace("== 3", "== 1"))
    (tmp_path / "prompts.txt").write_text("a {}\n")
    common = [subjects, "--model", model, "--instances", "rex"]
    command = ["evaluate", *common, "--output_dir", tmp_path / "evaluation", *CALL, "--held_out", "--seeds", 0]
    command += ["--metrics", f"{tmp_path / 'metric.py'}:counted", "--prompt_file", tmp_path / "prompts.txt", "--runs"]
    assert dti(*command, runs / "dti") == 1 and 'rex has no "held_out": name the photos' in capsys.readouterr().err
    entries = json.loads(subjects.read_text())
    entries["rex"]["held_out"] = ["1.png"]
    subjects.write_text(json.dumps(entries))
    assert dti(*command, runs / "dti") == 1 and "rex was trained on 1.png" in capsys.readouterr().err
    (runs / "dti" / "rex" / "photos.json").unlink()
    assert dti(*command, runs / "dti", "--skip_generation") == 1
    assert "rex does not tell which photos its concept was trained on (photos.json)" in capsys.readouterr().err
    assert not (tmp_path / "calls").exists()
    assert dti("train", *common, *SMALL, "--output_dir", tmp_path / "unseen") == 0
    assert dti(*command, tmp_path / "unseen", "--baselines", "class") == 0  # the metric checks that there is one photo
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


def test_evaluate_what_was_not_learned(model, subjects, tmp_path, capsys):
    (tmp_path / "metric.py").write_text(METRIC)
    command = ["evaluate", subjects, "--model", model, "--runs", tmp_path / "nothing", "--output_dir", tmp_path / "evaluation"]
    assert dti(*command, "--metrics", f"{tmp_path / 'metric.py'}:counted", *CALL) == 1
    assert "nothing has not learned rex" in capsys.readouterr().err


def test_what_would_be_mistaken_for_something_else(model, subjects, runs, tmp_path, capsys):
    """A finished folder that is not whole, another model, runs of one name, repeated seeds, misspelled arguments."""
    command = [
        "train",
        subjects,
        "--model",
        model,
        *SMALL,
        "--instances",
        "rex",
        "--output_dir",
        runs / "dco",
        "--method",
        "dco",
    ]
    (runs / "dco" / "rex" / "pytorch_lora_weights.safetensors").unlink()
    assert dti(*command) == 0 and "rex: learned" in capsys.readouterr().out  # again
    assert (runs / "dco" / "rex" / "pytorch_lora_weights.safetensors").is_file()
    other = tmp_path / "another"
    shutil.copytree(model, other)
    assert dti(*command[:3], other, *command[4:]) == 1 and "(base_model)" in capsys.readouterr().err

    (tmp_path / "metric.py").write_text(METRIC)
    shutil.copytree(runs / "dti", tmp_path / "more" / "dti")
    common = ["evaluate", subjects, "--model", model, "--instances", "rex", "--output_dir", tmp_path / "evaluation", *CALL]
    common += ["--metrics", f"{tmp_path / 'metric.py'}:counted"]
    (tmp_path / "prompts.txt").write_text("a {} on the beach\n")
    common += ["--prompt_file", tmp_path / "prompts.txt"]
    assert dti(*common, "--runs", runs / "dti", tmp_path / "more" / "dti") == 1 and "same name" in capsys.readouterr().err
    assert dti(*common, "--runs", runs / "dti", "--seeds", 0, 0, 0) == 0
    assert json.loads((tmp_path / "evaluation" / "results.json").read_text())["dti"]["pictures"] == 1
    picture = tmp_path / "evaluation" / "pictures" / "dti" / "rex" / "0" / "00_a_dog_on_the_beach.png"
    drawn = picture.read_bytes()
    assert str(tmp_path) not in drawn.decode("latin-1")
    assert dti("evaluate", *common[1:3], other, *common[4:], "--runs", runs / "dti", "--seeds", 0) == 0
    assert picture.read_bytes() != drawn  # from another model
    assert dti(*common, "--runs", runs / "dti", "--call", "guidance_scal=7") == 1
    assert "cannot be called with guidance_scal" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("a {} on the beach, on the left\n")
    picture.rename(picture.with_name("00_a_dog_on_the_beach_on_the_left.png"))
    assert dti(*common, "--runs", runs / "dti", "--seeds", 0, "--skip_generation") == 1
    assert "are missing" in capsys.readouterr().err


def test_the_metric_of_the_documentation(model, subjects, runs, tmp_path):
    (body,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "command_line.md").read_text(), re.S)
    (tmp_path / "metric.py").write_text(body)
    (tmp_path / "prompts.txt").write_text("a {}\n")
    command = ["evaluate", subjects, "--model", model, "--instances", "rex", "--output_dir", tmp_path / "out", *CALL]
    command += ["--prompt_file", tmp_path / "prompts.txt", "--seeds", 0, "--runs", runs / "dti"]
    assert dti(*command, "--metrics", f"{tmp_path / 'metric.py'}:colors") == 0
    (image,) = (tmp_path / "out" / "pictures").rglob("*.png")
    means = []
    for path in (image, *(tmp_path / "photos" / "rex").iterdir()):
        with Image.open(path) as opened:
            means.append(torch.tensor(list(opened.tobytes()), dtype=torch.float64).view(-1, 3).mean(0))
    expected = 1 - (means[0] - torch.stack(means[1:]).mean(0)).abs().mean().item() / 255
    score = json.loads((tmp_path / "out" / "results.json").read_text())["dti"]["mean"]["colors"]["mean"]
    assert score == pytest.approx(expected) and 0 < score < 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{'a': [1.0] * 9}", "finite number for each of 1 images"),
        ("{'a': [float('nan')]}", "finite number"),
        ("[1.0]", "under each score's name"),
    ],
)
def test_metrics_that_give_something_else(model, subjects, runs, tmp_path, capsys, body, message):
    (tmp_path / "metric.py").write_text(f"def bad(pictures, texts, subject):\n    return {body}\n")
    (tmp_path / "prompts.txt").write_text("a {}\n")
    command = ["evaluate", subjects, "--model", model, "--instances", "rex", "--output_dir", tmp_path / "evaluation", *CALL]
    command += ["--prompt_file", tmp_path / "prompts.txt", "--seeds", 0, "--runs", runs / "dti"]
    assert dti(*command, "--metrics", f"{tmp_path / 'metric.py'}:bad") == 1 and message in capsys.readouterr().err


def test_a_longer_run_and_an_interrupted_one(model, subjects, tmp_path, capsys, monkeypatch):
    command = ["train", subjects, "--model", model, *SMALL, "--instances", "rex", "--output_dir", tmp_path / "out"]
    command += ["--checkpointing_steps", 1, "--lr_scheduler", "constant"]
    assert dti(*command) == 0
    longer = [*command, "--max_train_steps", 5]
    assert dti(*longer) == 1 and "(max_train_steps)" in capsys.readouterr().err
    assert dti(*longer, "--resume_from_checkpoint", "latest") == 0
    assert (tmp_path / "out" / "rex" / "checkpoint-5").is_dir()

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusers_dti.training.trainer.DTITrainer.fit", stop)
    assert dti(*command, "--seed", 3, "--output_dir", tmp_path / "stopped") == 130
    assert "stopped. Finished results are kept." in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no such files")
def test_generate_from_what_is_not_a_regular_file(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    command = ["generate", "--model", "none", "--concepts", "none", "--output_dir", tmp_path / "out"]
    with no_hanging():
        assert dti(*command, "--prompt_file", tmp_path / "pipe") == 1
    assert "pipe is not a file: give a text file" in capsys.readouterr().err


def test_generate_with_braces(model, runs, tmp_path, capsys):
    command = ["generate", "--model", model, *CALL, "--prompts", "a {} on the beach", "a dog", "--output_dir", tmp_path / "out"]
    assert dti(*command, "--token_scale", "0.5", "--concepts", runs / "dti" / "rex") == 0
    assert "'a dog' does not contain <rex>" in capsys.readouterr().err
    assert (tmp_path / "out" / "0" / "00_a_rex_on_the_beach.png").is_file()
    assert dti(*command, "--concepts", runs / "dti" / "rex", runs / "dti" / "tom") == 1
    assert "any of <rex>, <tom>" in capsys.readouterr().err


def test_generate_with_another_scheduler(model, runs, tmp_path, capsys):
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    out = tmp_path / "out"
    call = ["--call", "num_inference_steps=2", "height=16", "width=16"]
    command = ["generate", "--model", model, *call, "--prompts", "a {} on the beach", "--output_dir", out]
    command += ["--concepts", runs / "dti" / "rex"]
    file, seen = out / "0" / "00_a_rex_on_the_beach.png", []
    for scheduler in ([], ["--scheduler", "EulerDiscreteScheduler"]):
        assert dti(*command, *scheduler) == 0
        seen.append(file.read_bytes())
    assert seen[0] != seen[1]  # it was generated again, by another scheduler
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.load_directional_inversion(runs / "dti" / "rex")
    size = {"num_inference_steps": 2, "height": 16, "width": 16}
    expected = pipe("a <rex> on the beach", generator=torch.Generator().manual_seed(0), **size).images[0]
    with Image.open(file) as image:
        difference = torch.tensor(list(image.tobytes()), dtype=torch.int) - torch.tensor(list(expected.tobytes()))
        assert difference.abs().max() <= 1
    for wrong in ("EulerScheduler", "FlowMatchEulerDiscreteScheduler", "DiffusionPipeline"):
        assert dti(*command, "--scheduler", wrong) == 1
        said = capsys.readouterr().err
        assert f"--scheduler {wrong} is not compatible with" in said and "DDIMScheduler, " in said
    assert file.read_bytes() == seen[1]


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_generate_under_offload(model, runs, tmp_path, capsys, monkeypatch, kind):
    from diffusers import DiffusionPipeline

    command = ["generate", "--model", model, *CALL, "--prompts", "a {}", "--output_dir", tmp_path / "out", "--dtype", "float32"]
    command += ["--concepts", runs / "dti" / "rex", "--offload", kind]
    assert dti(*command, "--device", "cpu") == 1
    assert (
        f"--offload {kind} keeps weights off a GPU, and the model is opened on the CPU: leave it out."
        in capsys.readouterr().err
    )
    seen = []
    monkeypatch.setattr(
        DiffusionPipeline, f"enable_{kind}_cpu_offload", lambda self, device: seen.append((self.device, device))
    )
    monkeypatch.setattr("diffusers_dti.cli.open_pipeline.check_device", torch.device)  # as on a machine that has one
    assert dti(*command, "--device", "cuda:1") == 0
    assert seen == [(torch.device("cpu"), torch.device("cuda:1"))] and (tmp_path / "out" / "sheet.png").is_file()


def test_generate_with_two_concepts_of_one_word(model, runs, tmp_path, capsys):
    command = ["generate", "--model", model, *CALL, "--prompts", "a <a> and a <rex>", "--output_dir", tmp_path / "out"]
    assert dti(*command, "--concepts", runs / "dti" / "rex", runs / "dco" / "rex") == 1
    assert "<rex> is already loaded" in capsys.readouterr().err
    loaded = []
    for concepts in (
        [runs / "dti" / "rex", f"{runs / 'dco' / 'rex'}=<a>"],
        [runs / "dti" / "rex", f"{runs / 'dti' / 'tom'}=<a>"],
    ):
        assert dti(*command, "--concepts", *concepts) == 0
        loaded.append((tmp_path / "out" / "0" / "00_a_a_and_a_rex.png").read_bytes())
    assert loaded[0] != loaded[1] and "does not contain" not in capsys.readouterr().err
    assert dti(*command, "--concepts", f"{runs / 'dti' / 'rex'}=") == 1 and "rex= does not exist" in capsys.readouterr().err


def test_generate_with_a_lora(model, runs, tmp_path, capsys):
    """The adapter of another concept, from its folder or its file, changes the image; without it the image is made anew."""
    command = ["generate", "--model", model, *CALL, "--concepts", runs / "dti" / "rex", "--prompts", "a <rex>"]
    command += ["--output_dir", tmp_path / "out"]
    image, adapter = tmp_path / "out" / "0" / "00_a_rex.png", runs / "dco" / "tom" / "pytorch_lora_weights.safetensors"
    strong = {name: weight * 100 for name, weight in load_file(adapter).items()}
    save_file(strong, adapter)
    assert dti(*command) == 0
    plain = Image.open(image).tobytes()
    for lora in (adapter, adapter.parent):
        assert dti(*command, "--lora", lora) == 0
        assert Image.open(image).tobytes() != plain
        assert dti(*command) == 0 and Image.open(image).tobytes() == plain
    assert dti(*command, "--lora", tmp_path) == 1
    assert f"{tmp_path} has no pytorch_lora_weights.safetensors: give the file of the LoRA." in capsys.readouterr().err


@pytest.mark.long
def test_two_processes_learn_what_one_learns(model, subjects, tmp_path):
    """As under accelerate launch: two batches of 2 are a batch of 4 (but for the DCO loss, which is not linear)."""
    common = [subjects, "--model", model, "--instances", "rex", "--resolution", 16, "--max_train_steps", 5, "--adapter", "lora"]
    # what accelerate launch does with GPUs
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--rdzv_backend", "c10d"]
    launch += ["--rdzv_endpoint", "localhost:0", "-m", "diffusers_dti.cli", "train"]
    two = [*launch, *common, "--train_batch_size", 2, "--output_dir", tmp_path / "two", "--checkpointing_steps", 5]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(x) for x in two], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("rex: learned") == 1 and done.stderr.count("Encoding photos:   0%") == 1
    assert dti("train", *common, "--train_batch_size", 4, "--output_dir", tmp_path / "one") == 0
    found, expected = (DirectionalInversion.from_pretrained(tmp_path / n / "rex") for n in ("two", "one"))
    for component, v in expected.directions.items():
        torch.testing.assert_close(found.directions[component], v, rtol=0, atol=1e-5)
    log = [json.loads(line) for line in (tmp_path / "two" / "rex" / "train_log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in log] == [5]


def test_what_cannot_be_saved_is_kept_elsewhere(model, subjects, tmp_path, capsys, monkeypatch):
    """A full disk at the end of a run: the process ends, and with it the pipeline that holds the concept."""
    save, folder = DirectionalInversion.save_pretrained, tmp_path / "out" / "rex"

    def full(self, save_directory):
        if Path(save_directory) == folder:
            raise OSError("no space left on device")
        save(self, save_directory)

    monkeypatch.setattr(DirectionalInversion, "save_pretrained", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    command = ["train", subjects, "--model", model, *SMALL, "--instances", "rex", "--output_dir", tmp_path / "out"]
    assert dti(*command) == 1
    said = capsys.readouterr().err
    assert "could not be written to. What was learned is in" in said and "rex: failed" in said
    (kept,) = tmp_path.glob("dti-*")
    assert DirectionalInversion.from_pretrained(kept).metadata["initializer"] == "dog"


@pytest.mark.parametrize(("device", "reason"), [("cuda", ""), ("warp:3", "warp")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_device_that_is_not_here_is_one_line(model, tmp_path, capsys, device, reason):
    assert (
        dti("generate", "--model", model, "--concepts", "x", "--prompts", "a", "--output_dir", tmp_path, "--device", device)
        == 1
    )
    err = capsys.readouterr().err
    assert err.startswith(f"dti generate: --device {device} cannot be used here: ") and err.count("\n") == 1 and reason in err
