"""What is special about Wan."""

import pytest
import torch
from helpers import family_batch, family_loss
from tiny_pipelines import build_wan

from diffusers_dti import DTITrainer
from diffusers_dti.families import Batch, find_family


def build_ti2v(tmp):
    """Build Wan 2.2 TI2V-5B, small: a VAE of 16 x 16 behind patches of 2 x 2, and a time for each token."""
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

    parts = build_wan(tmp).components
    torch.manual_seed(7)
    mean, std = torch.randn(12).tolist(), (1 + torch.rand(12)).tolist()
    parts["vae"] = AutoencoderKLWan(
        base_dim=4, decoder_base_dim=8, z_dim=12, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=True, patch_size=2,
        temperal_downsample=[False, True, True], in_channels=12, out_channels=12, scale_factor_spatial=16, latents_mean=mean,
        latents_std=std,
    )  # fmt: skip
    parts["transformer"] = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=12, out_channels=12, text_dim=16, freq_dim=16, ffn_dim=32,
        num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    pipe = WanPipeline(**parts, expand_timesteps=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_wan22_ti2v_is_trained_as_its_own_pipeline(tmp_path, photos, monkeypatch):
    """Its sampler gives each token a time, here all the same one. Our prediction, with one time a sample, is what it gets."""
    pipe, seen = build_ti2v(tmp_path), {}
    family, step = find_family(pipe), type(pipe.scheduler).step
    assert family.resolution_step == 32

    def note(self, output, timestep, sample, **kwargs):
        seen.update(output=output, sigma=float(timestep) / 1000, sample=sample)
        return step(self, output, timestep, sample, **kwargs)

    size = {"height": 64, "width": 64, "num_frames": 1}
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(type(pipe.scheduler), "step", note)
        pipe("a dog on the beach", **size, guidance_scale=1.0, num_inference_steps=2, output_type="latent")
        batch = Batch(seen["sample"], seen["sample"], None, torch.zeros(1), [], [], [], (64, 64), [])
        patch.setattr(family, "noisy_latents", lambda batch: (batch.latents, torch.tensor([seen["sigma"]])))
        prediction = family.predict(batch, family.encode_prompts(["a dog on the beach"], [0]))
        torch.testing.assert_close(prediction, seen["output"], rtol=1e-4, atol=1e-5)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with monkeypatch.context() as patch, torch.no_grad():
        ((latents, _),) = family.encode_images(pixels)
        patch.setattr(type(pipe.scheduler), "step", lambda *args, **kwargs: (latents,))
        decoded = pipe("a dog", **size, guidance_scale=1.0, num_inference_steps=1, output_type="pt").frames[:, 0]
        expected = pipe.vae.decode(pipe.vae.encode(pixels[:, :, None]).latent_dist.mode()).sample[:, :, 0]
        torch.testing.assert_close(decoded, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-3)
    settings = {"resolution": 64, "train_batch_size": 2, "gradient_accumulation_steps": 1, "max_train_steps": 8}
    settings |= {"learning_rate": 0.1, "scale_lr": False, "heldout_loss_steps": 4}
    trainer = DTITrainer(pipe, placeholder_token="<dog>", initializer_token="dog", **settings)
    trainer.fit(photos)
    heldout = [entry["heldout_loss"] for entry in trainer.history if "heldout_loss" in entry]
    assert heldout[-1] < heldout[0]


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
