"""Flow matching against the written formula."""

import pytest
import torch
from helpers import family_batch, family_loss

from diffusers_dti import DTITrainer
from diffusers_dti.families import find_family


@pytest.mark.parametrize("name", ["sana", "wan"])
def test_the_flow_matching_loss_is_the_written_one(name, request):
    """sigma in (0, 1] without any shift, target noise - latents, time sigma · 1000 (paper, section 3)."""
    pipe = request.getfixturevalue(name)
    batch, seen = family_batch(pipe), {}
    model, scale = pipe.transformer, {"sana": 0.5, "wan": 1.0}[name]
    if name == "sana":
        model.register_to_config(timestep_scale=scale)

    def velocity(module, args, kwargs):
        seen.update(zip(("hidden_states", "timestep", "encoder_hidden_states"), args))
        seen.update(kwargs)

    with model.register_forward_pre_hook(velocity, with_kwargs=True), torch.no_grad():
        loss = family_loss(pipe, batch)
        # Timestep 0 is pure noise, and 999 has the least noise.
        sigma = (1000 - batch.timesteps.double()) / 1000
        at = sigma.view(-1, *[1] * (batch.latents.ndim - 1))
        noisy = (1 - at) * batch.latents + at * batch.noise
        torch.testing.assert_close(seen["hidden_states"].double(), noisy, rtol=0, atol=1e-6)
        torch.testing.assert_close(seen["timestep"].double(), sigma * 1000 * scale, rtol=1e-6, atol=0)
        prediction = model(**seen).sample
    expected = (prediction.double() - (batch.noise - batch.latents)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_samplers_flow_shift_is_ignored_and_a_flow_schedulers_shift_is_kept(sana, wan):
    import diffusers

    even = (1000 - torch.arange(1000)) / 1000
    for pipe in (sana, wan):
        torch.testing.assert_close(find_family(pipe).scheduler.sigmas, even)
    wan.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.testing.assert_close(find_family(wan).scheduler.sigmas, 3 * even / (1 + 2 * even))
    wan.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    torch.testing.assert_close(find_family(wan).scheduler.sigmas, even)
    sana.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match="DDIMScheduler with prediction_type 'epsilon' is not a scheduler for flow matching"):
        DTITrainer(sana)
