"""The loader on every diffusers pipeline that can be built from text encoders alone: CLIP, T5, UMT5, Gemma 2."""

import copy
import inspect
import re
from pathlib import Path

import diffusers
import pytest
import torch
from helpers import differing, states
from tiny_pipelines import clip_encoder, clip_tokenizer, gemma_encoder, gemma_tokenizer, t5_encoder, t5_tokenizer

from diffusers_dti.pipeline.text_encoders import find_text_encoders
from diffusers_dti.pipeline.tokenizer import token_names

# The constructors of these pipelines need a component that is left out here.
NEED_MORE = {
    "AmusedInpaintPipeline", "BriaPipeline", "Cosmos2TextToImagePipeline", "Cosmos2VideoToWorldPipeline",
    "CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline", "LongCatAudioDiTPipeline", "StableAudioPipeline",
    "StableDiffusionModelEditingPipeline",
    # deprecated names, which diffusers 0.37 no longer builds pipelines by
    "Lumina2Text2ImgPipeline", "LuminaText2ImgPipeline",
}  # fmt: skip
KINDS = {
    "CLIPTextModel": "clip",
    "CLIPTextModelWithProjection": "projected",
    "T5EncoderModel": "t5",
    "UMT5EncoderModel": "umt5",
    "Gemma2PreTrainedModel": "gemma",
    "GemmaPreTrainedModel": "gemma",
}


def encoders_of(name):
    """Return which of `KINDS` each text encoder of a pipeline class is, or None if one is of another kind."""
    try:
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    except (ImportError, RuntimeError, TypeError, ValueError):  # needs a package that is not installed
        return None
    kinds = {}
    for parameter in parameters.values():
        if parameter.name.startswith("text_encoder") and parameter.name.replace("text_encoder", "tokenizer") in parameters:
            found = re.findall(r"\w+", str(parameter.annotation))
            kinds[parameter.name] = next((KINDS[word] for word in found if word in KINDS), None)
    return kinds if kinds and all(kinds.values()) else None


PIPELINES = {
    name: kinds
    for name in sorted(dir(diffusers))
    if name.endswith("Pipeline") and name not in NEED_MORE and (kinds := encoders_of(name))
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    clip, t5, gemma = clip_tokenizer(folder / "clip"), t5_tokenizer(folder / "t5"), gemma_tokenizer(folder / "gemma")
    return {
        "clip": (clip, clip_encoder(clip, 16)),
        "projected": (clip, clip_encoder(clip, 24, projected=True)),
        "t5": (t5, t5_encoder(t5, 16)),
        "umt5": (t5, t5_encoder(t5, 16, spare_rows=2, umt5=True)),
        "gemma": (gemma, gemma_encoder(gemma, 16)),
    }


def build(name, parts):
    cls, arguments = getattr(diffusers, name), {}
    for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            arguments[parameter.name] = None
    for component, kind in PIPELINES[name].items():
        tokenizer, encoder = copy.deepcopy(parts[kind])
        arguments |= {component: encoder, component.replace("text_encoder", "tokenizer"): tokenizer}
    return cls(**arguments)


@pytest.mark.parametrize("name", PIPELINES)
def test_load_and_unload(name, parts, concept):
    pipe = build(name, parts)
    before = states(pipe)
    ordinary = {c: e.tokenizer("a dog on the beach").input_ids for c, e in find_text_encoders(pipe).items()}
    single, several = concept(pipe), concept(pipe, "<rex>", vectors=3, seed=1)
    pipe.load_directional_inversion(single)
    pipe.load_directional_inversion(several)
    for component, text_encoder in find_text_encoders(pipe).items():
        tokenizer, encoder = text_encoder.tokenizer, text_encoder.model
        names = token_names("<rex>", 3)
        pieces = tokenizer.tokenize("a <dog> near <rex>, on the beach")
        assert pieces.count("<dog>") == 1
        assert pieces[pieces.index(names[0]) :][:3] == names
        for made, ids in ((single, ["<dog>"]), (several, names)):
            rows = encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(ids)]
            assert torch.equal(rows, made.embeddings[component])
        assert tokenizer("a dog on the beach").input_ids == ordinary[component]
        assert encoder(**tokenizer(["a <rex>"], return_tensors="pt"))[0].isfinite().all()
    pipe.unload_directional_inversion()
    # The encoders' first call leaves attributes and hooks of transformers.
    assert not [k for k in differing(states(pipe), before) if "attributes" not in k and "modules" not in k]


def test_many_pipelines_are_covered():
    assert len(PIPELINES) > 100
    assert set(PIPELINES) <= set(
        re.findall(r"\w+Pipeline\b", (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text())
    )
    families = {"StableDiffusion3Pipeline", "FluxPipeline", "PixArtSigmaPipeline"}
    families |= {
        f"Sana{kind}Pipeline" for kind in ("", "ControlNet", "PAG", "Sprint", "SprintImg2Img", "Video", "ImageToVideo")
    }
    families |= {f"Wan{kind}Pipeline" for kind in ("", "ImageToVideo", "VideoToVideo", "VACE", "Animate")}
    assert families <= set(PIPELINES)
