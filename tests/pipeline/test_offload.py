"""Load and train on offloaded pipelines. On a CPU, the "device" is the CPU too."""

import pytest
import torch
from helpers import differing, encoded, hooks, states

from diffusers_dti import DTITrainer
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
    sdxl.load_directional_inversion(made)
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
    with pytest.raises(KeyboardInterrupt), frozen(sdxl):
        assert not any(m.training for m in sdxl.unet.modules())
        assert not any(p.requires_grad for p in sdxl.unet.parameters())
        raise KeyboardInterrupt
    assert [m.training for m in sdxl.unet.modules()] == modes
    assert [p.requires_grad for p in sdxl.vae.parameters()] == gradients
