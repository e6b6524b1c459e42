"""Every row of the registry is consistent, and agrees with diffusers and transformers."""

import inspect

import diffusers
import pytest
import transformers

from diffusers_dti.concept import registry
from diffusers_dti.concept.registry import (
    COMPONENTS,
    MODEL_FAMILIES,
    TEXT_ENCODERS,
    ModelFamily,
    TextEncoderKind,
    declared_encoders,
    encoder_label,
    infer_encoders,
    infer_family,
)

ONE, TWO, THREE, FOUR = COMPONENTS
PIPELINES = {
    "SDXL": "StableDiffusionXLPipeline",
    "Stable Diffusion 1.x": "StableDiffusionPipeline",
    "Stable Diffusion 2.x": "StableDiffusionPipeline",
    "SANA": "SanaPipeline",
    "Wan": "WanPipeline",
    "Flux": "FluxPipeline",
    "Stable Diffusion 3": "StableDiffusion3Pipeline",
    "HiDream": "HiDreamImagePipeline",
    "HunyuanVideo": "HunyuanVideoPipeline",
    "FLUX.2 klein": "Flux2KleinPipeline",
    "Qwen-Image": "QwenImagePipeline",
}
# Families whose widths are those of an earlier row.
SAME_WIDTHS = {"Lumina 2": "SANA", "FLUX.2 klein": "Z-Image or FLUX.2 klein 4B"}
WITH_ENCODERS = {name: family for name, family in MODEL_FAMILIES.items() if family.encoders}


def widths_of(family):
    return {component: TEXT_ENCODERS[key].width for component, key in family.encoders.items()}


def default(model, argument):
    """A size of the real checkpoint: diffusers' default for the denoiser's inputs."""
    return inspect.signature(getattr(diffusers, model)).parameters[argument].default


@pytest.mark.parametrize("name", MODEL_FAMILIES)
def test_the_rows_are_consistent(name):
    family = MODEL_FAMILIES[name]
    assert family.name == name and len(MODEL_FAMILIES) == len(registry._ROWS)
    assert set(family.encoders) <= set(COMPONENTS) and set(family.encoders.values()) <= TEXT_ENCODERS.keys()
    assert list(family.encoders) == sorted(family.encoders)
    assert not family.declares_encoders or family.encoders
    assert family.task in ("text-to-image", "text-to-video") and family.task not in family.tags


@pytest.mark.parametrize("key", TEXT_ENCODERS)
def test_the_kinds_are_transformers_models(key):
    kind = TEXT_ENCODERS[key]
    assert transformers.CONFIG_MAPPING[kind.model_type].model_type == kind.model_type
    assert kind.label and kind.width % 64 == 0
    used = {TEXT_ENCODERS[key].model_type for family in MODEL_FAMILIES.values() for key in family.encoders.values()}
    assert kind.model_type in used


@pytest.mark.parametrize("name", PIPELINES)
def test_encoders_are_those_of_diffusers_pipelines(name):
    parameters = inspect.signature(getattr(diffusers, PIPELINES[name]).__init__).parameters
    expected = {}
    for component in COMPONENTS:
        if component in parameters:
            config = parameters[component].annotation.config_class()
            expected[component] = (config.text_config if hasattr(config, "vision_config") else config).model_type
    assert {c: TEXT_ENCODERS[key].model_type for c, key in MODEL_FAMILIES[name].encoders.items()} == expected


def test_widths_are_those_that_diffusers_models_expect():
    width = {key: kind.width for key, kind in TEXT_ENCODERS.items()}
    assert width["clip_l"] == default("FluxTransformer2DModel", "pooled_projection_dim")
    assert width["clip_l"] + width["clip_g"] == default("SD3Transformer2DModel", "pooled_projection_dim")
    assert width["t5xxl"] == default("SD3Transformer2DModel", "joint_attention_dim")
    assert width["t5xxl"] == default("FluxTransformer2DModel", "joint_attention_dim")
    assert width["umt5xxl"] == default("WanTransformer3DModel", "text_dim")
    assert (
        width["gemma2_2b"] == default("SanaTransformer2DModel", "caption_channels") == transformers.Gemma2Config().hidden_size
    )


@pytest.mark.parametrize("name", WITH_ENCODERS)
def test_a_family_is_found_by_its_widths(name):
    family = WITH_ENCODERS[name]
    assert infer_family(widths_of(family)) == SAME_WIDTHS.get(name, family.label or name)
    found = infer_encoders(widths_of(family), {"family": name})
    if name == "Wan":  # its width alone may be T5's
        assert infer_encoders(widths_of(family), {}) == {ONE: None}
    assert found == dict(family.encoders)


def test_a_larger_model_of_a_family_has_the_larger_encoder():
    assert infer_encoders({ONE: 4096}, {"family": "FLUX.2 klein"}) == {ONE: "qwen3_8b"}
    assert infer_encoders({ONE: 2560}, {"family": "FLUX.2 klein"}) == {ONE: "qwen3_4b"}
    assert infer_encoders({ONE: 16}, {"family": "FLUX.2 klein"}) == {ONE: "qwen3_4b"}
    assert encoder_label("qwen3_4b", 4096) == "Qwen3 8B (FLUX.2 klein 9B)"


def test_unknown_widths():
    assert infer_family({ONE: 16}) is None and infer_family({}) is None and infer_family({TWO: 768}) is None
    assert infer_encoders({ONE: 16}, {}) == {ONE: None}
    # several of them are in the order of small models for tests
    assert infer_encoders({ONE: 16, TWO: 24, THREE: 32}, {}) == {ONE: "clip_l", TWO: "clip_g", THREE: "t5xxl"}
    assert infer_encoders({THREE: 32, FOUR: 48}, {}) == {THREE: "t5xxl", FOUR: "llama"}
    assert infer_encoders({ONE: 16, TWO: 4096}, {}) == {ONE: "clip_l", TWO: "t5xxl"}
    assert infer_encoders({TWO: 24}, {}) == {TWO: "clip_g"}


def test_what_a_file_declares_takes_precedence():
    encoders = {ONE: "umt5xxl"}
    assert declared_encoders([ONE], {"encoders": encoders}) == encoders
    assert declared_encoders([ONE], {"encoders": encoders, "family": "SANA"}) == encoders
    # a family's only encoder is declared for any component: in another pipeline, loading may have moved the rows there
    assert declared_encoders([ONE, TWO], {"family": "Wan"}) == {ONE: "umt5xxl", TWO: "umt5xxl"}
    assert infer_encoders({TWO: 4096}, {"family": "Wan"}) == {TWO: "umt5xxl"}
    for metadata in ({}, {"family": "SDXL"}, {"family": "no such family"}, {"encoders": {}}):
        assert declared_encoders([ONE], metadata) == {}
    assert infer_encoders({ONE: 768}, {"encoders": {ONE: "t5xxl"}}) == {ONE: "t5xxl"}
    assert infer_encoders({ONE: 768}, {"encoders": {ONE: None}}) == {ONE: "clip_l"}


@pytest.mark.parametrize(
    ("key", "width", "label"),
    [
        ("clip_l", 768, "CLIP-L (Stable Diffusion 1, SDXL, SD3, Flux)"),
        (None, 768, "CLIP-L (Stable Diffusion 1, SDXL, SD3, Flux)"),
        ("clip_l", 1024, "CLIP-H (Stable Diffusion 2)"),  # older files call any CLIP so
        (
            None,
            4096,
            "T5-XXL (Flux, SD3, PixArt, Chroma, LTX-Video) or UMT5-XXL (Wan) or Qwen3 8B (FLUX.2 klein 9B) or "
            "Llama 3 8B (HiDream, HunyuanVideo)",
        ),
        ("umt5xxl", 4096, "UMT5-XXL (Wan)"),
        ("t5xxl", 16, "T5-XXL (Flux, SD3, PixArt, Chroma, LTX-Video)"),
        (None, 16, None),
        ("another", 16, None),
    ],
)
def test_labels(key, width, label):
    assert encoder_label(key, width) == label


def test_a_new_encoder_and_family_are_found_everywhere(monkeypatch):
    monkeypatch.setitem(TEXT_ENCODERS, "mini", TextEncoderKind("t5", 48, "Mini (Toy)"))
    monkeypatch.setitem(MODEL_FAMILIES, "Toy", ModelFamily("Toy", {ONE: "mini"}, "text-to-video", ("toy",), None, True))
    assert infer_family({ONE: 48}) == "Toy" and infer_encoders({ONE: 48}, {}) == {ONE: "mini"}
    assert declared_encoders([ONE], {"family": "Toy"}) == {ONE: "mini"} and encoder_label(None, 48) == "Mini (Toy)"


def test_a_new_encoder_of_a_known_width_changes_nothing_for_the_others(monkeypatch):
    """BERT is as wide as CLIP-L, and Llama 2 as T5-XXL."""
    pipelines = (
        {ONE: 4096},
        {ONE: 768},
        {ONE: 1024},
        {ONE: 768, TWO: 1280},
        {ONE: 768, TWO: 4096},
        {ONE: 768, TWO: 1280, THREE: 4096},
    )
    before = [infer_encoders(widths, {}) for widths in pipelines]
    monkeypatch.setitem(TEXT_ENCODERS, "bert", TextEncoderKind("bert", 768, "BERT"))
    monkeypatch.setitem(TEXT_ENCODERS, "llama2", TextEncoderKind("llama2", 4096, "Llama 2"))
    assert [infer_encoders(widths, {}) for widths in pipelines] == before
