"""The script for uv and Jobs, the notebook and the Space, each run as it is, with small models in the real ones' place."""

import functools
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from packaging.requirements import Requirement

from diffusers_dti import DirectionalInversion

ROOT = Path(__file__).parent.parent
EXAMPLES, PAGE = ROOT / "examples", ROOT / "docs" / "cloud.md"


@pytest.fixture
def folder(photos, tmp_path):
    """Return a folder of photos, and work beside it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, photo in enumerate(photos):
        photo.save(folder / f"{i}.png")
    return folder


def needed_by_the_package():
    """Return the names of the package's dependencies."""
    block = re.search(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.S | re.M)
    return {Requirement(text).name for text in re.findall(r'"(.+?)"', block[1])}


# ------------------------------------------------------------------------------------------------------- the script
@pytest.fixture
def train_dti(sdxl, tmp_path, monkeypatch):
    """Return a function that runs the script on a tiny pipeline."""
    import train_dti

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda name, **kwargs: {"some/model": sdxl}[name])
    settings = "--model some/model --placeholder_token <dog> --initializer_token dog --resolution 16 --max_train_steps 2"

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_dti.py", *map(str, arguments), *settings.split()])
        train_dti.main()

    return run


def test_the_script_learns_from_a_folder_and_pushes(train_dti, folder, local_hub, capsys):
    train_dti(folder, "--push_to_hub", "user/dti-dog", "--private")
    assert "Learned <dog>, in out/dti." in capsys.readouterr().out
    learned = DirectionalInversion.from_pretrained("out/dti")
    assert learned.placeholder_token == "<dog>" and learned.metadata["training"]["max_train_steps"] == 2
    repo = local_hub.repos["user/dti-dog"]
    assert (
        repo.private
        and repo.at("main").files["learned_embeds.safetensors"] == Path("out/dti/learned_embeds.safetensors").read_bytes()
    )


def test_the_script_learns_the_same_from_a_data_set(train_dti, folder, monkeypatch):
    import train_dti as script
    from datasets import Dataset, Image

    data = Dataset.from_dict({"image": [str(path) for path in sorted(folder.iterdir())]}).cast_column("image", Image())
    asked = []
    monkeypatch.setattr(script, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or data)
    train_dti(folder)
    train_dti("user/photos", "--output_dir", "out/other")
    assert asked == [(("user/photos",), {"split": "train"})]
    one, other = (DirectionalInversion.from_pretrained(path).directions for path in ("out/dti", "out/other"))
    assert all(torch.equal(one[c], other[c]) for c in one)


def test_the_scripts_metadata():
    """As uv and `hf jobs uv run` read it."""
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    text = (EXAMPLES / "train_dti.py").read_text()
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", text, re.M)
    metadata = tomllib.loads("".join(line[2:] or "\n" for line in block[1].splitlines(keepends=True)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["requires-python"] == project["requires-python"]
    named = {Requirement(text).name for text in metadata["dependencies"]}
    imported = {name.split(".")[0] for name in re.findall(r"^(?:from|import) (\S+)", text, re.M)} - set(sys.stdlib_module_names)
    assert imported <= {name.replace("-", "_") for name in named | needed_by_the_package()}
    assert metadata["tool"]["hf-jobs"] == {"flavor": "l40sx1", "timeout": "1h", "secrets": ["HF_TOKEN"]}


# ----------------------------------------------------------------------------------------------------- the notebook
def code_cells():
    """Return the code of the notebook's cells but the installation."""
    cells = json.loads((EXAMPLES / "notebooks" / "dti.ipynb").read_text())["cells"]
    install, *code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert install.startswith("%pip install ") and all(not c["outputs"] for c in cells if c["cell_type"] == "code")
    return code


def test_the_notebook_on_the_world(tmp_path, monkeypatch):
    import scenes
    from gates import FOLDER

    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    subject = scenes.TEST_SUBJECTS[3]
    for i, photo in enumerate(scenes.photos(subject)):
        photo.save(f"photos/{i}.png")
    small = {"resolution": 32, "max_train_steps": 2}
    for name, value in {
        "MODEL": str(FOLDER / "sdxl"), "PHOTOS": "photos", "INITIALIZER": subject.shape, "SETTINGS": json.dumps(small)
    }.items():  # fmt: skip
        monkeypatch.setenv(f"DTI_{name}", value)
    names: dict = {}
    for cell in code_cells():
        exec(cell, names)
    assert Path("out/dog/learned_embeds_2.safetensors").is_file() and Path("out/dog/curves.png").is_file()
    assert len(names["images"]) == 4 and names["images"][0] != names["images"][2]
    assert list(names["pipe"].directional_inversions) == ["<dog>"]


def test_the_notebook_is_for_sdxl_without_the_environment(monkeypatch):
    names: dict = {}
    exec(code_cells()[0], names)
    assert names["MODEL"] == "stabilityai/stable-diffusion-xl-base-1.0" and names["SETTINGS"] == {}


# -------------------------------------------------------------------------------------------------------- the Space
class GradioError(Exception):
    """Stands in for gr.Error."""


@pytest.fixture
def space(sdxl, tmp_path, monkeypatch):
    """Return the Space's module, with stand-ins for Gradio, which the tests do not need, and for ZeroGPU."""
    gradio, spaces = MagicMock(Error=GradioError), ModuleType("spaces")
    spaces.GPU = lambda duration: lambda function: function
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setitem(sys.modules, "spaces", spaces)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda name, **kwargs: sdxl)
    spec = importlib.util.spec_from_file_location("space_app", EXAMPLES / "space" / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {"resolution": 16, "train_batch_size": 1, "max_train_steps": 5}
    monkeypatch.setattr(module, "DTITrainer", functools.partial(module.DTITrainer, **small))
    original, quick = type(sdxl).__call__, {"num_inference_steps": 1, "height": 16, "width": 16}
    monkeypatch.setattr(type(sdxl), "__call__", lambda self, *args, **kwargs: original(self, *args, **kwargs | quick))
    return module


def test_training_in_several_calls_is_one_run(space, folder, sdxl, monkeypatch):
    """Each call ends after its first step, as if time were over."""
    files = [str(path) for path in sorted(folder.iterdir())]
    *_, whole = space.learn(files, "dog")
    assert len(whole[2]) == 2
    content = [Path(file).read_bytes() for file in whole[2]]
    sdxl.unload_directional_inversion()
    for file in whole[1].iterdir():
        assert file.is_file()  # one call, so no checkpoint
        file.unlink()
    monkeypatch.setattr(space, "SECONDS", -1)
    seen = list(space.learn(files, " dog "))
    assert [text for text, _, _ in seen[1:5]] == [f"Step {n}. The next call goes on from here ..." for n in range(1, 5)]
    assert [Path(file).read_bytes() for file in seen[-1][2]] == content
    assert space.draw("a <mine>", seen[-1][1]).size == (16, 16)
    assert len(list(space.learn(files, "dog"))) == 2  # learned already


def test_what_the_space_refuses(space, folder):
    for photos, word in ((None, "dog"), ([str(folder / "0.png")], " ")):
        with pytest.raises(GradioError, match="Drop 3 to 6 photos"):
            next(space.learn(photos, word))
    with pytest.raises(GradioError, match="Train first"):
        space.draw("a <mine>", None)
    assert space.SECONDS < space.CALL_SECONDS and space.folder_for([], "dog") != space.folder_for([], "cat")


def test_the_spaces_card_and_packages():
    folder = EXAMPLES / "space"
    header = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert header["sdk"] == "gradio" and (folder / header["app_file"]).is_file() and len(header["short_description"]) <= 60
    lines = [line for line in (folder / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert {Requirement(line).name for line in lines} >= needed_by_the_package() | {"spaces"}


# --------------------------------------------------------------------------------------------------------- the page
def test_the_commands_of_the_page_name_what_there_is(capsys):
    import train_dti

    commands = re.findall(r"^((?:uv|hf) .+)$", PAGE.read_text(), re.M)
    assert len(commands) == 6
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", ["train_dti.py", "--help"])
        train_dti.main()
    options = capsys.readouterr().out
    for command in commands:
        for name in re.findall(r" (examples/\S+|diffusers_dti) ", command):
            assert (ROOT / name).exists()
        if "train_dti.py" in command:
            for option in re.findall(r"(--\w+)", command.split("train_dti.py")[1]):
                assert option in options
