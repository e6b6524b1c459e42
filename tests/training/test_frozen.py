"""The pipeline while it is trained, and after it."""

import pytest
import torch
from helpers import hooks

from diffusers_dti.training.frozen import frozen, gradient_checkpointing


def flags(pipe):
    """Each module's mode and each parameter's need for a gradient."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    modes = {f"{name}.{path}": m.training for name, part in modules.items() for path, m in part.named_modules()}
    gradients = {f"{name}.{path}": p.requires_grad for name, part in modules.items() for path, p in part.named_parameters()}
    return modes, gradients


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_frozen_and_comes_back(pipe, fails):
    pipe.components["vae"].train()
    next(pipe.components["text_encoder"].parameters()).requires_grad_(False)
    before = flags(pipe)
    assert True in before[0].values() and {True, False} <= set(before[1].values())
    try:
        with frozen(pipe):
            inside = flags(pipe)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert not any(inside[0].values()) and not any(inside[1].values())
    assert flags(pipe) == before


def test_dropout_is_off(wan):
    """UMT5 has some, and after `train()` it would act."""
    encoder = wan.text_encoder.train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert not torch.equal(encoder(ids).last_hidden_state, encoder(ids).last_hidden_state)
        with frozen(wan):
            assert torch.equal(encoder(ids).last_hidden_state, encoder(ids).last_hidden_state)


def test_offloading_is_off_meanwhile(sdxl):
    sdxl.enable_sequential_cpu_offload(device="cpu")
    before = hooks(sdxl)
    assert any(before.values())
    with frozen(sdxl):
        assert not any(part for part in hooks(sdxl).values() if any(h[1] != "NoneType" for h in part))
        assert {p.device.type for p in sdxl.unet.parameters()} == {"cpu"}
    assert hooks(sdxl) == before


@pytest.mark.parametrize("fails", [False, True])
def test_gradient_checkpointing_is_temporary(sdxl, fails):
    try:
        with gradient_checkpointing([sdxl.unet], True):
            assert sdxl.unet.is_gradient_checkpointing
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert not sdxl.unet.is_gradient_checkpointing


def test_gradient_checkpointing_that_was_on_stays_on(sdxl):
    sdxl.unet.enable_gradient_checkpointing()
    for enabled in (True, False):
        with gradient_checkpointing([sdxl.unet], enabled):
            assert sdxl.unet.is_gradient_checkpointing
        assert sdxl.unet.is_gradient_checkpointing
    sdxl.unet.disable_gradient_checkpointing()
    with gradient_checkpointing([sdxl.unet], False):
        assert not sdxl.unet.is_gradient_checkpointing
