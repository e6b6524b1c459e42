"""Find families, and compare each with its own pipeline."""

import inspect

import diffusers
import pytest
import torch
from helpers import family_batch, rows_in
from tiny_modern import PIPELINES
from tiny_pipelines import fresh_copy

from diffusers_dti import DTITrainer
from diffusers_dti.families import find_family
from diffusers_dti.families.sana import Sana
from diffusers_dti.families.stable_diffusion import StableDiffusion, StableDiffusionXL
from diffusers_dti.families.wan import Wan
from diffusers_dti.training.samples import TrainingSamples

NAMES = ["sdxl", "sd", "sana", "sprint", "wan", "wan22"]
PROMPTS = ["a dog on the beach", "a cat"]
UNTIDY = [" A Dog on  the beach &amp; a tower ", "a cat"]  # each pipeline cleans these in its own way


def test_pipelines_find_their_families(request, sdxl, sd, wan):
    classes = {"sdxl": StableDiffusionXL, "sd": StableDiffusion, "sana": Sana, "sprint": Sana, "wan": Wan, "wan22": Wan}
    for name, family in classes.items():
        pipe = request.getfixturevalue(name)
        assert type(find_family(pipe)) is family and find_family(pipe).pipe is pipe
    sdxl.text_encoder = None  # the refiner
    listed = "SDXL, Stable Diffusion 1.5 and 2.x, SANA, Wan, .*"
    with pytest.raises(ValueError, match=f"supports {listed}, with all their components; StableDiffusionXLPipeline is not one"):
        find_family(sdxl)
    sd.unet.register_to_config(in_channels=9)  # inpainting
    with pytest.raises(ValueError, match="StableDiffusionPipeline is not one"):
        DTITrainer(sd)
    wan.transformer.register_to_config(in_channels=36)  # image to video
    with pytest.raises(ValueError, match="WanPipeline is not one"):
        DTITrainer(wan)


OTHERS = {  # with the classes of a family that is trained, but other inputs
    "ZImageOmniPipeline": ("z_image", {"siglip_feat_dim": 8}, ["siglip", "siglip_processor"]),
    "StableDiffusion3InpaintPipeline": ("sd3", {"in_channels": 9}, []),
    "FluxFillPipeline": ("flux", {"in_channels": 96}, []),
    "Flux2Pipeline": ("klein", {}, []),  # FLUX.2 dev
    "QwenImageEditPipeline": ("qwen_image", {}, ["processor"]),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_newer_pipelines_find_their_families(name, modern):
    names = {"z_image": "Z-Image", "lumina2": "Lumina 2", "sd3": "Stable Diffusion 3", "flux": "Flux", "klein": "FLUX.2 klein"}
    assert find_family(modern(name)).name == names.get(name, "Qwen-Image")


@pytest.mark.parametrize("name", OTHERS)
def test_editing_and_inpainting_load_concepts_but_are_not_trained(name, modern, concept):
    base, config, more = OTHERS[name]
    parts = fresh_copy(modern(base)).components
    parts["transformer"].register_to_config(**config)
    if name == "Flux2Pipeline":
        parts["text_encoder"].config.model_type = "mistral3"
    made_of = inspect.signature(getattr(diffusers, name)).parameters
    pipe = getattr(diffusers, name)(**{k: v for k, v in parts.items() if k in made_of}, **dict.fromkeys(more))
    with pytest.raises(ValueError, match=f"{name} is not one of them. Loading may still work"):
        DTITrainer(pipe)
    made = concept(pipe)
    pipe.load_directional_inversion(made)
    for component, rows in made.embeddings.items():
        torch.testing.assert_close(rows_in(pipe, component), rows[0])


def test_lumina_2_and_sana_share_their_encoder(modern, sana, photos, tmp_path):
    """What one learns loads in the other, as it is."""
    lumina2 = fresh_copy(modern("lumina2"))
    settings = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "max_train_steps": 1}
    for source, other in ((lumina2, sana), (sana, lumina2)):
        learned = DTITrainer(source, **settings, output_dir=tmp_path / type(source).__name__).fit(photos)
        source.unload_directional_inversion()
        other.load_directional_inversion(str(tmp_path / type(source).__name__))
        assert torch.equal(rows_in(other, "text_encoder"), learned.embeddings["text_encoder"][0])
        other.unload_directional_inversion()


@pytest.mark.parametrize("name", NAMES)
def test_conditioning_is_the_pipelines_own(name, request):
    pipe = request.getfixturevalue(name)
    ours = find_family(pipe).encode_prompts(UNTIDY, [0, 0])
    settings = {"do_classifier_free_guidance": False, "device": "cpu"}
    if name in ("sana", "sprint"):
        settings.pop("do_classifier_free_guidance") if name == "sprint" else None
        theirs, mask = pipe.encode_prompt(UNTIDY, **settings)[:2]
        lengths = mask.sum(-1).tolist()
        assert lengths == ours["mask"].sum(-1).tolist() and lengths[0] > lengths[1] == 3
        for mine, its, real in zip(ours["context"], theirs, lengths):
            torch.testing.assert_close(mine[:real], its[:real], rtol=1e-5, atol=1e-5)
    elif name in ("wan", "wan22"):
        theirs = pipe.encode_prompt(UNTIDY, max_sequence_length=512, **settings)[0]
        torch.testing.assert_close(ours["context"], theirs, rtol=1e-5, atol=1e-5)
    else:
        theirs = pipe.encode_prompt(UNTIDY, num_images_per_prompt=1, **settings)
        torch.testing.assert_close(ours["context"], theirs[0])
        if name == "sdxl":
            torch.testing.assert_close(ours["pooled"], theirs[2])


def test_the_papers_preset_has_the_authors_settings(sdxl, sana, wan):
    """The values in their launchers for SDXL, SANA 1.5 and Wan 2.1."""
    names = ("resolution", "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "kappa", "zero_pad")
    table = {sdxl: (768, 4, 1, 400, 1e-4, None), sana: (1024, 2, 2, 500, 5e-5, True), wan: (512, 2, 2, 500, 5e-5, False)}
    for pipe, values in table.items():
        config = DTITrainer(pipe, preset="paper").config
        assert tuple(getattr(config, n) for n in names) == values
        assert config.effective_learning_rate == 0.04 and (config.beta, config.token_scale) == (0.0, "mean")


@pytest.mark.parametrize("name", NAMES)
def test_every_family_learns(name, request, photos, monkeypatch):
    """The loss falls if the samples stay the same."""
    pipe = request.getfixturevalue(name)
    batch = family_batch(pipe, prompts=["a photo of a <dog>", "a red <dog>"])
    monkeypatch.setattr(TrainingSamples, "batch", lambda self, first, size, device: batch)
    settings = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "train_batch_size": 2}
    trainer = DTITrainer(pipe, **settings, gradient_accumulation_steps=1, max_train_steps=60, learning_rate=0.005)
    trainer.fit(photos)
    losses = [x["loss"] for x in trainer.history]
    assert losses[-1] < losses[0] and min(losses) == min(losses[3:]) and trainer.history[-1]["angle"] > 2
