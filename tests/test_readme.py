"""The README's Python, run as it stands, with a tiny pipeline in the checkpoint's place."""

import functools
import io
import json
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_dti.families import find_family
from diffusers_dti.families.stable_diffusion import StableDiffusionXL as family
from diffusers_dti.training import defaults

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_code_for_sana_and_wan(sana, wan, photos, tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "sana_and_wan.md").read_text(), re.S)
    (tmp_path / "photos" / "dog").mkdir(parents=True)
    for i, photo in enumerate(photos):
        photo.save(tmp_path / "photos" / "dog" / f"{i}.jpg")
    monkeypatch.chdir(tmp_path)
    for pipe, size in (
        (sana, {"height": 32, "width": 32, "use_resolution_binning": False}),
        (wan, {"height": 16, "width": 16}),
    ):
        module, call = type(find_family(pipe)), type(pipe).__call__
        monkeypatch.setattr(module, "defaults", module.defaults | {"resolution": 32})
        monkeypatch.setattr(defaults, "STEPS", 2)
        quick = size | {"num_inference_steps": 1}
        monkeypatch.setattr(type(pipe), "__call__", lambda self, *a, _c=call, _q=quick, **k: _c(self, *a, **k | _q))
        monkeypatch.setattr(type(pipe), "to", lambda self, device: self)
    by_name = {"Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": sana, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": wan}
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda name, **kwargs: by_name[name])
    names: dict = {}
    exec(block, names)
    assert names["image"].size == (32, 32) and len(names["video"]) == 33


@pytest.mark.parametrize(
    "page",
    ["README.md", *(f"docs/{n}.md" for n in ("quickstart", "loading", "training", "methods", "concepts", "hub"))],
)
def test_the_code_runs(page, sdxl, concept, photos, local_hub, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "dog").mkdir(parents=True)
    for i, photo in enumerate(photos):
        photo.save(f"photos/dog/{i}.jpg")
    concept(sdxl, "<cat>").save_pretrained("user/dti-cat")
    concept(sdxl, "<dog>", seed=1).save_pretrained("user/dti-dog")
    asked = []
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda name, **kwargs: asked.append((name, kwargs)) or sdxl)
    monkeypatch.setattr(type(sdxl), "to", lambda self, device: self)
    small = {"resolution": 16, "train_batch_size": 1, "max_train_steps": 2}
    monkeypatch.setattr(family, "defaults", family.defaults | small)
    monkeypatch.setattr(defaults, "STEPS", 2)
    names = {"WIDTH": 16}
    original = type(sdxl).__call__
    quick = {"num_inference_steps": 1, "height": 16, "width": 16}
    monkeypatch.setattr(type(sdxl), "__call__", lambda self, *args, **kwargs: original(self, *args, **kwargs | quick))
    for block in blocks:  # less of everything, and nothing else changed
        exec(block.replace("steps=25", "steps=2"), names)
    assert asked[0][0] == "stabilityai/stable-diffusion-xl-base-1.0"
    if page == "README.md":
        assert list(local_hub.repos) == ["user/dti-dog"] and list(sdxl.directional_inversions) == ["<dog>", "<cat>"]
        assert Path("out/dog/learned_embeds_2.safetensors").is_file()
    if page == "docs/quickstart.md":
        assert Path("out/dog-run/checkpoint-2").is_dir() and list(sdxl.directional_inversions) == ["<rex2>"]
    if page == "docs/hub.md":
        dog, animals = local_hub.repos["user/dti-dog"], local_hub.repos["user/dti-animals"]
        assert dog.private and set(dog.refs) == {"main", "refs/pr/1", "v1"}
        assert dog.at("refs/pr/1").message == "Better samples" and "images/1.png" in dog.at("refs/pr/1").files
        assert "license: openrail++" in dog.at("main").files["README.md"].decode()
        assert "dog/learned_embeds_2.safetensors" in animals.at("main").files
    if page == "docs/training.md":
        assert Path("out/dog3/validation.png").is_file() and Path("out/dog3/curves.png").is_file()
    if page == "docs/concepts.md":
        assert list(sdxl.directional_inversions) == ["<between>", "<wilder>"] and Path("cat.png").is_file()


def test_the_server(sdxl, concept, tmp_path, monkeypatch):
    """Three users at once, as docs/serving.md has it; with room for only two words, so that words come and go."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda name, **kwargs: sdxl)
    monkeypatch.setattr(type(sdxl), "to", lambda self, device: self)
    original, quick = type(sdxl).__call__, {"num_inference_steps": 1, "height": 16, "width": 16}
    monkeypatch.setattr(type(sdxl), "__call__", lambda self, *args, **kwargs: original(self, *args, **kwargs | quick))
    expected = {}
    for seed, user in enumerate(("alice", "bob", "carol")):
        concept(sdxl, seed=seed).save_pretrained(f"words/{user}")
        sdxl.load_directional_inversion(f"words/{user}", token="<mine>")
        image = sdxl("a <mine> on the beach", generator=torch.Generator().manual_seed(0)).images[0]
        expected[user] = image.tobytes()
        sdxl.unload_directional_inversion()
    assert len(set(expected.values())) == 3
    names: dict = {}
    assert "loaded[:-49]" in blocks[0]
    exec(blocks[0].replace("loaded[:-49]", "loaded[:-1]"), names)
    address = f"http://localhost:{names['server'].server_port}/?prompt=a+<mine>+on+the+beach&user="

    def ask(user):
        with urlopen(address + user) as answer:
            return Image.open(io.BytesIO(answer.read())).tobytes()

    try:
        users = [*expected] * 4
        with ThreadPoolExecutor(3) as threads:
            assert list(threads.map(ask, users)) == [expected[user] for user in users]
        assert len(sdxl.directional_inversions) == 2
        with pytest.raises(HTTPError, match="404"):
            ask("..%2Fwords%2Falice")
    finally:
        names["server"].shutdown()
        names["server"].server_close()
    exec(blocks[1], names)
    assert names["second"].text_encoder is sdxl.text_encoder and names["second"].scheduler is not sdxl.scheduler


@pytest.mark.parametrize("page", ["docs/quickstart.md", "docs/command_line.md", "docs/concepts.md"])
def test_the_commands_run(page, sdxl, concept, photos, tmp_path, monkeypatch):
    """Those of `dti`, one after the other, on small things in the real ones' place."""
    from diffusers_dti.cli import main
    from diffusers_dti.data import dreambooth
    from diffusers_dti.evaluation import metrics

    monkeypatch.chdir(tmp_path)
    for folder in (Path("photos/dog"), Path("data/dreambooth/dog"), Path("data/dreambooth/cat")):
        folder.mkdir(parents=True)
        for i, photo in enumerate(photos):
            photo.save(folder / f"{i}.jpg")
    Path("data/dreambooth.json").write_text(
        json.dumps({name: {"path": f"data/dreambooth/{name}", "class": name} for name in ("dog", "cat")})
    )
    for seed, name in enumerate(("cat", "dog")):
        concept(sdxl, f"<{name}>", seed=seed).save_pretrained(f"user/dti-{name}")
    monkeypatch.setattr(dreambooth, "ARCHIVE", "http://localhost:9/")  # all is there
    models = []
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda name, **kwargs: models.append(name) or sdxl)
    config = {"_class_name": type(sdxl).__name__, **sdxl.config}
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda name, **kwargs: config)
    monkeypatch.setattr(family, "defaults", family.defaults | {"resolution": 16, "train_batch_size": 1, "max_train_steps": 2})
    monkeypatch.setattr(defaults, "STEPS", 2)
    original, quick = type(sdxl).__call__, {"num_inference_steps": 1, "height": 16, "width": 16}
    quickly = functools.wraps(original)(lambda self, *args, **kwargs: original(self, *args, **kwargs | quick))
    monkeypatch.setattr(type(sdxl), "__call__", quickly)

    def lengths(pictures, texts, subject, name):
        return {name: [float(len(t)) for t in texts]}

    for name in ("dinov2", "siglip"):
        monkeypatch.setitem(metrics.METRICS, name, lambda *model, device, name=name: functools.partial(lengths, name=name))
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.S)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    commands = [c[c.index("-m") + 1 :] if c[0] == "accelerate" else c for c in commands]
    run = [c[1:] for c in commands if c[0] in ("dti", "diffusers_dti.cli")]
    assert len(run) == {"docs/quickstart.md": 2, "docs/command_line.md": 9, "docs/concepts.md": 4}[page]
    for command in run:
        assert main(command) == 0, command
    assert set(models) == {"stabilityai/stable-diffusion-xl-base-1.0"}
    if page == "docs/concepts.md":
        assert Path("out/blend/strip.png").is_file() and Path("out/cat.png").is_file()
    else:
        assert Path("out/images/sheet.png").is_file()
    if page == "docs/command_line.md":
        assert "ti@mean" in Path("out/evaluation/results.md").read_text()


def test_the_figures_are_measured():
    """Each number after a point in the README's table of figures is in the study or among the measured times."""
    figures = README.partition("## Three figures")[2].partition("##")[0]
    measured = "".join((ROOT / "docs" / page).read_text() for page in ("study.md", "performance.md"))
    numbers = re.findall(r"\d*\.\d+", figures)
    assert len(numbers) > 6 and all(number in measured for number in numbers)


def test_the_commands_are_in_ci():
    commands = set(re.findall(r"^(make [\w-]+)$|`(make [\w-]+)`", README, re.M))
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert {a or b for a, b in commands} <= set(ci)


@pytest.mark.parametrize("page", sorted(str(p.relative_to(ROOT)) for d in ("", "docs") for p in (ROOT / d).glob("*.md")))
def test_links_lead_somewhere(page):
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(path).exists(), path
