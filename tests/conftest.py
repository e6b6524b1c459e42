"""Fixtures: tiny random pipelines, built offline once per session. Each test gets a fresh copy."""

import functools
import os
import random

import pytest
import torch
from tiny_modern import PIPELINES, VARIANTS
from tiny_pipelines import build_sana, build_sd, build_sdxl, build_wan, fresh_copy

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _sdxl(tmp_path_factory):
    return build_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def _sd(tmp_path_factory):
    return build_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def _sana(tmp_path_factory):
    return build_sana(tmp_path_factory.mktemp("sana"))


@pytest.fixture(scope="session")
def _sprint(tmp_path_factory):
    return build_sana(tmp_path_factory.mktemp("sprint"), sprint=True)


@pytest.fixture(scope="session")
def _wan(tmp_path_factory):
    return build_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="session")
def _wan22(tmp_path_factory):
    return build_wan(tmp_path_factory.mktemp("wan22"), two=True)


@pytest.fixture(scope="session")
def modern(tmp_path_factory):
    """Return a function that builds a pipeline of `tiny_modern` by its name, each once."""
    return functools.cache(lambda name: (PIPELINES | VARIANTS)[name](tmp_path_factory.mktemp(name)))


@pytest.fixture
def sdxl(_sdxl):
    return fresh_copy(_sdxl)


@pytest.fixture
def sd(_sd):
    return fresh_copy(_sd)


@pytest.fixture
def sana(_sana):
    return fresh_copy(_sana)


@pytest.fixture
def sprint(_sprint):
    return fresh_copy(_sprint)


@pytest.fixture
def wan(_wan):
    return fresh_copy(_wan)


@pytest.fixture
def wan22(_wan22):
    return fresh_copy(_wan22)


@pytest.fixture(scope="session")
def model(_sdxl, tmp_path_factory):
    """Save a pipeline in a folder, for commands to open."""
    folder = tmp_path_factory.mktemp("model")
    _sdxl.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["sdxl", "sd", "sana", "wan"])
def pipe(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["sdxl", "sd"])
def unet_pipe(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def photos():
    """Make three small images, one of them not square."""
    from PIL import Image

    rng = random.Random(0)
    made = []
    for size in ((16, 16), (16, 16), (24, 16)):
        image = Image.new("RGB", size, tuple(rng.randrange(256) for _ in "rgb"))
        image.paste(tuple(rng.randrange(256) for _ in "rgb"), (4, 4, 12, 12))
        made.append(image)
    return made


@pytest.fixture
def concept():
    """Return a function that makes a concept for a pipeline: `concept(pipe, "<dog>", vectors=2, scale=0.4)`."""
    from diffusers_dti import DirectionalInversion
    from diffusers_dti.pipeline.text_encoders import find_text_encoders

    def make(pipe, word="<dog>", vectors=1, scale=0.4, seed=0, **metadata):
        generator = torch.Generator().manual_seed(seed)
        rows = {}
        for component, text_encoder in find_text_encoders(pipe).items():
            rows[component] = torch.randn(vectors, text_encoder.width, generator=generator)
        return DirectionalInversion.from_embeddings(word, rows, metadata).rescale(scale)

    return make


@pytest.fixture
def local_hub(tmp_path):
    """A server that stands in for the Hub, with the real client of this process set up for it."""
    from hub_server import HubServer, client_of

    with HubServer() as server, client_of(server, tmp_path / "hub-cache"):
        yield server
