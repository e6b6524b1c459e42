"""Modular pipelines, against the ordinary ones of the same components."""

import copy
import re
from pathlib import Path

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    ComponentsManager,
    ModularPipeline,
    StableDiffusionXLModularPipeline,
    WanModularPipeline,
)
from diffusers.modular_pipelines.wan import encoders as wan_encoders
from helpers import differing, hooks, states
from tiny_pipelines import CALLS, generate

from diffusers_dti.pipeline import exchange, matching, vocabulary
from diffusers_dti.pipeline.opening import DTYPE_ARGUMENT

CLASSES = {"StableDiffusionXLPipeline": StableDiffusionXLModularPipeline, "WanPipeline": WanModularPipeline}
GUIDED = {"negative_prompt": "blurry", "guidance_scale": 5.0}
TOLERANCE = 1e-5  # SDXL's ordinary pipeline runs both prompts of guidance in one batch, which rounds differently


def modular(pipe, manager=None):
    """Build a modular pipeline of copies of an ordinary one's components."""
    made = CLASSES[type(pipe).__name__](components_manager=manager)
    parts = {n: copy.deepcopy(c) for n, c in pipe.components.items() if n in made.components and c is not None}
    made.update_components(guider=ClassifierFreeGuidance(guidance_scale=GUIDED["guidance_scale"]), **parts)
    return made


def called(made, prompt):
    """Call a modular pipeline as `tiny_pipelines.generate` does; return the whole state and the image."""
    wan = isinstance(made, WanModularPipeline)
    settings = CALLS["WanPipeline"] if wan else {"height": 16, "width": 16}
    state = made(
        prompt=prompt, negative_prompt=GUIDED["negative_prompt"], num_inference_steps=2, output_type="np",
        generator=torch.Generator().manual_seed(0), **settings,
    )  # fmt: skip
    return state, torch.as_tensor(state.get("videos" if wan else "images"))


def generated(made, prompt):
    return called(made, prompt)[1]


@pytest.fixture(params=["sdxl", "wan"])
def ordinary(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("vectors", [1, 3])
def test_the_image_is_that_of_the_ordinary_pipeline(ordinary, concept, vectors):
    made = modular(ordinary)
    words = generated(made, "a dog on the beach"), generated(made, "a <dog> on the beach")
    for pipe in (ordinary, made):
        pipe.load_directional_inversion(concept(ordinary, vectors=vectors))
    state, image = called(made, "a <dog> on the beach")
    settings = {"max_sequence_length": 24} if isinstance(made, WanModularPipeline) else {}
    with torch.no_grad():
        expected = ordinary.encode_prompt("a <dog> on the beach", negative_prompt="blurry", **settings)
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    assert len(expected) in (2, 4)
    for name, embeds in zip(names[: len(expected)], expected):
        assert torch.equal(state.get(name), embeds), name
    same = generate(ordinary, "a <dog> on the beach", **GUIDED)
    torch.testing.assert_close(image, same, rtol=0, atol=TOLERANCE)
    for other in words:
        assert (image - other).abs().max() > 100 * TOLERANCE
    assert list(made.directional_inversions) == ["<dog>"]


def test_unloading_leaves_no_trace(ordinary, concept):
    made = modular(ordinary)
    plain = generated(made, "a <dog> on the beach")  # the first call also makes encoders install their own hooks
    before, config = states(made), dict(made.config)
    made.load_directional_inversion(concept(ordinary, vectors=3))
    made.load_directional_inversion(concept(ordinary, "<cat>", seed=1))
    assert not torch.equal(generated(made, "a <dog> on the beach"), plain)
    made.unload_directional_inversion("<dog>")
    ordinary.load_directional_inversion(concept(ordinary, "<cat>", seed=1))
    generate(ordinary, "a dog")
    assert not differing(states(made), states(ordinary)) and list(made.directional_inversions) == ["<cat>"]
    made.unload_directional_inversion()
    assert not differing(states(made), before) and dict(made.config) == config
    assert torch.equal(generated(made, "a <dog> on the beach"), plain)


def test_errors_leave_the_pipeline_as_it_was(ordinary, sd, concept, monkeypatch):
    made = modular(ordinary)
    made.load_directional_inversion(concept(ordinary, vectors=2))
    before = states(made)
    with pytest.raises(ValueError, match="<dog> is already loaded"):
        made.load_directional_inversion(concept(ordinary))
    with pytest.raises(ValueError, match="is for text_encoder, 5 wide"):
        made.load_directional_inversion({"<cat>": torch.ones(5)})
    with pytest.raises(ValueError, match="<cat> is not loaded"):
        made.unload_directional_inversion(["<dog>", "<cat>"])
    assert not differing(states(made), before)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(vocabulary, "_set_state", interrupted)  # after tokens and rows are added
    with pytest.raises(KeyboardInterrupt):
        made.load_directional_inversion(concept(ordinary, "<cat>", vectors=2))
    assert not differing(states(made), before)


@pytest.mark.parametrize("first", ["offload", "load"])
def test_a_components_manager_offloads(ordinary, concept, monkeypatch, first):
    """The manager asks for free memory, which a CPU does not tell."""
    monkeypatch.setattr(torch.cpu, "mem_get_info", lambda index=None: (2**40, 2**40), raising=False)
    manager = ComponentsManager()
    made = modular(ordinary, manager)
    generated(made, "a dog")
    before, ids = states(made), set(manager.components)
    made.load_directional_inversion(concept(ordinary, vectors=3))
    image = generated(made, "a <dog> on the beach")
    if first == "offload":
        made.unload_directional_inversion()
    manager.enable_auto_cpu_offload(device="cpu")
    there = hooks(made)
    assert ("", "CustomOffloadHook", torch.device("cpu:0"), None) in there["text_encoder"]
    if first == "offload":
        made.load_directional_inversion(concept(ordinary, vectors=3))
    assert torch.equal(generated(made, "a <dog> on the beach"), image)
    assert hooks(made) == there and set(manager.components) == ids
    made.unload_directional_inversion()
    assert hooks(made) == there
    manager.disable_auto_cpu_offload()
    # Accelerate leaves an attribute.
    assert not [k for k in differing(states(made), before) if "attributes" not in k]


def test_components_that_are_not_loaded_yet(sdxl, concept, tmp_path, monkeypatch):
    sdxl.save_pretrained(tmp_path)
    made = ModularPipeline.from_pretrained(str(tmp_path))
    with pytest.raises(
        ValueError, match=r"tokenizer_2 of this StableDiffusionXL.* not loaded yet: call `load_components\(\)` first"
    ):
        made.load_directional_inversion(concept(sdxl))
    assert made.text_encoder is None and made.tokenizer is None
    warnings = []
    for module in (exchange, matching):
        monkeypatch.setattr(module.logger, "warning", warnings.append)
    made.load_components(["text_encoder_2", "tokenizer_2"])
    made.load_directional_inversion(concept(sdxl))
    (warning,) = warnings
    assert "no text_encoder: that part of the concept stays unused" in warning and "call `load_components()` first" in warning
    made.unload_directional_inversion()
    made.load_components(["text_encoder", "tokenizer"])
    loaded = made.load_directional_inversion(concept(sdxl, vectors=3))
    assert set(loaded.directions) == {"text_encoder", "text_encoder_2"} and len(warnings) == 1


def test_pipelines_of_single_blocks_share_what_is_loaded(sdxl, concept):
    manager = ComponentsManager()
    made = modular(sdxl, manager)
    rest = made.blocks
    text = rest.sub_blocks.pop("text_encoder").init_pipeline(components_manager=manager)
    text.update_components(**{n: c for n, c in made.components.items() if n in text.components})
    text.load_directional_inversion(concept(sdxl, vectors=3))
    assert list(made.directional_inversions) == ["<dog>"]
    state, _ = called(made, "a <dog> on the beach")
    assert torch.equal(text(prompt="a <dog> on the beach", output="prompt_embeds"), state.get("prompt_embeds"))
    with pytest.raises(ValueError, match="has no text encoder with a tokenizer of its own.*neither.$"):
        rest.init_pipeline(components_manager=manager).load_directional_inversion(concept(sdxl))
    made.unload_directional_inversion("<dog>")
    assert not text.directional_inversions


@pytest.mark.parametrize("word", ["“dog”", "＜dog＞", "<my  dog>", "<a&amp;b>"])
def test_placeholders_that_cleaning_changes_are_refused(wan, concept, word):
    """As in the ordinary pipeline. The function that cleans prompts is in the module of the blocks."""
    made = modular(wan)
    before = states(made)
    with pytest.raises(ValueError, match="WanModularPipeline cleans prompts before tokenizing them, which would remove"):
        made.load_directional_inversion(concept(wan), token=word)
    assert not differing(states(made), before)


def test_without_ftfy(wan, concept, monkeypatch):
    """The modular function fails without ftfy, unlike the ordinary one. Loading still works."""
    monkeypatch.delattr(wan_encoders, "ftfy")
    made = modular(wan)
    made.load_directional_inversion(concept(wan))
    assert list(made.directional_inversions) == ["<dog>"]


def test_saved_with_a_concept_in_it(sdxl, concept, tmp_path):
    made = modular(sdxl)
    made.load_directional_inversion(concept(sdxl))
    made.save_pretrained(str(tmp_path))
    again = ModularPipeline.from_pretrained(str(tmp_path))
    again.load_components()
    again.update_components(guider=ClassifierFreeGuidance(guidance_scale=GUIDED["guidance_scale"]))
    id, rows = again.tokenizer.convert_tokens_to_ids("<dog>"), len(again.text_encoder.get_input_embeddings().weight)
    assert torch.equal(again.text_encoder.get_input_embeddings().weight[id], concept(sdxl).embeddings["text_encoder"][0])
    again.load_directional_inversion(concept(sdxl))  # reuses its rows
    assert len(again.text_encoder.get_input_embeddings().weight) == rows
    both = [generated(p, "a <dog> on the beach") for p in (again, made)]
    torch.testing.assert_close(*both, rtol=0, atol=TOLERANCE)


def test_the_code_of_the_docs(sdxl, concept, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text()
    block = re.findall(r"```python\n(.*?)```", page, re.S)[1]
    monkeypatch.chdir(tmp_path)
    sdxl.save_pretrained("sdxl")
    concept(sdxl, vectors=2).save_pretrained("user/dti-dog")
    opened, called = ModularPipeline.from_pretrained, ModularPipeline.__call__
    offload, small = ComponentsManager.enable_auto_cpu_offload, {"num_inference_steps": 1, "height": 16, "width": 16}
    monkeypatch.setattr(ModularPipeline, "from_pretrained", lambda name, **kwargs: opened("sdxl", **kwargs))
    monkeypatch.setattr(ModularPipeline, "__call__", lambda self, **kwargs: called(self, **kwargs | small))
    monkeypatch.setattr(torch.cpu, "mem_get_info", lambda index=None: (2**40, 2**40), raising=False)
    monkeypatch.setattr(ComponentsManager, "enable_auto_cpu_offload", lambda self, device: offload(self, device="cpu"))
    names: dict = {}
    exec(block.replace("dtype=", f"{DTYPE_ARGUMENT}="), names)  # README: older releases of diffusers have another name for it
    assert names["image"].size == (16, 16) and not names["pipe"].directional_inversions
