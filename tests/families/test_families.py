"""Each family against the conditioning and prediction of its own pipeline."""

from dataclasses import replace

import pytest
import torch
from tiny_pipelines import generate

from diffusers_dti import DTITrainer
from diffusers_dti.families import find_family
from diffusers_dti.families.sana import Sana
from diffusers_dti.families.stable_diffusion import StableDiffusion, StableDiffusionXL
from diffusers_dti.families.wan import Wan
from diffusers_dti.training.samples import Batch, TrainingSamples

NAMES = ["sdxl", "sd", "sana", "sprint", "wan", "wan22"]
PROMPTS = ["a dog on the beach", "a cat"]
UNTIDY = [" A Dog on  the beach &amp; a tower ", "a cat"]  # each pipeline has its own way with these


def test_pipelines_find_their_families(request, sdxl, sd, wan):
    classes = {"sdxl": StableDiffusionXL, "sd": StableDiffusion, "sana": Sana, "sprint": Sana, "wan": Wan, "wan22": Wan}
    for name, family in classes.items():
        pipe = request.getfixturevalue(name)
        assert type(find_family(pipe)) is family and find_family(pipe).pipe is pipe
    sdxl.text_encoder = None  # the refiner
    listed = "SDXL, Stable Diffusion 1.5 and 2.x, SANA, Wan"
    with pytest.raises(ValueError, match=f"supports {listed}, with all their components; StableDiffusionXLPipeline is not one"):
        find_family(sdxl)
    sd.unet.register_to_config(in_channels=9)  # inpainting
    with pytest.raises(ValueError, match="StableDiffusionPipeline is not one"):
        DTITrainer(sd)
    wan.transformer.register_to_config(in_channels=36)  # image to video
    with pytest.raises(ValueError, match="WanPipeline is not one"):
        DTITrainer(wan)


def test_compiled_unets_are_trained_and_those_of_videos_refused(sd):
    plain = sd.unet
    sd.unet = torch.compile(plain)
    assert find_family(sd).name == "Stable Diffusion 1.5 and 2.x"
    sd.unet = torch.nn.Module()  # another class with the same settings, as AnimateDiff's
    sd.unet.config = plain.config
    with pytest.raises(ValueError, match="StableDiffusionPipeline is not one"):
        find_family(sd)


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


@pytest.mark.parametrize("name", ["sdxl", "sd"])
def test_latents_are_the_pipelines_own(name, request):
    pipe = request.getfixturevalue(name)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    encoded = find_family(pipe).encode_images(pixels)
    posterior = pipe.vae.encode(pixels).latent_dist
    for i, (mean, std) in enumerate(encoded):
        torch.testing.assert_close(mean[0], posterior.mean[i] * 0.13, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(std[0], posterior.std[i] * 0.13, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sana", "wan"])
def test_latents_decode_as_the_pipeline_decodes_its_own(name, request):
    """A picture encoded by us, decoded by the pipeline's call, is the VAE's reconstruction of it."""
    pipe = request.getfixturevalue(name)
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    ((latents, std),) = find_family(pipe).encode_images(pixels)
    assert not std.any() and latents.shape == {"sana": (1, 4, 8, 8), "wan": (1, 16, 1, 4, 4)}[name]
    pipe.scheduler.set_begin_index = lambda *args: None
    pipe.scheduler.step = lambda noise, t, sample, **kwargs: (sample,)  # nothing is denoised
    # SANA's own sampler starts from sigma 1, where nothing is scaled
    drawn = generate(pipe, "a dog", latents=latents, height=32, width=32)
    with torch.no_grad():
        if name == "sana":
            decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent).sample
        else:
            decoded = pipe.vae.decode(pipe.vae.encode(pixels[:, :, None]).latent_dist.mode()).sample[:, :, 0]
    expected = (decoded / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)
    torch.testing.assert_close(drawn.reshape(32, 32, 3), expected, rtol=1e-3, atol=1e-3)


def _batch(pipe, size=2, **changes):
    generator = torch.Generator().manual_seed(4)
    shape = (size, 16, 1, 4, 4) if "Wan" in type(pipe).__name__ else (size, 4, 8, 8)
    latents, noise = torch.randn(2, *shape, generator=generator)
    timesteps = torch.tensor([100, 900, 400, 0])[:size]
    plain = Batch(latents, noise, None, timesteps, PROMPTS[:1] * size, [(16, 16)] * size, [(0, 0)] * size, (32, 32), [0] * size)
    return replace(plain, **changes)


def _loss(pipe, batch):
    family = find_family(pipe)
    conditioning = family.encode_prompts(batch.prompts, batch.zero_pads)
    return family.loss(batch, conditioning)


@pytest.mark.parametrize("name", ["sana", "wan"])
def test_the_flow_matching_loss_is_the_written_one(name, request):
    """sigma in (0, 1] without any shift, target noise - latents, time sigma · 1000 (paper, section 3; traps 16)."""
    pipe = request.getfixturevalue(name)
    batch, seen = _batch(pipe), {}
    model, scale = pipe.transformer, {"sana": 0.5, "wan": 1.0}[name]
    if name == "sana":
        model.register_to_config(timestep_scale=scale)

    def velocity(module, args, kwargs):
        seen.update(zip(("hidden_states", "timestep", "encoder_hidden_states"), args))
        seen.update(kwargs)

    with model.register_forward_pre_hook(velocity, with_kwargs=True), torch.no_grad():
        loss = _loss(pipe, batch)
        # place 0 is pure noise, place 999 the last step before none
        sigma = (1000 - batch.timesteps.double()) / 1000
        at = sigma.view(-1, *[1] * (batch.latents.ndim - 1))
        noisy = (1 - at) * batch.latents + at * batch.noise
        torch.testing.assert_close(seen["hidden_states"].double(), noisy, rtol=0, atol=1e-6)
        torch.testing.assert_close(seen["timestep"].double(), sigma * 1000 * scale, rtol=1e-6, atol=0)
        prediction = model(**seen).sample
    expected = (prediction.double() - (batch.noise - batch.latents)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_schedulers_flow_shift_plays_no_part_and_its_kind_does(sana, wan):
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


def test_sprint_is_called_as_its_pipeline_calls_it(sprint):
    """The same noise level, guidance and latents as the pipeline's, which come to it by way of TrigFlow."""
    seen = []

    def note(module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"], kwargs["timestep"], kwargs["guidance"]))

    batch = _batch(sprint, 1, timesteps=torch.tensor([300]))  # sigma .7
    angle = torch.atan(torch.tensor(0.7 / 0.3))
    trig = (angle.cos() * batch.latents + angle.sin() * batch.noise) / angle.cos().square().add(angle.sin().square()).sqrt()
    with sprint.transformer.register_forward_pre_hook(note, with_kwargs=True), torch.no_grad():
        _loss(sprint, batch)
        timesteps = {"num_inference_steps": 1, "max_timesteps": angle.item(), "intermediate_timesteps": None}
        settings = {"height": 32, "width": 32, "use_resolution_binning": False, "complex_human_instruction": None}
        sprint("a dog on the beach", latents=trig, output_type="latent", **timesteps, **settings)
    (ours, time, guidance), (its, its_time, its_guidance) = seen
    torch.testing.assert_close(ours, its, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(time, its_time, rtol=1e-5, atol=0)
    torch.testing.assert_close(guidance, its_guidance)


def test_each_of_wans_two_transformers_takes_its_side_of_the_boundary(wan22):
    batch = _batch(wan22, 4, timesteps=torch.tensor([124, 125, 126, 999]))  # sigma .876, .875, .874, .001
    calls = {}
    for name in ("transformer", "transformer_2"):
        model = getattr(wan22, name)
        model.register_forward_pre_hook(lambda m, args, name=name: calls.update({name: args[1].tolist()}))
    parts = _loss(wan22, batch)
    assert calls == {"transformer": pytest.approx([876, 875]), "transformer_2": pytest.approx([874, 1])}
    singles = []
    for model, chosen in ((wan22.transformer, slice(0, 2)), (wan22.transformer_2, slice(2, 4))):
        one = _batch(wan22, 2, **{k: getattr(batch, k)[chosen] for k in ("latents", "noise", "timesteps")})
        alone = type(wan22)(**wan22.components | {"transformer": model, "transformer_2": None})
        singles.append(_loss(alone, one))
    assert parts.item() == pytest.approx(torch.stack(singles).mean().item(), rel=1e-5)
    wan22.transformer_2 = None
    with pytest.raises(ValueError, match=r"boundary_ratio 0.875\) has no transformer_2"):
        DTITrainer(wan22)


def test_the_defaults_are_the_authors(sdxl, sana, wan):
    """Their launchers' (SDXL, SANA 1.5, Wan 2.1)."""
    names = ("resolution", "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "kappa", "zero_pad")
    table = {sdxl: (768, 4, 1, 400, 1e-4, None), sana: (1024, 2, 2, 500, 5e-5, True), wan: (512, 2, 2, 500, 5e-5, False)}
    for pipe, values in table.items():
        config = DTITrainer(pipe).config
        assert tuple(getattr(config, n) for n in names) == values
        assert config.effective_learning_rate == 0.04 and (config.beta, config.token_scale) == (0.0, "mean")


@pytest.mark.parametrize("name", ["sana", "wan22"])
def test_half_precision_and_gradient_checkpointing(name, request, photos, monkeypatch):
    """A bfloat16 pipeline's VAE encodes in float32, all denoisers are gradient_checkpointing, and everything is as before."""
    pipe = request.getfixturevalue(name).to(torch.bfloat16)
    family, seen = find_family(pipe), {}
    models = [pipe.components[n] for n in family.denoisers if pipe.components.get(n) is not None]
    encode = pipe.vae.encode

    def encoding(pixels):
        seen["vae"] = {p.dtype for p in pipe.vae.parameters()} | {pixels.dtype}
        return encode(pixels)

    monkeypatch.setattr(pipe.vae, "encode", encoding)
    settings = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "max_train_steps": 4}
    results = []
    for checkpointing in (False, True):
        trainer = DTITrainer(pipe, **settings, gradient_checkpointing=checkpointing)

        def note(trainer, step):
            seen["gradient_checkpointing"] = [m.is_gradient_checkpointing for m in models]

        learned = trainer.fit(photos, callback_on_step_end=note)
        assert seen == {"vae": {torch.float32}, "gradient_checkpointing": [checkpointing] * len(models)}
        assert not any(m.is_gradient_checkpointing for m in models)
        assert {p.dtype for p in pipe.vae.parameters()} == {torch.bfloat16}
        assert learned.directions["text_encoder"].dtype == torch.float32
        results.append(learned.directions["text_encoder"])
        pipe.unload_directional_inversion()
    torch.testing.assert_close(*results, rtol=0, atol=1e-3)


def test_dropout_stays_off(wan, photos):
    """T6: UMT5 has one of .1, which the authors' training switches on."""
    settings = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "max_train_steps": 3}
    plain = DTITrainer(wan, **settings).fit(photos)
    wan.unload_directional_inversion()
    wan.text_encoder.train()
    assert wan.text_encoder.config.dropout_rate == 0.1
    again = DTITrainer(wan, **settings).fit(photos)
    assert wan.text_encoder.training and torch.equal(again.directions["text_encoder"], plain.directions["text_encoder"])


@pytest.mark.parametrize("name", NAMES)
def test_masks_weigh_the_loss(name, request):
    pipe = request.getfixturevalue(name)
    batch = _batch(pipe)
    height, width = batch.latents.shape[-2:]
    ones = torch.ones(2, 1, height, width)
    assert _loss(pipe, batch).item() == pytest.approx(_loss(pipe, replace(batch, weights=ones)).item(), rel=1e-6)
    half = torch.zeros(2, 1, height, width)
    half[..., : width // 2] = 2
    other = replace(batch, weights=half)
    assert _loss(pipe, other).item() != pytest.approx(_loss(pipe, batch).item(), rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_learns(name, request, photos, monkeypatch):
    """On samples that stay the same the loss falls."""
    pipe = request.getfixturevalue(name)
    batch = _batch(pipe, prompts=["a photo of a <dog>", "a red <dog>"])
    monkeypatch.setattr(TrainingSamples, "batch", lambda self, first, size, device: batch)
    settings = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 32, "train_batch_size": 2}
    trainer = DTITrainer(pipe, **settings, gradient_accumulation_steps=1, max_train_steps=60, learning_rate=0.005)
    trainer.fit(photos)
    losses = [x["loss"] for x in trainer.history]
    assert losses[-1] < losses[0] and min(losses) == min(losses[3:]) and trainer.history[-1]["angle"] > 2


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
    made = find_family(sdxl).scheduler
    assert torch.equal(made.alphas_cumprod, sdxl.scheduler.alphas_cumprod)
    assert made.config.prediction_type == settings.get("prediction_type", "epsilon")
