"""Every method is a row that training and model cards can use."""

import re
from dataclasses import fields

import pytest
import torch

from diffusers_dti import DirectionalInversion, DTIConfig
from diffusers_dti.concept.methods import METHODS, Method
from diffusers_dti.concept.model_card import model_card
from diffusers_dti.families.stable_diffusion import StableDiffusionXL


def card(method):
    concept = DirectionalInversion.from_embeddings("<dog>", {"text_encoder": torch.ones(1, 16)}, {"method": method})
    return str(model_card(concept, "user/dti-dog"))


@pytest.mark.parametrize("name", METHODS)
def test_the_rows_are_consistent(name):
    method = METHODS[name]
    assert method.settings.keys() <= {field.name for field in fields(DTIConfig)}
    for setting in method.settings:  # the settings are defaults, so None has to be the value that they replace
        assert getattr(DTIConfig(), setting) is None, setting
    cited = re.findall(r"\[[^]]+ et al\., 20\d\d\]\(https://arxiv\.org/abs/(\d{4}\.\d{5})\)", method.citation)
    assert cited and set(re.findall(r"\d{4}\.\d{5}", method.summary)) <= set(cited)
    assert method.raw or not method.contextual_start


@pytest.mark.parametrize("name", METHODS)
def test_a_method_sets_what_its_row_says(name, sdxl):
    resolved = DTIConfig(method=name).resolve(StableDiffusionXL(sdxl))
    for setting, value in METHODS[name].settings.items():
        assert getattr(resolved, setting) == value
    assert resolved.raw == METHODS[name].raw
    own = DTIConfig(method=name, learning_rate=0.5).resolve(StableDiffusionXL(sdxl))
    assert own.learning_rate == 0.5


@pytest.mark.parametrize("name", METHODS)
def test_the_card_cites_the_method(name):
    text = card(name)
    assert f"learned from a few photos by {METHODS[name].citation}" in text
    assert ("directional-textual-inversion" in text.split("---")[1]) == (not METHODS[name].raw)


def test_a_new_method_is_found_by_settings_and_card(monkeypatch):
    monkeypatch.setitem(METHODS, "mine", Method("a method of a test", "Mine ([Me, 2026](https://example.org))", raw=True))
    assert DTIConfig(method="mine").raw
    assert "by Mine ([Me, 2026](https://example.org))" in card("mine") and "directional" not in card("mine").split("---")[1]
