"""What is special about Wan."""

import pytest
import torch
from helpers import family_batch, family_loss

from diffusers_dti import DTITrainer


def test_each_of_wans_two_transformers_takes_its_side_of_the_boundary(wan22):
    batch = family_batch(wan22, 4, timesteps=torch.tensor([124, 125, 126, 999]))  # sigma .876, .875, .874, .001
    calls = {}
    for name in ("transformer", "transformer_2"):
        model = getattr(wan22, name)
        model.register_forward_pre_hook(lambda m, args, name=name: calls.update({name: args[1].tolist()}))
    parts = family_loss(wan22, batch)
    assert calls == {"transformer": pytest.approx([876, 875]), "transformer_2": pytest.approx([874, 1])}
    singles = []
    for model, chosen in ((wan22.transformer, slice(0, 2)), (wan22.transformer_2, slice(2, 4))):
        one = family_batch(wan22, 2, **{k: getattr(batch, k)[chosen] for k in ("latents", "noise", "timesteps")})
        alone = type(wan22)(**wan22.components | {"transformer": model, "transformer_2": None})
        singles.append(family_loss(alone, one))
    assert parts.item() == pytest.approx(torch.stack(singles).mean().item(), rel=1e-5)
    wan22.transformer_2 = None
    with pytest.raises(ValueError, match=r"boundary_ratio 0.875\) has no transformer_2"):
        DTITrainer(wan22)


def test_dropout_stays_off(wan, photos):
    """UMT5 has a dropout of 0.1, which the authors' training turns on."""
    settings = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "max_train_steps": 3}
    plain = DTITrainer(wan, **settings).fit(photos)
    wan.unload_directional_inversion()
    wan.text_encoder.train()
    assert wan.text_encoder.config.dropout_rate == 0.1
    again = DTITrainer(wan, **settings).fit(photos)
    assert wan.text_encoder.training and torch.equal(again.directions["text_encoder"], plain.directions["text_encoder"])
