"""Training in any torch mode, and models without gradients."""

import copy

import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from helpers import differing, states
from tiny_pipelines import fresh_copy

from diffusers_dti import DTITrainer

SETTINGS = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 16, "max_train_steps": 2}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_has_gradients_in_every_mode(sd, concept, photos, mode):
    """It gives the same concept as outside of the mode, which is still on afterwards, and no trace of it stays."""
    other = copy.deepcopy(sd)
    expected = DTITrainer(other, **SETTINGS).fit(photos).embeddings["text_encoder"]
    with mode():
        sd.load_directional_inversion(concept(sd, "<a>"))
        sd.unload_directional_inversion()
        made = DTITrainer(sd, **SETTINGS).fit(photos)
        assert not torch.is_grad_enabled()
        sd.load_directional_inversion(concept(sd, "<a>"))
        sd.unload_directional_inversion("<dog>")
    assert torch.equal(made.embeddings["text_encoder"], expected)
    assert not any(parameter.is_inference() for parameter in sd.text_encoder.parameters())
    DTITrainer(sd, **SETTINGS).fit(photos)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_weights_made_under_inference_mode_are_refused(sd, photos, component):
    with torch.inference_mode():
        setattr(sd, component, copy.deepcopy(getattr(sd, component)))
    before = states(sd)
    with pytest.raises(ValueError, match=rf"^The weights of {component} were made under `torch.inference_mode\(\)`"):
        DTITrainer(sd, **SETTINGS).fit(photos)
    assert not differing(states(sd), before)


@pytest.mark.parametrize(
    ("component", "compute"),
    [("unet", torch.float32), ("unet", torch.float16), ("text_encoder", torch.float32), ("text_encoder", torch.bfloat16)],
)
def test_layers_stored_in_float8_are_refused(sd, photos, component, compute):
    apply_layerwise_casting(getattr(sd, component), torch.float8_e4m3fn, compute)
    before = states(sd)
    with pytest.raises(ValueError, match=rf"^{component} stores its weights in torch.float8_e4m3fn and computes in {compute} "):
        DTITrainer(sd, **SETTINGS).fit(photos)
    assert not differing(states(sd), before)


def test_a_denoiser_stored_in_float8_trains_in_bfloat16(sd, photos):
    """As one whose weights were rounded to float8 once."""
    sd.to(torch.bfloat16)
    rounded = fresh_copy(sd)
    apply_layerwise_casting(sd.unet, torch.float8_e4m3fn, torch.bfloat16)
    rounded.unet.load_state_dict({k: v.to(torch.bfloat16) for k, v in sd.unet.state_dict().items()})
    made, expected = (DTITrainer(pipe, **SETTINGS).fit(photos).embeddings["text_encoder"] for pipe in (sd, rounded))
    assert torch.equal(made, expected)
