"""HiDream's four text encoders: loading, saving, inspection and conversion know `text_encoder_4`."""

import copy

import pytest
import torch
from diffusers import HiDreamImagePipeline
from helpers import differing, states
from safetensors.torch import load_file
from tiny_encoders import ENCODERS, TOKENIZERS

from diffusers_dti import DirectionalInversion
from diffusers_dti.concept.convert import convert
from diffusers_dti.concept.registry import COMPONENTS
from diffusers_dti.pipeline.inspection import inspect


@pytest.fixture
def pipe(tmp_path):
    parts = {}
    for component, kind in zip(COMPONENTS, ("projected", "projected", "t5", "llama")):
        name, build = ENCODERS[kind]
        tokenizer = TOKENIZERS[name](tmp_path / component)
        parts |= {component: build(tokenizer), component.replace("text_encoder", "tokenizer"): tokenizer}
    return HiDreamImagePipeline(scheduler=None, vae=None, transformer=None, **parts)


def test_saved_and_loaded(pipe, concept, tmp_path):
    before, made = states(pipe), concept(pipe, vectors=2)
    made.save_pretrained(tmp_path / "dog")
    names = ["learned_embeds.safetensors", *(f"learned_embeds_{i}.safetensors" for i in (2, 3, 4))]
    assert sorted(path.name for path in (tmp_path / "dog").iterdir()) == names
    loaded = pipe.load_directional_inversion(tmp_path / "dog")
    assert list(loaded.directions) == list(COMPONENTS)
    torch.testing.assert_close(loaded.embeddings, made.embeddings)
    assert list(inspect(loaded, pipe)["encoders"]) == list(COMPONENTS)
    pipe.save_directional_inversion(tmp_path / "again")
    pipe.unload_directional_inversion()
    assert not differing(states(pipe), before)
    alone = DirectionalInversion.from_pretrained(tmp_path / "again", weight_name=names[3])
    assert list(alone.directions) == ["text_encoder_4"]


@pytest.mark.parametrize("program", ["comfyui", "onetrainer"])
def test_converted_and_loaded(pipe, concept, program, tmp_path):
    made = concept(pipe)
    made.save_pretrained(tmp_path / "dog")
    (path,) = convert(tmp_path / "dog", program, tmp_path / program)
    plain = load_file(path)  # without our header
    assert list(plain) == sorted(["clip_l", "clip_g", "t5xxl" if program == "comfyui" else "t5", "llama"])
    loaded = copy.deepcopy(pipe).load_directional_inversion(plain, token="<dog>")
    torch.testing.assert_close(loaded.embeddings, made.embeddings)


def test_the_family_by_its_widths():
    rows = dict(zip(COMPONENTS, (torch.ones(1, d) for d in (768, 1280, 4096, 4096))))
    report = inspect(DirectionalInversion.from_embeddings("<dog>", rows))
    assert report["family"] == "HiDream"
