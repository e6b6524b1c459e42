"""The loader on every diffusers pipeline that has a text encoder, built around a small one. It refuses the others."""

import copy
import inspect
import re
from pathlib import Path
from unittest.mock import MagicMock

import diffusers
import pytest
import torch
from helpers import differing, states
from tiny_encoders import ENCODERS, TOKENIZERS, TinyProcessor

from diffusers_dti.concept.third_party import FORMATS
from diffusers_dti.pipeline.text_encoders import find_text_encoders
from diffusers_dti.pipeline.tokenizer import token_names

# Deprecated names, by which diffusers 0.37 no longer builds pipelines.
NOT_BUILT = {"Lumina2Text2ImgPipeline", "LuminaText2ImgPipeline"}
# The constructors of these look at the configuration of other components, for which they get stand-ins.
NEED_MORE = (
    "AmusedInpaint", "Bria", "Cosmos2_5", "Flux2KleinKV", "HunyuanVideo15", "Kandinsky", "LongCatAudio",
    "LongCatImageEdit", "StableAudio", "StableDiffusionModelEditing", "ZImageControlNet",
)  # fmt: skip
KINDS = {
    "CLIPTextModel": "clip", "CLIPTextModelWithProjection": "projected", "T5EncoderModel": "t5", "UMT5EncoderModel": "umt5",
    "Gemma2PreTrainedModel": "gemma", "GemmaPreTrainedModel": "gemma", "Gemma3ForConditionalGeneration": "gemma3",
    "T5GemmaEncoder": "t5gemma", "T5GemmaEncoderModel": "t5gemma", "T5Gemma2Encoder": "t5gemma2",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl", "Qwen2_5_VLTextModel": "qwen2_5_vl_text",
    "Qwen2VLForConditionalGeneration": "qwen2_vl", "Qwen3ForCausalLM": "qwen3", "Qwen3Model": "qwen3_model",
    "Qwen3VLForConditionalGeneration": "qwen3_vl", "Qwen3VLModel": "qwen3_vl_model", "SmolLM3ForCausalLM": "smollm3",
    "LlamaForCausalLM": "llama", "LlamaModel": "llama_model", "LlavaForConditionalGeneration": "llava", "GlmModel": "glm",
    "Mistral3ForConditionalGeneration": "mistral3", "Mistral3Model": "mistral3_model", "BertModel": "bert",
    "ClapModel": "clap", "ClapTextModelWithProjection": "clap_text", "ContextCLIPTextModel": "blip_clip",
    "MultilingualCLIP": "multilingual_clip", "RobertaSeriesModelWithTransformation": "alt_clip",
}  # fmt: skip
# Constructors that do not say which kind their encoder is; their documentation does.
UNTYPED = {"AceStep": "qwen3_model", "Ideogram4": "qwen3_vl_model", "PRXPixel": "qwen3_vl_model", "ZImage": "qwen3_model"}


def parameters_of(name):
    """Return the parameters of a pipeline class's constructor."""
    return dict(list(inspect.signature(getattr(diffusers, name).__init__).parameters.items())[1:])


def encoders_of(name):
    """Return the kind of each text encoder with a tokenizer of a pipeline class."""
    kinds, parameters = {}, parameters_of(name)
    for component in [p for p in parameters if p.startswith("text_encoder")]:
        roles = [r for r in ("tokenizer", "processor") if component.replace("text_encoder", r) in parameters]
        if roles:
            found = re.findall(r"\w+", str(parameters[component].annotation))
            kind = next((KINDS[word] for word in found if word in KINDS), None)
            tokenizer = str(parameters[component.replace("text_encoder", roles[0])].annotation)
            kinds[component] = "byt5" if kind == "t5" and "ByT5" in tokenizer else kind
            if kind is None:
                kinds[component] = next((k for prefix, k in UNTYPED.items() if name.startswith(prefix)), None)
    return kinds


def is_pipeline(name):
    """Return whether it is a class of pipelines that can be built here; modular ones have tests of their own."""
    if "Pipeline" not in name and "Refiner" not in name:
        return False
    try:
        cls = getattr(diffusers, name)
    except (ImportError, RuntimeError):  # needs a package that is not installed
        return False
    return isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline) and cls is not diffusers.DiffusionPipeline


NAMES = [name for name in sorted(dir(diffusers)) if is_pipeline(name) and name not in NOT_BUILT]
PIPELINES = {name: kinds for name in NAMES if (kinds := encoders_of(name))}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Return a function that copies an encoder of a kind and its tokenizer, which it makes at the first time."""
    folder, tokenizers, made = tmp_path_factory.mktemp("parts"), {}, {}

    def tokenizer(kind):
        if kind not in tokenizers:
            tokenizers[kind] = TOKENIZERS[kind](folder / kind)
        return tokenizers[kind]

    def part(kind):
        if kind not in made:
            torch.manual_seed(0)
            made[kind] = ENCODERS[kind][1](tokenizer(ENCODERS[kind][0])).eval()
        return copy.deepcopy((tokenizer(ENCODERS[kind][0]), made[kind]))

    return part


def stand_in():
    return MagicMock(config=MagicMock(latents_mean=[0.0], latents_std=[1.0]))


def build(name, parts):
    cls, arguments = getattr(diffusers, name), {}
    parameters = parameters_of(name)
    for parameter in parameters.values():
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            arguments[parameter.name] = stand_in() if name.startswith(NEED_MORE) else None
    if name.startswith("Cosmos"):
        arguments["safety_checker"] = MagicMock()  # their own needs a package
    if name.startswith("LEdits"):
        arguments["scheduler"] = diffusers.DDIMScheduler()
    for component, kind in PIPELINES[name].items():
        tokenizer, encoder = parts(kind)
        own, processor = (component.replace("text_encoder", role) for role in ("tokenizer", "processor"))
        arguments[component] = encoder
        if own in parameters:
            is_processor = "Processor" in str(parameters[own].annotation)
            arguments[own] = TinyProcessor(tokenizer) if is_processor else tokenizer
        if processor in parameters:
            arguments[processor] = TinyProcessor(copy.deepcopy(tokenizer))
    return cls(**arguments)


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")  # of deprecated pipelines
@pytest.mark.parametrize("name", PIPELINES)
def test_load_and_unload(name, parts, concept):
    pipe = build(name, parts)
    before, found = states(pipe), find_text_encoders(pipe)
    assert list(found) == sorted(PIPELINES[name])
    ordinary = {c: e.tokenizer("a dog on the beach").input_ids for c, e in found.items()}
    single, several = concept(pipe), concept(pipe, "<rex>", vectors=3, seed=1)
    pipe.load_directional_inversion(single)
    pipe.load_directional_inversion(several)
    for component, text_encoder in found.items():
        names = token_names("<rex>", 3)
        for tokenizer in text_encoder.tokenizers:
            pieces = tokenizer.tokenize("a <dog> near <rex>, on the beach")
            assert pieces.count("<dog>") == 1
            assert pieces[pieces.index(names[0]) :][:3] == names
            for made, ids in ((single, ["<dog>"]), (several, names)):
                rows = text_encoder.weight[tokenizer.convert_tokens_to_ids(ids)]
                assert torch.equal(rows, made.embeddings[component])
            assert tokenizer("a dog on the beach").input_ids == ordinary[component]
            check_output(text_encoder, tokenizer)
    pipe.unload_directional_inversion()
    # The encoders' first call leaves attributes and hooks of transformers.
    assert not [k for k in differing(states(pipe), before) if "attributes" not in k and "modules" not in k]


def check_output(text_encoder, tokenizer):
    inputs, model = tokenizer(["a <rex>"], return_tensors="pt"), text_encoder.model
    if type(model).__name__ == "ClapModel":
        model = model.text_model
    elif type(model).__name__ == "ContextCLIPTextModel":
        model = model.text_model.embeddings  # what comes after them fails on transformers 4.56
        inputs = {"input_ids": inputs.input_ids, "ctx_embeddings": None, "ctx_begin_pos": None}
    assert model(**inputs)[0].isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in PIPELINES])
def test_other_pipelines_refuse(name, parts, monkeypatch):
    """Some of them have a text encoder or a tokenizer, under names that do not belong together."""
    (tokenizer, encoder), cls = parts("clip"), getattr(diffusers, name)
    components = {p: tokenizer if "tokenizer" in p else encoder if "text_encoder" in p else None for p in parameters_of(name)}
    monkeypatch.setattr(cls, "components", components)
    with pytest.raises(ValueError, match=f"{name} has no text encoder with a tokenizer of its own"):
        object.__new__(cls).load_directional_inversion({"<dog>": torch.ones(16)})


# The rows of the table in docs/pipelines.md: a class, and the keys of its text encoders in the registry.
MODELS = {
    "SD 1.5, 2.x": ("StableDiffusionPipeline", ["clip_l"]),
    "SDXL": ("StableDiffusionXLPipeline", ["clip_l", "clip_g"]),
    "SANA, SANA-Sprint": ("SanaPipeline", ["gemma2_2b"]),
    "Wan 2.1, 2.2 (14B, TI2V-5B)": ("WanPipeline", ["umt5xxl"]),
    "Z-Image": ("ZImagePipeline", ["qwen3_4b"]),
    "Lumina 2": ("Lumina2Pipeline", ["gemma2_2b"]),
    "SD 3, 3.5": ("StableDiffusion3Pipeline", ["clip_l", "clip_g", "t5xxl"]),
    "FLUX.1": ("FluxPipeline", ["clip_l", "t5xxl"]),
    "FLUX.2 klein": ("Flux2KleinPipeline", ["qwen3_4b"]),
    "FLUX.2 dev": ("Flux2Pipeline", ["mistral3_24b"]),
    "Qwen-Image": ("QwenImagePipeline", ["qwen25_7b"]),
    "Qwen-Image-Edit": ("QwenImageEditPipeline", ["qwen25_7b"]),
    "PixArt-α, PixArt-Σ": ("PixArtSigmaPipeline", ["t5xxl"]),
    "Chroma": ("ChromaPipeline", ["t5xxl"]),
    "LTX-Video": ("LTXPipeline", ["t5xxl"]),
    "LTX-2": ("LTX2Pipeline", ["gemma3_12b"]),
    "Krea 2": ("Krea2Pipeline", None),
    "HunyuanVideo": ("HunyuanVideoPipeline", ["llama", "clip_l"]),
    "HiDream": ("HiDreamImagePipeline", ["clip_l", "clip_g", "t5xxl", "llama"]),
    "CogVideoX": ("CogVideoXPipeline", ["t5xxl"]),
    "Kandinsky 5": ("Kandinsky5T2IPipeline", None),
}


def test_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
    tested = set(re.findall(r"\w+", text[text.index("**Tested**") : text.index("**Refused**")]))
    assert PIPELINES.keys() <= tested and len(PIPELINES) > 200
    table = re.findall(r"^\| (.+?) \| (✓?) ?\| (?:✓ )?\| (?:[✓–] )?\| (✓?)", text, flags=re.MULTILINE)
    assert [name for name, *_ in table] == list(MODELS)
    comfyui = FORMATS["comfyui"]
    for name, loads, in_comfyui in table:
        cls, keys = MODELS[name]
        assert loads == "✓" and (cls in PIPELINES or not hasattr(diffusers, cls))
        written = keys is not None and name not in comfyui.unread_families
        assert bool(in_comfyui) == (written and None not in [comfyui.encoder_keys.get(key, key) for key in keys]), name
