"""The video autoencoder of the Wan world: its model and its training stages, for pretrain_wan.py."""

import random
from pathlib import Path
from types import MethodType

import pretraining
import scenes
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from pretraining import LATENT_STD
from stage import Stage

PIXELS = 64
LATENTS = 16


def build_vae() -> AutoencoderKLWan:
    """Build Wan 2.2's kind (patches of 2, residual), with Wan 2.1's compression: 8 in space, 4 in time."""
    return AutoencoderKLWan(
        base_dim=16, decoder_base_dim=24, z_dim=LATENTS, dim_mult=[1, 2, 2], num_res_blocks=1, attn_scales=[],
        temperal_downsample=[True, True], is_residual=True, patch_size=2, in_channels=12, out_channels=12,
        latents_mean=[0.0] * LATENTS, latents_std=[1.0] * LATENTS, scale_factor_temporal=4, scale_factor_spatial=8,
    )  # fmt: skip


def quicken(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Make the VAE faster on single frames, with the same results.

    In a causal convolution over one frame without earlier frames, two of three taps see only zeros. They are skipped.
    """

    def forward(self: WanCausalConv3d, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        if x.shape[2] > 1 or cache_x is not None:
            return WanCausalConv3d.forward(self, x, cache_x)
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=self._padding[0])[:, :, None]

    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            module.forward = MethodType(forward, module)
    return vae


def clips_of(rng: random.Random, size: int, frames: int) -> torch.Tensor:
    """Render new clips of random scenes, (size, 3, frames, 64, 64) in [-1, 1]."""
    return torch.stack([scenes.clip(scenes.random_scene(rng), PIXELS, frames) for _ in range(size)]) * 2 - 1


def train_vae(work: Path, steps: int = 4000) -> None:
    """Train the VAE on single frames and clips, and then on motion."""
    torch.manual_seed(0)
    vae = quicken(build_vae())

    def make_batch(rng: random.Random, step: int) -> torch.Tensor:
        return clips_of(rng, 2, 9) if step % 5 == 4 else clips_of(rng, 16, 1)

    def decode(z: torch.Tensor) -> torch.Tensor:
        # Add noise in proportion to the latents too: their spread grows to many times LATENT_STD.
        return vae.decode(z + LATENT_STD * z.std().detach() * torch.randn_like(z)).sample

    pretraining.train_vae(work, vae, lambda x: vae.encode(x).latent_dist.mean, decode, PIXELS, steps, make_batch)
    train_motion(work, max(steps // 5, 2))


def train_motion(work: Path, steps: int) -> None:
    """Train on clips only, and only the weights that see earlier frames.

    The results for single frames stay exactly the same.
    """
    torch.manual_seed(4)
    vae = quicken(build_vae()).requires_grad_(False)
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["vae"])
    for name, module in vae.named_modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] > 1:
            if name.endswith("time_conv"):  # the first frame skips it
                module.requires_grad_(True)
            else:
                module.weight.requires_grad_(True).register_hook(lambda g: F.pad(g[:, :, :-1], (0, 0, 0, 0, 0, 1)))
    # No weight decay: it would change the frozen taps too.
    optimizer = torch.optim.AdamW([p for p in vae.parameters() if p.requires_grad], lr=2e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    stage = Stage(work, "motion", {"vae": vae, "optimizer": optimizer, "schedule": schedule})
    rng = random.Random(stage.step + 1)
    while stage.step < steps:
        x = clips_of(rng, 2, 9)
        z = vae.encode(x).latent_dist.mean
        y = vae.decode(z + LATENT_STD * z.std().detach() * torch.randn_like(z)).sample
        l1 = F.l1_loss(y, x)
        (l1 + F.mse_loss(y, x) + 1e-3 * z.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        stage.tick(100, steps, l1=round(l1.item(), 4), std=round(z.std().item(), 3))
