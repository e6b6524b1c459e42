"""Load and train on offloaded pipelines. On a CPU, the "device" is the CPU too."""

import accelerate
import diffusers
import pytest
import torch
import transformers
from helpers import differing, encoded, hooks, state, states
from packaging.version import Version

from diffusers_dti import DTITrainer
from diffusers_dti.families import find_family
from diffusers_dti.pipeline.text_encoders import find_text_encoders
from diffusers_dti.training.frozen import frozen

OFFLOADS = ["enable_model_cpu_offload", "enable_sequential_cpu_offload"]


@pytest.mark.parametrize("offload", OFFLOADS)
def test_loading_and_unloading_under_offload(sdxl, concept, offload):
    made = concept(sdxl, vectors=2)
    before = states(sdxl)
    sdxl.load_directional_inversion(made)
    states_of_prompt = encoded(sdxl, "a <dog> on the beach")
    sdxl.unload_directional_inversion()
    getattr(sdxl, offload)(device="cpu")
    there = hooks(sdxl)
    assert any(there.values())
    sdxl.load_directional_inversion(concept(sdxl, seed=1))
    sdxl.load_directional_inversion(made, replace=True)
    assert hooks(sdxl) == there
    sdxl.remove_all_hooks()  # diffusers' own sequential offload to "cpu:0" fails in accelerate at the first call
    torch.testing.assert_close(encoded(sdxl, "a <dog> on the beach"), states_of_prompt, rtol=0, atol=1e-5)
    getattr(sdxl, offload)(device="cpu")
    sdxl.unload_directional_inversion()
    assert hooks(sdxl) == there
    sdxl.remove_all_hooks()
    # The encoder's first call leaves attributes of transformers.
    assert not [k for k in differing(states(sdxl), before) if "attributes" not in k]


@pytest.mark.parametrize("offload", OFFLOADS)
def test_training_under_offload(sdxl, photos, offload):
    settings = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 16, "max_train_steps": 3}
    plain = DTITrainer(sdxl, **settings).fit(photos)
    sdxl.unload_directional_inversion()
    getattr(sdxl, offload)(device="cpu")
    there = hooks(sdxl)
    trained = DTITrainer(sdxl, **settings).fit(photos)
    assert hooks(sdxl) == there
    for component, v in plain.directions.items():
        torch.testing.assert_close(trained.directions[component], v, rtol=0, atol=1e-5)
    sdxl.remove_all_hooks()
    assert encoded(sdxl, "a <dog>").isfinite().all()


def test_frozen_gives_everything_back(sdxl):
    sdxl.unet.train()
    sdxl.vae.decoder.requires_grad_(False)
    modes = [m.training for m in sdxl.unet.modules()]
    gradients = [p.requires_grad for p in sdxl.vae.parameters()]
    with pytest.raises(KeyboardInterrupt), frozen(find_family(sdxl)):
        assert not any(m.training for m in sdxl.unet.modules())
        assert not any(p.requires_grad for p in sdxl.unet.parameters())
        raise KeyboardInterrupt
    assert [m.training for m in sdxl.unet.modules()] == modes
    assert [p.requires_grad for p in sdxl.vae.parameters()] == gradients


def on_disk_from_the_start(pipe, folder):
    pipe.text_encoder.save_pretrained(folder / "saved")
    if Version(transformers.__version__) < Version("5"):
        pytest.skip("this transformers cannot put a whole model on the disk")
    kind, where = type(pipe.text_encoder), folder / "offloaded"
    pipe.text_encoder = kind.from_pretrained(folder / "saved", device_map={"": "disk"}, offload_folder=str(where))


def moved_to_the_disk(pipe, folder):
    accelerate.disk_offload(pipe.text_encoder, folder, execution_device=torch.device("cpu"))


def without_weights(pipe, folder):
    pipe.text_encoder.to("meta")


@pytest.mark.parametrize("away", [on_disk_from_the_start, moved_to_the_disk, without_weights])
def test_weights_that_are_not_in_memory(sdxl, concept, photos, away, tmp_path):
    """Refused before anything changes, also in the other encoder."""
    made = concept(sdxl)
    away(sdxl, tmp_path)
    before = hooks(sdxl), states_of_the_second(sdxl)
    for attempt in (
        lambda: sdxl.load_directional_inversion(made),
        lambda: DTITrainer(sdxl, initializer_token="dog", resolution=16, max_train_steps=1).fit(photos),
    ):
        with pytest.raises(ValueError, match="and concepts need them in memory: load it without offloading to the disk"):
            attempt()
        assert sdxl.directional_inversions == {} and (hooks(sdxl), states_of_the_second(sdxl)) == before


def states_of_the_second(pipe):
    encoder = find_text_encoders(pipe)["text_encoder_2"]
    return state(encoder.tokenizer, encoder.model)


@pytest.mark.skipif(Version(diffusers.__version__) < Version("0.38"), reason="diffusers needs an accelerator for it")
def test_group_offload(sdxl, concept):
    """Loading works. Training does as well (tests/training/test_saved_weights.py)."""
    made = concept(sdxl, vectors=2)
    sdxl.load_directional_inversion(made)
    expected = encoded(sdxl, "a <dog> on the beach")
    sdxl.unload_directional_inversion()
    plain = encoded(sdxl, "a dog on the beach")
    sdxl.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    sdxl.load_directional_inversion(made)
    assert torch.equal(encoded(sdxl, "a <dog> on the beach"), expected)
    sdxl.unload_directional_inversion()
    assert torch.equal(encoded(sdxl, "a dog on the beach"), plain)


def test_a_compiled_encoder(sdxl, concept):
    made = concept(sdxl, vectors=2)
    sdxl.load_directional_inversion(made)
    expected = encoded(sdxl, "a <dog> on the beach")
    sdxl.unload_directional_inversion()
    sdxl.text_encoder = torch.compile(sdxl.text_encoder, backend="eager")
    sdxl.load_directional_inversion(made)
    assert torch.equal(encoded(sdxl, "a <dog> on the beach"), expected)
    sdxl.unload_directional_inversion()
    assert len(sdxl.text_encoder.get_input_embeddings().weight) == len(sdxl.tokenizer)


def test_a_table_of_whole_numbers_is_refused(sdxl, concept):
    """A quantized table has no room for a row: it would be rounded to nothing."""
    table = sdxl.text_encoder_2.get_input_embeddings()
    table.weight = torch.nn.Parameter(table.weight.to(torch.int8), requires_grad=False)
    before = states(sdxl)
    with pytest.raises(ValueError, match="text_encoder_2 has a table of embeddings in torch.int8: .* floating-point"):
        sdxl.load_directional_inversion(concept(sdxl))
    assert not differing(states(sdxl), before)


def test_a_compiled_encoder_is_compiled_once_more_for_many_words(sdxl, concept):
    """Its table grows in steps: torch compiles a graph for each length of it, and after eight runs without them."""
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    sdxl.text_encoder = torch.compile(sdxl.text_encoder, backend=count)
    words = [f"<{number}>" for number in range(10)]
    plain = encoded(sdxl, "a dog on the beach")
    before = state(sdxl.tokenizer, sdxl.text_encoder)
    once = len(compiled)
    for word in words:
        sdxl.load_directional_inversion(concept(sdxl), token=word)
        encoded(sdxl, f"a {word} on the beach")
    assert len(compiled) == 2 * once
    expected = encoded(sdxl, "a <9> on the beach")
    for word in words[:-1]:
        sdxl.unload_directional_inversion(word)
        assert torch.equal(encoded(sdxl, "a <9> on the beach"), expected)
    table = sdxl.text_encoder.get_input_embeddings().weight
    assert not table[len(sdxl.tokenizer) :].any()
    sdxl.unload_directional_inversion()
    assert torch.equal(encoded(sdxl, "a dog on the beach"), plain) and len(compiled) == 2 * once
    assert not differing(state(sdxl.tokenizer, sdxl.text_encoder), before)
