"""The UNet families: the forward process, the latents, and which UNets are trained."""

import pytest
import torch

from diffusers_dti.families import find_family


@pytest.mark.parametrize("name", ["sdxl", "sd"])
def test_latents_are_the_pipelines_own(name, request):
    pipe = request.getfixturevalue(name)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    encoded = find_family(pipe).encode_images(pixels)
    posterior = pipe.vae.encode(pixels).latent_dist
    for i, (mean, std) in enumerate(encoded):
        torch.testing.assert_close(mean[0], posterior.mean[i] * 0.13, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(std[0], posterior.std[i] * 0.13, rtol=1e-4, atol=1e-5)


def test_compiled_unets_are_trained_and_those_of_videos_refused(sd):
    plain = sd.unet
    sd.unet = torch.compile(plain)
    assert find_family(sd).name == "Stable Diffusion 1.5 and 2.x"
    sd.unet = torch.nn.Module()  # another class with the same settings, as AnimateDiff's
    sd.unet.config = plain.config
    with pytest.raises(ValueError, match="StableDiffusionPipeline is not one"):
        find_family(sd)


@pytest.mark.parametrize(
    "name",
    [
        "LCMScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "TCDScheduler",
    ],
)
@pytest.mark.parametrize("settings", [{}, {"prediction_type": "v_prediction", "beta_end": 0.02}])
def test_the_forward_process_is_the_schedulers(sdxl, name, settings):
    """For any sampler: those of Turbo, of LCM, or of a model with v-prediction."""
    import diffusers

    sdxl.scheduler = getattr(diffusers, name).from_config(sdxl.scheduler.config, **settings)
    made = find_family(sdxl).scheduler
    assert torch.equal(made.alphas_cumprod, sdxl.scheduler.alphas_cumprod)
    assert made.config.prediction_type == settings.get("prediction_type", "epsilon")
