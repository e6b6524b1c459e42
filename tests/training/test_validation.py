import functools

import pytest
import torch
from PIL import Image
from tiny_pipelines import fresh_copy, generate

from diffusers_dti import DTITrainer
from diffusers_dti.families import find_family
from diffusers_dti.training import validation
from diffusers_dti.training.loop import logger

SETTINGS = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 16, "train_batch_size": 2}


def test_validation_images_change_nothing(sdxl, photos, tmp_path):
    plain = DTITrainer(sdxl, **SETTINGS, max_train_steps=5).fit(photos)
    sdxl.unload_directional_inversion()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    prompts = ["a {} on the beach", "a red {}"]
    watched = DTITrainer(
        sdxl, **SETTINGS, max_train_steps=5, validation_prompt=prompts, validation_steps=2, output_dir=tmp_path
    )
    learned = watched.fit(photos)
    assert torch.equal(torch.get_rng_state(), state)
    for component, v in plain.directions.items():
        assert torch.equal(learned.directions[component], v)
    assert {k: len(v) for k, v in watched.validation_images.items()} == {2: 2, 4: 2, 5: 2}
    strip = Image.open(tmp_path / "validation.png")
    assert watched.validation_images[2][0].size == (16, 16)
    assert strip.width == 3 * 100 and strip.height == 2 * 100 + 23  # enlarged, under a line of steps
    assert strip.getpixel((100 + 3, 23 + 3)) == watched.validation_images[4][0].getpixel((0, 0))
    # the last images are what the finished pipeline generates
    again = validation.generate(watched.family, ["a <dog> on the beach"], 16, watched.config.seed)[0]
    difference = torch.tensor(list(again.tobytes())).sub(torch.tensor(list(watched.validation_images[5][0].tobytes()))).abs()
    assert difference.max() <= 1
    assert watched.validation_images[2][0].tobytes() != watched.validation_images[5][0].tobytes()


def test_under_model_offload(sdxl, photos):
    """A pipeline's call ends by switching model offload on again, which must not happen in mid-training."""
    sdxl.enable_model_cpu_offload(device="cpu")
    timesteps = sdxl.scheduler.timesteps.clone()
    hooked = []
    trainer = DTITrainer(sdxl, **SETTINGS, max_train_steps=4, validation_prompt="a {}", validation_steps=2)
    trainer.fit(photos, callback_on_step_end=lambda t, step: hooked.append(hasattr(t.pipe.unet, "_hf_hook")))
    assert hooked == [False] * 4 and hasattr(sdxl.unet, "_hf_hook")
    assert torch.equal(sdxl.scheduler.timesteps, timesteps)


def test_the_progress_bar_comes_back(sd):
    sd.set_progress_bar_config(leave=False)
    validation.generate(find_family(sd), ["a dog"], 16, 0)
    assert sd._progress_bar_config == {"leave": False}
    assert generate(sd, "a dog").isfinite().all()


def test_curves(tmp_path, monkeypatch):
    history = [{"step": 10 * i, "loss": 1 / i, "angle": 5.0 * i, "norm": 0.4} for i in range(1, 5)]
    validation.plot(history, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 500
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"diffusers-dti\[plot\]"):
        validation.plot(history, tmp_path / "curves.png")


@pytest.mark.parametrize("name", ["sana", "sprint", "wan", "wan22"])
def test_every_family_generates_at_the_training_resolution(name, request, photos):
    pipe = request.getfixturevalue(name)
    scheduler = pipe.scheduler.timesteps.clone()
    trainer = DTITrainer(pipe, **SETTINGS | {"resolution": 32}, max_train_steps=2, validation_prompt="a {} on the beach")
    trainer.fit(photos)
    (picture,) = trainer.validation_images[2]
    assert picture.size == (32, 32) and torch.equal(pipe.scheduler.timesteps, scheduler)
    with torch.no_grad():
        other = trainer.family.generate("a dog on the beach", 32, torch.Generator().manual_seed(trainer.config.seed))
    assert other.tobytes() != picture.tobytes()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_stays(sana, photos, side):
    """SANA's call sets it to the right."""
    sana.tokenizer.padding_side = side
    DTITrainer(sana, **SETTINGS | {"resolution": 32}, max_train_steps=1, validation_prompt="a {}").fit(photos)
    assert sana.tokenizer.padding_side == side


def test_pipelines_that_need_more_than_a_prompt_are_refused_at_once(sdxl, wan):
    import diffusers

    for pipe, base in ((diffusers.StableDiffusionXLImg2ImgPipeline, sdxl), (diffusers.WanVideoToVideoPipeline, wan)):
        parts = {k: v for k, v in base.components.items() if k != "transformer_2"}
        other = pipe(**parts)
        DTITrainer(other, **SETTINGS)
        with pytest.raises(ValueError, match=f"{pipe.__name__} generates from more than a prompt .*leave out"):
            DTITrainer(other, **SETTINGS, validation_prompt="a {}")


def test_a_prompt_without_the_concept_is_a_warning(sdxl, photos, caplog):
    """Its images show nothing of what is learned. A prompt may have the placeholder itself."""
    prompts = ["a {} here", "a <dog> there", "a dog on a beach"]
    logger.addHandler(caplog.handler)
    try:
        trainer = DTITrainer(sdxl, **SETTINGS, max_train_steps=1, validation_prompt=prompts)
        trainer.fit(photos)
    finally:
        logger.removeHandler(caplog.handler)
    (said,) = {message for message in caplog.messages if "validation_prompt" in message}
    assert (
        said == "The validation_prompt 'a dog on a beach' has neither \"{}\" nor <dog>: its images will not show the concept."
    )
    assert len(trainer.validation_images[1]) == 3


def test_a_pipeline_whose_images_are_optional_generates_from_a_prompt(modern, photos, monkeypatch):
    from diffusers import FluxKontextPipeline

    pipe, call = FluxKontextPipeline(**fresh_copy(modern("flux")).components), FluxKontextPipeline.__call__
    pipe.set_progress_bar_config(disable=True)
    quick = {"num_inference_steps": 1, "max_area": 32 * 32}
    generate = functools.wraps(call)(lambda *args, **kwargs: call(*args, **kwargs | quick))
    monkeypatch.setattr(FluxKontextPipeline, "__call__", generate)
    settings = SETTINGS | {"resolution": 32, "max_train_steps": 1, "validation_prompt": "a {}", "validation_steps": 1}
    trainer = DTITrainer(pipe, **settings)
    trainer.fit(photos)
    assert trainer.validation_images[1][0].size == (32, 32)
