"""Push and load with the real client against a server that speaks the Hub's interface, mostly in separate processes."""

import io
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import READ, WRITE, HubServer
from huggingface_hub import HfApi
from PIL import Image
from PIL.ImageCms import ImageCmsProfile, createProfile
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load as load_safetensors

from diffusers_dti import DirectionalInversion

TESTS = Path(__file__).parents[1]
START = """
import json, os, sys, time
time.sleep = lambda seconds: None  # the client waits for seconds between its tries
import torch, urllib.request
from pathlib import Path
from PIL import Image

def report(value):
    print(json.dumps(value))

def fault(*faults):
    data = json.dumps(faults).encode()
    urllib.request.urlopen(urllib.request.Request(os.environ["HF_ENDPOINT"] + "/fault", data, method="POST")).read()

def concept(word="<dog>", seed=0, components=2, **metadata):
    from diffusers_dti import DirectionalInversion
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(2, 16, generator=generator), torch.randn(2, 24, generator=generator)]
    names = ("text_encoder", "text_encoder_2")[:components]
    return DirectionalInversion.from_embeddings(word, dict(zip(names, rows)), metadata)

def pipeline():
    from tiny_pipelines import build_sdxl
    folder = Path(os.environ["HF_HOME"]) / f"parts{time.time_ns()}"
    folder.mkdir(parents=True)
    pipe = build_sdxl(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe
"""


def made(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"text_encoder": torch.randn(2, 16, generator=generator), "text_encoder_2": torch.randn(2, 24, generator=generator)}


FORKS = """
import traceback
import diffusers_dti, diffusers_dti.concept.model_card, tiny_pipelines
for line in sys.stdin:
    job = json.loads(line)
    if not (child := os.fork()):
        os.chdir(job["folder"])
        os.environ |= job["environment"]
        sys.stdout = sys.stderr = open("out.txt", "w")
        try:
            exec(job["code"])
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    report("done")
    sys.stdout.flush()
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def server(hub):
    """The server, without repositories."""
    for kept in (hub.repos, hub.objects, hub.requests, hub.faults):
        kept.clear()
    return hub


@pytest.fixture(scope="module")
def start(hub, tmp_path_factory):
    """Start Python with the client set up for the server."""
    home = tmp_path_factory.mktemp("home")

    def start_process(code, **environment):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), **environment,
        }  # fmt: skip
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen([sys.executable, "-c", START + code], env=kept | environment, text=True, **pipes)

    return start_process


@pytest.fixture(scope="module")
def forks(start):
    """A process that has imported everything and forks for each job, because importing takes seconds."""
    if not hasattr(os, "fork"):
        pytest.skip("processes are copied by fork")
    with start(FORKS) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(forks, tmp_path):
    """Run code in a new process and return what it reports."""

    def run_code(code, **environment):
        job = {"code": code, "folder": str(tmp_path), "environment": environment}
        forks.stdin.write(json.dumps(job) + "\n")
        forks.stdin.flush()
        assert json.loads(forks.stdout.readline()) == "done"
        out = (tmp_path / "out.txt").read_text()
        assert "Traceback" not in out, out
        return json.loads(out.splitlines()[-1])

    return run_code


PUSH = """
from diffusers_dti import DirectionalInversion
import diffusers_dti.concept.model_card
image = Image.new("RGB", (8, 8), "red")
addresses = {}
base = {"base_model": "stabilityai/stable-diffusion-xl-base-1.0", "family": "SDXL", "method": "dti", "scale_rule": "mean"}
mine = concept(**base)
addresses["main"] = mine.push_to_hub(
    "user/dti-dog", images=[("a <dog> in the snow", image), image], license="apache-2.0", private=True, token="hf_write"
)
addresses["v1"] = concept(seed=1).push_to_hub("user/dti-dog", revision="v1", commit_message="Another", token="hf_write")
request = concept(seed=2).push_to_hub("user/dti-dog", create_pr=True, token="hf_read")
addresses["pull"] = request.pr_url
concept("<cat>", seed=3).push_to_hub("user/animals", subfolder="cats/cat", images=[image], token="hf_write")
concept("<cow>", seed=4).push_to_hub("user/animals", subfolder="cow", token="hf_write")
concept(seed=5).push_to_hub("dti-shrunk", images=[image, image], token="hf_write")
concept(seed=5, components=1).push_to_hub("dti-shrunk", images=[image], token="hf_write")
report(addresses)
"""

LOAD = """
import re, diffusers_dti
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
pipe = pipeline()
found = {}
def load(name, *args, **kwargs):
    read = pipe.load_directional_inversion(*args, token=f"<{name}>", **kwargs)
    found[name] = {c: e.tolist() for c, e in read.embeddings.items()}
load("main", "user/dti-dog", hf_token="hf_read")
load("v1", "user/dti-dog", revision="v1", hf_token="hf_read")
load("pull", "user/dti-dog", revision="refs/pr/1", hf_token="hf_read")
load("cat", "user/animals", subfolder="cats/cat", cache_dir="elsewhere")
load("cow", "user/animals", subfolder="cow")
load("cached", "user/dti-dog", local_files_only=True)
load("one", "user/dti-dog", weight_name="learned_embeds_2.safetensors", hf_token="hf_read")
try:
    load("nowhere", "user/animals", cache_dir="empty", local_files_only=True)
except OSError as error:
    found["nowhere"] = str(error)
card = Path(hf_hub_download("user/dti-dog", "README.md", token="hf_read")).read_text()
found["blocks"] = re.findall(r"```python\\n(.*?)```", card, re.S)
DiffusionPipeline.from_pretrained = lambda name, **kwargs: pipe
type(pipe).to = lambda self, device: self
original = type(pipe).__call__
type(pipe).__call__ = lambda self, prompt: original(self, prompt, num_inference_steps=1, height=16, width=16)
os.environ["HF_TOKEN"] = "hf_read"
exec(found["blocks"][0], names := {})
found["size"] = names["image"].size
found["loaded"] = list(pipe.directional_inversions)
report(found)
"""

OFFLINE = """
import diffusers
from diffusers import DiffusionPipeline
pipe = pipeline()
DiffusionPipeline.from_pretrained = lambda name, **kwargs: pipe
type(pipe).to = lambda self, device: self
original = type(pipe).__call__
type(pipe).__call__ = lambda self, prompt: original(self, prompt, num_inference_steps=1, height=16, width=16)
exec(os.environ["BLOCK"], names := {})
assert "diffusers_dti" not in sys.modules
found = {"size": names["image"].size}
for name, tokenizer, encoder in (("text_encoder", pipe.tokenizer, pipe.text_encoder),
                                 ("text_encoder_2", pipe.tokenizer_2, pipe.text_encoder_2)):
    ids = tokenizer.convert_tokens_to_ids(["<dog>", "<dog>_1"])
    found[name] = encoder.get_input_embeddings().weight[ids].tolist()
import diffusers_dti
other = pipeline()
read = other.load_directional_inversion("user/dti-dog", token="<rex>", revision="v1")
found["v1"] = {c: e.tolist() for c, e in read.embeddings.items()}
try:
    other.load_directional_inversion("user/never-seen")
except OSError as error:
    found["nowhere"] = str(error)
report(found)
"""


def test_pushed_by_one_process_and_loaded_by_others(server, start, run, tmp_path):
    addresses = run(PUSH)
    dog = server.repos["user/dti-dog"]
    assert dog.private and not server.repos["user/animals"].private
    assert addresses["main"] == f"{server.url}/user/dti-dog/commit/{dog.refs['main']}"
    assert addresses["pull"] == f"{server.url}/user/dti-dog/discussions/1"
    assert dog.at("main").message == "Upload <dog>" and dog.at("v1").message == "Another"
    files = ["README.md", "learned_embeds.safetensors", "learned_embeds_2.safetensors"]
    images = ["images/0.png", "images/1.png"]
    assert sorted(dog.at("main").files) == sorted([".gitattributes", *files, *images])
    # a branch starts from the main branch, whose samples belong to another concept
    assert sorted(dog.at("v1").files) == sorted(dog.at("refs/pr/1").files) == sorted([".gitattributes", *files])
    animals = server.repos["user/animals"].at("main")
    cat = [f"cats/cat/{f}" for f in (*files, images[0])]
    assert sorted(animals.files) == sorted([".gitattributes", *cat, *(f"cow/{f}" for f in files)])
    # a concept that has become smaller leaves nothing behind, not even half of a commit in between
    shrunk = server.repos["user/dti-shrunk"]
    assert sorted(shrunk.at("main").files) == [".gitattributes", "README.md", "images/0.png", "learned_embeds.safetensors"]
    assert len(shrunk.commits) == 3
    for i, expected in enumerate(made().values()):
        (stored,) = load_safetensors(dog.at("main").files[files[i + 1]]).values()
        torch.testing.assert_close(stored, expected)
    image = Image.open(io.BytesIO(dog.at("main").files["images/0.png"]))
    assert image.getpixel((0, 0)) == (255, 0, 0)

    server.requests.clear()
    found = run(LOAD)
    seeds = {"main": 0, "v1": 1, "pull": 2, "cat": 3, "cow": 4, "cached": 0}
    for name, seed in seeds.items():
        for component, expected in made(seed).items():
            torch.testing.assert_close(torch.tensor(found[name][component]), expected)
    assert list(found["one"]) == ["text_encoder_2"]
    assert found["nowhere"] == "user/animals is not in the cache, and the Hub is offline here: load it once while online."
    assert found["size"] == [16, 16] and set(found["loaded"]) == {f"<{n}>" for n in (*seeds, "one", "dog")}
    assert (tmp_path / "elsewhere" / "models--user--animals").is_dir()
    asked = [(path, authorization) for _, path, _, authorization in server.requests]
    assert all(a is None for path, a in asked if "signed" in path) and ("hf_read" in str(asked))
    revisions = [re.search("resolve/([^/]+)/", path)[1] for path, _ in asked if "dti-dog/resolve" in path]
    commits = [dog.refs[r] for r in ("main", "v1", "refs/pr/1")]
    # only the first file is asked for by name: the others come from the same commit
    by_name = ["main", "v1", "refs%2Fpr%2F1"]
    expected = [[name, *[commit] * 3] for name, commit in zip(by_name, commits)]
    assert revisions[:12] == [revision for own in expected for revision in own]

    server.faults[:] = [{"match": ".", "status": 500, "times": 10**6}]
    out, _ = start(OFFLINE, HF_HUB_OFFLINE="1", BLOCK=found["blocks"][1]).communicate(timeout=600)
    found = json.loads(out.splitlines()[-1])
    for component, expected in made().items():  # by stock diffusers
        torch.testing.assert_close(torch.tensor(found[component]), expected)
    for component, expected in made(1).items():
        torch.testing.assert_close(torch.tensor(found["v1"][component]), expected)
    assert found["size"] == [16, 16] and "user/never-seen is not in the cache" in found["nowhere"]


LOADING = """
import diffusers_dti
pipe = pipeline()
mine = concept()
mine.push_to_hub("user/dti-dog", token="hf_write", private=True)
concept("<gated>").push_to_hub("user/gated", token="hf_write")
state = lambda: ([len(pipe.tokenizer), len(pipe.tokenizer_2)],
                 [e.get_input_embeddings().weight.double().sum().item() for e in (pipe.text_encoder, pipe.text_encoder_2)])
before, found = state(), {}
cases = json.loads(os.environ["CASES"])
for name, (faults, arguments) in cases.items():
    fault(*faults)
    try:
        pipe.load_directional_inversion(**{"source": "user/dti-dog", "hf_token": "hf_read", "cache_dir": name} | arguments)
        outcome = "loaded"
    except OSError as error:
        outcome = type(error).__name__ + ": " + str(error)
    sound = outcome == "loaded" or state() == before
    fault()
    pipe.load_directional_inversion("user/dti-dog", token="<again>", hf_token="hf_read", cache_dir=name)
    same = all(torch.allclose(e, mine.embeddings[c]) for c, e in pipe.directional_inversions["<again>"].embeddings.items())
    pipe.unload_directional_inversion()
    left = [p.name for p in Path(name).rglob("*.incomplete")]
    found[name] = [outcome, sound and same and state() == before and not left]
# all is cached: the Hub may be out of order
pipe.load_directional_inversion("user/dti-dog", hf_token="hf_read", cache_dir="500")
pipe.unload_directional_inversion()
fault({"match": "resolve", "status": 500, "times": 99})
pipe.load_directional_inversion("user/dti-dog", hf_token="hf_read", cache_dir="500")
found["cached"] = [list(pipe.directional_inversions), True]
report(found)
"""
REFUSED = "the Hub answers"
ALWAYS = {"times": 99}


def test_a_failing_download_is_one_clear_error_and_the_next_try_succeeds(server, run):
    resolve = "HEAD .*resolve"
    cases = {
        "401 no token": ([], {"hf_token": False}),
        "401 a wrong token": ([], {"hf_token": "hf_wrong"}),
        "403 gated": ([{"match": resolve, "status": 403, "headers": {"X-Error-Code": "GatedRepo"}} | ALWAYS], {}),
        "403": ([{"match": resolve, "status": 403} | ALWAYS], {}),
        "404 repository": ([], {"source": "user/dti-cat"}),
        "404 revision": ([], {"revision": "v9"}),
        "404 file": ([], {"weight_name": "dog.safetensors"}),
        "409": ([{"match": resolve, "status": 409} | ALWAYS], {}),
        "429": ([{"match": resolve, "status": 429, "headers": {"Retry-After": "1"}} | ALWAYS], {}),
        "500": ([{"match": resolve, "status": 500} | ALWAYS], {}),
        "500 second file": ([{"match": "HEAD .*embeds_2", "status": 500} | ALWAYS], {}),
        "503 storage": ([{"match": "GET /[0-9a-f]{64}", "status": 503} | ALWAYS], {}),
        "cut": ([{"match": "GET /[0-9a-f]{64}", "cut": True} | ALWAYS], {}),
    }
    found = run(LOADING, CASES=json.dumps(cases))
    for name, (outcome, sound) in found.items():
        print(f"{name:18} {outcome}")
        assert sound, name
    start = {
        "401 no token": f"OSError: user/dti-dog: {REFUSED} 401, no valid token was sent",
        "401 a wrong token": f"OSError: user/dti-dog: {REFUSED} 401, no valid token was sent",
        "403 gated": f"OSError: user/dti-dog: {REFUSED} 403, your token lacks permission",
        "403": f"OSError: user/dti-dog: {REFUSED} 403, your token lacks permission",
        "404 repository": f"OSError: user/dti-cat: {REFUSED} 404, the repository does not exist",
        "404 revision": "OSError: user/dti-dog: there is no such revision",
        "404 file": "OSError: user/dti-dog has no dog.safetensors",
        "409": f"OSError: user/dti-dog: {REFUSED} 409, someone else",
        "429": f"OSError: user/dti-dog: {REFUSED} 429, there were too many requests: wait",
        "500": f"OSError: user/dti-dog: {REFUSED} 500, it is out of order: try again later",
        "500 second file": f"OSError: user/dti-dog: {REFUSED} 500, it is out of order: try again later",
        "503 storage": f"OSError: user/dti-dog: {REFUSED} 503, it is out of order: try again later",
        "cut": "OSError: user/dti-dog: the connection to the Hub failed",
        "cached": "<dog>",
    }
    assert found.keys() == start.keys()
    for name, expected in start.items():
        assert found[name][0] == [expected] if name == "cached" else found[name][0].startswith(expected), found[name]
        assert "hf_" not in found[name][0] and "\n" not in found[name][0]


PUSHING = """
from diffusers_dti import DirectionalInversion
found = {}
for seed, (name, (faults, arguments)) in enumerate(json.loads(os.environ["CASES"]).items()):
    mine = concept(seed=seed)  # with files that the server does not have yet
    fault(*faults)
    try:
        mine.push_to_hub(**{"repo_id": "user/" + name.replace(" ", "-"), "token": "hf_write"} | arguments)
        outcome = "pushed"
    except (OSError, ValueError) as error:
        outcome = type(error).__name__ + ": " + str(error)
    fault()
    mine.push_to_hub("user/" + name.replace(" ", "-"), token="hf_write")
    found[name] = outcome
report(found)
"""


def test_a_failing_push_is_one_clear_error_and_the_next_try_succeeds(server, run):
    cases = {
        "401": ([], {"token": False}),
        "403 read": ([], {"token": READ}),
        "403 other": ([], {"repo_id": "somebody/dog"}),
        "404 revision": ([], {"create_pr": True, "revision": "v9"}),
        "409 commit": ([{"match": "/commit/", "status": 409} | ALWAYS], {}),
        "412 commit": ([{"match": "/commit/", "status": 412} | ALWAYS], {}),
        "429 preupload": ([{"match": "/preupload/", "status": 429} | ALWAYS], {}),
        "500 create": ([{"match": "/repos/create", "status": 500} | ALWAYS], {}),
        "500 card": ([{"match": "/validate-yaml", "status": 500} | ALWAYS], {}),
        "500 preupload": ([{"match": "/preupload/", "status": 500} | ALWAYS], {}),
        "500 storage": ([{"match": "PUT ", "status": 500} | ALWAYS], {}),
        "500 commit": ([{"match": "/commit/", "status": 500} | ALWAYS], {}),
        "cut commit": ([{"match": "/commit/", "cut": True} | ALWAYS], {}),
        "503 once": ([{"match": "PUT ", "status": 503}], {}),
        "license": ([], {"license": "free for all"}),
    }
    found = run(PUSHING, CASES=json.dumps(cases))
    for name, outcome in found.items():
        print(f"{name:18} {outcome}")
    for name, outcome in found.items():
        files = server.repos["user/" + name.replace(" ", "-")].at("main").files
        assert {"README.md", "learned_embeds.safetensors", "learned_embeds_2.safetensors"} <= files.keys()
        status, _, what = name.partition(" ")
        if name == "license":
            assert outcome.startswith("ValueError: Invalid metadata in README.md.") and "license" in outcome
        elif what == "once":
            assert outcome == "pushed"
        elif name == "404 revision":
            assert outcome.startswith("OSError: user/404-revision: there is no such revision")
        elif status == "cut":
            assert outcome.startswith("OSError: user/cut-commit: the connection to the Hub failed")
        else:
            assert re.match(rf"OSError: \w+/\S+: {REFUSED} {status}, ", outcome), outcome
        assert "hf_" not in outcome


TRAIN = """
import random
import diffusers_dti
from diffusers_dti import DTITrainer
pipe = pipeline()
pipe.save_pretrained("here/world")
pipe.register_to_config(_name_or_path=str(Path("here/world").resolve()))
photos = [Image.new("RGB", (16, 16), tuple(random.randrange(256) for _ in "rgb")) for _ in range(3)]
trainer = DTITrainer(
    pipe, placeholder_token="<rex>", initializer_token="dog", method="dco", resolution=16, max_train_steps=2,
    train_batch_size=1, output_dir=Path("here/out").resolve(), validation_steps=1,
    validation_prompt=["a {} on the beach", "a red {}"],
)
draw = trainer.family.generate
trainer.fit(photos)
trainer.push_to_hub("user/dti-rex", token="hf_write")
report([[p.getpixel((3, 3)) for p in trainer.validation_images[2]], trainer.history[-1]["angle"]])
"""


AGAIN = """
from diffusers_dti import DirectionalInversion
from diffusers_dti.evaluation.generation import find_adapter
from huggingface_hub import HfApi
HfApi(token="hf_write").upload_file(path_or_fileobj=b"an image", path_in_repo="images/teaser.png", repo_id="user/dti-rex")
rex = DirectionalInversion.from_pretrained("user/dti-rex", token="hf_write")
rex.push_to_hub("user/dti-rex", images=[Image.new("RGB", (8, 8))], token="hf_write")
report(find_adapter("user/dti-rex").name)
"""


def test_pushing_the_concept_again_costs_no_adapter(server, run):
    """Only the samples that were pushed before are deleted."""
    run(TRAIN)
    adapter = run(AGAIN, HF_TOKEN="hf_write")
    files = server.repos["user/dti-rex"].at("main").files
    assert "pytorch_lora_weights.safetensors" in files and "images/teaser.png" in files and "images/1.png" not in files
    assert adapter == "pytorch_lora_weights.safetensors"  # and `dti generate` finds it


def test_a_trainer_pushes_its_adapter_and_last_pictures(server, run, tmp_path):
    pixels, angle = run(TRAIN)
    files = server.repos["user/dti-rex"].at("main").files
    concept = ["learned_embeds.safetensors", "learned_embeds_2.safetensors", "pytorch_lora_weights.safetensors"]
    assert sorted(files) == sorted([".gitattributes", "README.md", "images/0.png", "images/1.png", *concept])
    assert all("unet" in key for key in load_safetensors(files["pytorch_lora_weights.safetensors"]))
    for i, pixel in enumerate(pixels):
        assert list(Image.open(io.BytesIO(files[f"images/{i}.png"])).getpixel((3, 3))) == pixel
    card = files["README.md"].decode()
    assert "- text: a <rex> on the beach\n  output:\n    url: images/0.png\n- text: a red <rex>\n" in card
    assert f"Angle to the initializer: {angle:.1f}° on average." in card and "| max_train_steps | 2 |" in card
    assert 'load_lora_weights("user/dti-rex", weight_name="pytorch_lora_weights.safetensors")' in card
    assert "base_model" not in card.split("---")[1]  # a folder's name is not a repository on the Hub
    for path, content in files.items():  # nothing about the machine is pushed
        for secret in (str(tmp_path), str(Path.home()), WRITE):
            assert secret.encode() not in content, (path, secret)


def chunks(png):
    """The types of a PNG's chunks."""
    types, start = [], 8
    while start < len(png):
        length, kind = struct.unpack(">I4s", png[start : start + 8])
        types.append(kind.decode())
        start += length + 12
    return types


@pytest.mark.parametrize("format", ["png", "jpeg", "memory"])
def test_samples_are_pushed_without_what_cameras_and_programs_wrote_into_them(format, local_hub, tmp_path):
    image = Image.effect_noise((8, 8), 50).convert("RGB")
    exif, text = Image.Exif(), PngInfo()
    exif[0x010F] = "secret camera"
    exif.get_ifd(0x8825)[1] = "N"  # GPS
    text.add_text("parameters", "secret prompt")
    text.add_itxt("XML:com.adobe.xmp", "<x>secret xmp</x>")
    profile = ImageCmsProfile(createProfile("sRGB")).tobytes()
    path = tmp_path / f"photo.{'jpg' if format == 'jpeg' else 'png'}"
    if format == "jpeg":
        image.save(path, exif=exif, icc_profile=profile, comment=b"secret comment", quality=100)
    else:
        image.save(path, exif=exif, icc_profile=profile, pnginfo=text)
    photo = Image.open(path)
    if format == "memory":  # as a program hands it over
        photo.load()
        photo.info["xmp"] = b"<x>secret xmp</x>"
    # the photo has what must not be pushed, and PIL would write it
    assert "icc_profile" in photo.info and photo.getexif()[0x010F] == "secret camera"
    photo.convert("RGB").save(tmp_path / "plain.png")
    assert {"iCCP", "eXIf"} & set(chunks((tmp_path / "plain.png").read_bytes()))

    rows = made()
    DirectionalInversion.from_embeddings("<dog>", rows).push_to_hub("user/dti-dog", images=[("a <dog>", photo), photo])
    files = local_hub.repos["user/dti-dog"].at("main").files
    for name in ("images/0.png", "images/1.png"):
        assert set(chunks(files[name])) == {"IHDR", "IDAT", "IEND"}
        again = Image.open(io.BytesIO(files[name]))
        assert again.tobytes() == photo.convert("RGB").tobytes() and not again.getexif() and not again.info
    for path, content in files.items():
        assert b"secret" not in content, path
    assert photo.info["icc_profile"] == profile  # the caller's image keeps its own


@pytest.mark.parametrize("subfolder", [None, "cats/cat"])
def test_a_push_changes_nothing_else_in_the_repository(subfolder, local_hub):
    names = (
        "notes.txt",
        "images/teaser.png",
        "images/7.png",
        "pytorch_lora_weights.safetensors",
        "learned_embeds_3.safetensors",
    )
    prefix = f"{subfolder}/" if subfolder else ""
    api = HfApi(token=WRITE)
    api.create_repo("user/dti-dog")
    for name in (*names, *(f"other/{name}" for name in names)):
        place = name if name.startswith("other/") else prefix + name
        api.upload_file(path_or_fileobj=name.encode(), path_in_repo=place, repo_id="user/dti-dog")
    DirectionalInversion.from_embeddings("<dog>", made()).push_to_hub("user/dti-dog", subfolder=subfolder)
    files = local_hub.repos["user/dti-dog"].at("main").files
    gone = {f"{prefix}images/7.png", f"{prefix}learned_embeds_3.safetensors"}
    new = {prefix + name for name in ("README.md", "learned_embeds.safetensors", "learned_embeds_2.safetensors")}
    kept = {prefix + name for name in names} | {f"other/{name}" for name in names} | {".gitattributes"}
    assert files.keys() == (kept - gone) | new


def test_push_returns_the_commit(local_hub):
    concept = DirectionalInversion.from_embeddings("<dog>", made())
    commit = concept.push_to_hub("user/dti-dog")
    repo = local_hub.repos["user/dti-dog"]
    assert commit == commit.commit_url and commit.oid == repo.refs["main"] and commit.pr_url is None
    request = concept.rescale(2.0).push_to_hub("user/dti-dog", create_pr=True)
    assert request.pr_url == f"{local_hub.url}/user/dti-dog/discussions/1" and request.pr_revision == "refs/pr/1"


@pytest.mark.parametrize("base", ["/home/secret/model", "C:\\secret\\mine", "out/secret/model"])
def test_a_base_model_on_this_machine_is_not_pushed(base, local_hub):
    concept = DirectionalInversion.from_embeddings("<dog>", made(), {"base_model": base, "family": "SDXL"})
    concept.push_to_hub("user/dti-dog")
    for path, content in local_hub.repos["user/dti-dog"].at("main").files.items():
        assert b"secret" not in content, path
    assert DirectionalInversion.from_pretrained("user/dti-dog").metadata == {"family": "SDXL"}
    assert concept.metadata["base_model"] == base
