"""What all families inherit: images encoded in float32, prompts tokenized once a run, the weighted loss, and `upcast`."""

from dataclasses import replace

import pytest
import torch
from helpers import family_batch, family_loss
from tiny_modern import PIPELINES
from tiny_pipelines import fresh_copy, generate

from diffusers_dti import DTITrainer
from diffusers_dti.families import find_family
from diffusers_dti.families.base import Family, uncompiled_component, upcast
from diffusers_dti.pipeline.text_encoders import find_text_encoders


@pytest.mark.parametrize("name", ["sana", "wan"])
def test_latents_decode_as_the_pipeline_decodes_its_own(name, request):
    """An image that we encode and the pipeline's call decodes is the VAE's reconstruction of it."""
    pipe = request.getfixturevalue(name)
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    ((latents, std),) = find_family(pipe).encode_images(pixels)
    assert not std.any() and latents.shape == {"sana": (1, 4, 8, 8), "wan": (1, 16, 1, 4, 4)}[name]
    pipe.scheduler.set_begin_index = lambda *args: None
    pipe.scheduler.step = lambda noise, t, sample, **kwargs: (sample,)  # no denoising
    # SANA's own sampler starts from sigma 1, where nothing is scaled.
    image = generate(pipe, "a dog", latents=latents, height=32, width=32)
    with torch.no_grad():
        if name == "sana":
            decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent).sample
        else:
            decoded = pipe.vae.decode(pipe.vae.encode(pixels[:, :, None]).latent_dist.mode()).sample[:, :, 0]
    expected = (decoded / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)
    torch.testing.assert_close(image.reshape(32, 32, 3), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["sana", "wan22"])
def test_half_precision_and_gradient_checkpointing(name, request, photos, monkeypatch):
    """A bfloat16 pipeline's VAE encodes in float32, all denoisers use gradient checkpointing, and everything is as before."""
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


@pytest.mark.parametrize(("name", "encoders"), [("sdxl", 2), ("sd", 1), ("sana", 1), ("wan", 1)])
def test_a_run_tokenizes_a_prompt_once_and_the_next_run_anew(name, encoders, request, photos, concept, monkeypatch):
    """Between the runs a concept is loaded, which changes the tokens of their prompt."""
    pipe, tokenize = request.getfixturevalue(name), Family.token_ids
    tokenized, read, expected, encoder_pads = [], [], [], name in ("sdxl", "sd")

    def counting(self, tokenizer, *arguments):
        tokenized.append(arguments[0])
        return tokenize(self, tokenizer, *arguments)

    monkeypatch.setattr(Family, "token_ids", counting)
    pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: read.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    settings = {"initializer_token": "dog", "templates": ["<zog> and {}"], "resolution": 32, "train_batch_size": 2}
    settings |= {"max_train_steps": 3, "heldout_loss_steps": 0} | ({} if encoder_pads else {"zero_pad": False})
    trainer = DTITrainer(pipe, placeholder_token="<dog>", **settings)
    for run in (1, 2):
        trainer.fit(photos)
        assert tokenized == ["<zog> and <dog>"] * encoders * run
        expected.append(pipe.tokenizer("<zog> and <dog>", padding="max_length" if encoder_pads else False).input_ids)
        assert len(read) >= 3 and all(ids.tolist() == [expected[-1]] * 2 for ids in read)
        read.clear()
        if run == 1:
            pipe.load_directional_inversion(concept(pipe, "<zog>"))
    assert expected[0] != expected[1]


@pytest.mark.parametrize("name", PIPELINES)
def test_gradients_pass_checkpoints_in_half_precision(name, modern, monkeypatch):
    """The blocks are computed twice, and the rows of all encoders get the same gradient."""
    pipe = fresh_copy(modern(name)).to(torch.bfloat16)
    monkeypatch.setattr(type(find_family(pipe)), "text_length", 160)
    tables, calls, results = [e.weight for e in find_text_encoders(pipe).values()], [], []
    for blocks in pipe.transformer.children():
        if isinstance(blocks, torch.nn.ModuleList):
            for block in blocks:
                block.register_forward_pre_hook(lambda *args: calls.append(checkpointing))
    for checkpointing in (False, True):
        if checkpointing:
            pipe.transformer.enable_gradient_checkpointing()
        results.append(torch.autograd.grad(family_loss(pipe, family_batch(pipe)), tables))
    assert calls.count(True) > calls.count(False) > 0
    for one, other in zip(*results):
        assert one.isfinite().all() and one.any()
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sdxl", "sd", "sana", "sprint", "wan", "wan22"])
def test_masks_weight_the_loss(name, request):
    pipe = request.getfixturevalue(name)
    batch = family_batch(pipe)
    height, width = batch.latents.shape[-2:]
    ones = torch.ones(2, 1, height, width)
    assert family_loss(pipe, batch).item() == pytest.approx(family_loss(pipe, replace(batch, weights=ones)).item(), rel=1e-6)
    half = torch.zeros(2, 1, height, width)
    half[..., : width // 2] = 2
    other = replace(batch, weights=half)
    assert family_loss(pipe, other).item() != pytest.approx(family_loss(pipe, batch).item(), rel=1e-3)


def test_upcast_restores_the_same_bits(sdxl):
    sdxl.vae.to(torch.bfloat16)
    sdxl.vae.post_quant_conv.to(torch.float16)  # mixed, as diffusers' own upcasting leaves it
    sdxl.vae.register_buffer("shift", torch.ones(3, dtype=torch.bfloat16))  # `to` replaces buffers, not their data
    before = {k: v.clone() for k, v in sdxl.vae.state_dict().items()}
    with upcast(sdxl.vae):
        assert {p.dtype for p in sdxl.vae.parameters()} == {torch.float32}
    after = sdxl.vae.state_dict()
    assert all(after[k].dtype == v.dtype and torch.equal(after[k], v) for k, v in before.items())


def test_components_are_found_behind_the_compiler(sd):
    plain = sd.unet
    sd.unet = torch.compile(plain)
    assert sd.unet is not plain and uncompiled_component(sd, "unet") is plain
    assert uncompiled_component(sd, "vae") is sd.vae and uncompiled_component(sd, "transformer") is None
