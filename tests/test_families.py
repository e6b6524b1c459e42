"""Each family against the conditioning and prediction of its own pipeline."""

import pytest
import torch

from diffusers_dti import DTITrainer, families
from diffusers_dti.families import sd as sd_family
from diffusers_dti.families import sdxl as sdxl_family


def test_pipelines_find_their_families(sdxl, sd):
    assert families.find(sdxl) is sdxl_family and families.find(sd) is sd_family
    sdxl.text_encoder = None  # the refiner
    with pytest.raises(
        ValueError, match=r"supported for SDXL, Stable Diffusion 1.5 and 2.x; StableDiffusionXLPipeline is none"
    ):
        families.find(sdxl)
    sd.unet.register_to_config(in_channels=9)  # inpainting
    with pytest.raises(ValueError, match="StableDiffusionPipeline is none"):
        DTITrainer(sd)


def test_compiled_unets_are_trained_and_those_of_videos_refused(sd):
    plain = sd.unet
    sd.unet = torch.compile(plain)
    assert families.find(sd) is sd_family
    sd.unet = torch.nn.Module()  # another class with the same settings, as AnimateDiff's
    sd.unet.config = plain.config
    with pytest.raises(ValueError, match="StableDiffusionPipeline is none"):
        families.find(sd)


@pytest.mark.parametrize("name", ["sdxl", "sd"])
def test_conditioning_is_the_pipelines_own(name, request):
    pipe = request.getfixturevalue(name)
    prompts = ["a dog on the beach", "a cat"]
    ours = families.find(pipe).encode_prompts(pipe, prompts)
    theirs = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours["context"], theirs[0])
    if name == "sdxl":
        torch.testing.assert_close(ours["pooled"], theirs[2])


@pytest.mark.parametrize("name", ["sdxl", "sd"])
def test_latents_are_the_pipelines_own(name, request):
    pipe = request.getfixturevalue(name)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    encoded = families.find(pipe).encode_images(pipe, pixels)
    posterior = pipe.vae.encode(pixels).latent_dist
    for i, (mean, std) in enumerate(encoded):
        torch.testing.assert_close(mean[0], posterior.mean[i] * 0.13, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(std[0], posterior.std[i] * 0.13, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sdxl", "sd"])
def test_every_family_learns(name, request, photos):
    pipe = request.getfixturevalue(name)
    settings = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 16, "train_batch_size": 2}
    trainer = DTITrainer(pipe, **settings, max_train_steps=60)
    trainer.fit(photos)
    assert trainer.history[-1]["loss"] < trainer.history[0]["loss"] and trainer.history[-1]["angle"] > 5


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
    """Whatever sampler a pipeline has: Turbo's, LCM's, a v-prediction model's."""
    import diffusers

    sdxl.scheduler = getattr(diffusers, name).from_config(sdxl.scheduler.config, **settings)
    made = families.find(sdxl).training_scheduler(sdxl)
    assert torch.equal(made.alphas_cumprod, sdxl.scheduler.alphas_cumprod)
    assert made.config.prediction_type == settings.get("prediction_type", "epsilon")
