"""Read files that earlier versions wrote: tests/regression has one folder for each version."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_modern import PIPELINES
from tiny_pipelines import fresh_copy

from diffusers_dti import DirectionalInversion

HERE = Path(__file__).parent / "regression"
SAVED = [(p.parent, name) for p in sorted(HERE.glob("*/expected.json")) for name in json.loads(p.read_text())]


@pytest.mark.parametrize(("folder", "name"), SAVED, ids=lambda x: str(getattr(x, "name", x)))
def test_concepts_of_earlier_versions(folder, name, request, modern):
    rows = json.loads((folder / "expected.json").read_text())[name]
    concept = DirectionalInversion.from_pretrained(folder / name)
    assert concept.placeholder_token == "<dog>" and concept.embeddings.keys() == rows.keys()
    for component, expected in rows.items():
        stored = load_file(folder / name / f"learned_embeds{component.removeprefix('text_encoder')}.safetensors")
        assert torch.equal(stored["<dog>"], torch.tensor(expected))  # stock diffusers reads the same numbers
        torch.testing.assert_close(concept.embeddings[component], torch.tensor(expected), rtol=0, atol=1e-7)
    family = name.partition("/")[0]
    pipe = fresh_copy(modern(family)) if family in PIPELINES else request.getfixturevalue(family)
    pipe.load_directional_inversion(folder / name)
    for component, expected in rows.items():
        encoder = getattr(pipe, component)
        tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"))
        ids = tokenizer("<dog>", add_special_tokens=False).input_ids
        ids = ids[-len(expected) :]  # Gemma and T5 may add a ▁ in front
        torch.testing.assert_close(
            encoder.get_input_embeddings().weight[ids].detach(), torch.tensor(expected), rtol=0, atol=1e-7
        )


@pytest.mark.parametrize("folder", sorted(p for p in HERE.iterdir() if p.is_dir()), ids=lambda p: p.name)
def test_adapters_of_earlier_versions(folder, sdxl):
    stored = load_file(folder / "sdxl" / "adapter" / "pytorch_lora_weights.safetensors")
    weights = "pytorch_lora_weights.safetensors"
    sdxl.load_lora_weights(folder / "sdxl" / "adapter", weight_name=weights, adapter_name="old")
    there = {n: p for n, p in sdxl.unet.named_parameters() if ".old." in n}
    assert len(there) == len(stored) > 0
    for name, parameter in there.items():
        key = "unet." + name.replace("_A.old.", ".down.").replace("_B.old.", ".up.")
        assert torch.equal(parameter, stored[key]), name


@pytest.mark.parametrize("folder", sorted(HERE.glob("*/checkpoint-2")), ids=lambda p: p.parent.name)
def test_checkpoints_of_earlier_versions_are_concepts(folder):
    concept, state = DirectionalInversion.from_pretrained(folder), load_file(folder / "training_state.safetensors")
    assert concept.placeholder_token == "<dog>" and concept.metadata["training"]["max_train_steps"] == 4
    for component, directions in concept.directions.items():
        torch.testing.assert_close(directions, state[f"rows.0.{component}.direction"], rtol=0, atol=1e-6)
