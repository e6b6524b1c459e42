"""Pretrain the SDXL world on one core: `python pretrain_sdxl.py vae|text|unet|export --work DIR`, in that order.

Every stage writes checkpoints into DIR and resumes from the newest one. You can run `text` and `vae` at the same time.
"""

import json
import math
import random
import shutil
from pathlib import Path

import pretraining
import scenes
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from pretraining import LATENT_STD
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PIXELS = 32
TEXT_LENGTH = 32


# --------------------------------------------------------------------------------------------------------- the models
def build_vae() -> AutoencoderKL:
    """Build the VAE."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=8, sample_size=PIXELS, block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1,
        norm_num_groups=1, mid_block_add_attention=False, force_upcast=False,
    )  # fmt: skip


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Build a tokenizer in CLIP's layout: bytes, bytes with </w>, merges, start, end. Every word of the world is one token."""
    # Written once for all stages, because the tokenizer's trainer breaks ties at random.
    if not (folder / "vocab.json").exists():
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        # Train until nothing is left to merge. Then each word is one piece.
        bpe.train_from_iterator(
            pretraining.world_words(), trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False)
        )
        merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
        vocab: dict[str, int] = {}
        for piece in ["!", *alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)]:
            vocab.setdefault(piece, len(vocab))
        vocab["<|startoftext|>"] = len(vocab)
        vocab["<|endoftext|>"] = len(vocab)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT_LENGTH)


def build_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Build two small CLIP encoders with a row for each token."""

    def config(width: int, act: str) -> CLIPTextConfig:
        # eos_token_id is 2, as in the real SDXL: transformers then pools at the highest id.
        return CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_attention_heads=4,
            num_hidden_layers=3, max_position_embeddings=TEXT_LENGTH, hidden_act=act, projection_dim=width,
            bos_token_id=0, eos_token_id=2, pad_token_id=1,
        )  # fmt: skip

    return CLIPTextModel(config(96, "quick_gelu")), CLIPTextModelWithProjection(config(128, "gelu"))


def build_unet() -> UNet2DConditionModel:
    """Build the denoiser."""
    return UNet2DConditionModel(
        sample_size=PIXELS // 4, in_channels=8, out_channels=8, block_out_channels=(64, 96), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(4, 4), transformer_layers_per_block=(1, 1), use_linear_projection=True, norm_num_groups=4,
        cross_attention_dim=96 + 128, addition_embed_type="text_time", addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + 128,
    )  # fmt: skip


def build_scheduler() -> DDIMScheduler:
    """Build the pipeline's scheduler."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the stages
def train_vae(work: Path, steps: int = 3500) -> None:
    """Train the VAE."""
    torch.manual_seed(0)
    vae = build_vae().to(memory_format=torch.channels_last)
    pretraining.train_vae(work, vae, lambda x: vae.encode(x).latent_dist.mean, lambda z: vae.decode(z).sample, PIXELS, steps)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Return the ids, padded to the full length."""
    return tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt").input_ids


def train_text(work: Path, steps: int = 2000) -> None:
    """Train the text encoders."""
    torch.manual_seed(1)
    tokenizer = build_tokenizer(work / "tokenizer")
    encoders = build_text_encoders(tokenizer)
    norms = [mean + std * torch.randn(len(tokenizer), 1) for mean, std in ((0.39, 0.02), (0.45, 0.02))]

    def read(captions: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        ids = tokenize(tokenizer, captions)
        one, two = (e(ids, output_hidden_states=True) for e in encoders)
        return [(one.hidden_states[-2], one.pooler_output), (two.hidden_states[-2], two[0])]

    pretraining.train_text(work, dict(zip(("text_encoder", "text_encoder_2"), encoders)), norms, read, steps)


@torch.no_grad()
def encode(encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states and the pooled vector that SDXL's denoiser takes."""
    out_1, out_2 = (e(ids, output_hidden_states=True) for e in encoders)
    return torch.cat([out_1.hidden_states[-2], out_2.hidden_states[-2]], -1), out_2[0]


def load_frozen(work: Path) -> tuple[CLIPTokenizer, tuple[CLIPTextModel, CLIPTextModelWithProjection], AutoencoderKL]:
    """Open the trained models for the denoiser's training, and set the VAE's latent scaling."""
    tokenizer = build_tokenizer(work / "tokenizer")
    encoders = build_text_encoders(tokenizer)
    saved = torch.load(work / "text.pt", weights_only=True)
    encoders[0].load_state_dict(saved["text_encoder"])
    encoders[1].load_state_dict(saved["text_encoder_2"])
    vae = build_vae()
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["vae"])
    with torch.no_grad():  # the decoder was trained with this spread of the posterior
        half = vae.quant_conv.weight.shape[0] // 2
        vae.quant_conv.weight[half:].zero_()
        vae.quant_conv.bias[half:].fill_(2 * math.log(LATENT_STD))
    for model in (vae, *encoders):
        model.eval().requires_grad_(False)
    z = vae.encode(pretraining.batch_of(random.Random(5), 256, PIXELS)).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4))
    return tokenizer, encoders, vae


def train_unet(work: Path, steps: int = 7000, batch: int = 64) -> None:
    """Train the denoiser on the frozen encoders and VAE."""
    torch.manual_seed(2)
    tokenizer, encoders, vae = load_frozen(work)
    unet = build_unet().to(memory_format=torch.channels_last)
    alphas = build_scheduler().alphas_cumprod
    latents = pretraining.Latents(lambda x: vae.encode(x).latent_dist.mean, PIXELS)

    def loss_of(chosen: list[scenes.Scene], captions: list[str], rng: random.Random, progress: float) -> torch.Tensor:
        context, pooled = encode(encoders, tokenize(tokenizer, captions))
        n = len(chosen)
        empty = torch.rand(n) < 0.1  # as with SDXL's force_zeros_for_empty_prompt
        context[empty], pooled[empty] = 0, 0
        z = latents(chosen)
        z = (z + LATENT_STD * torch.randn_like(z)) * vae.config.scaling_factor
        t = (1000 * (1 - torch.rand(n) ** 1.7)).long().clamp(0, 999)
        a, s = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        noise = torch.randn_like(z)
        sizes = torch.tensor([rng.choice((32, 32, 64, 128, 256, 512)) for _ in range(n)])[:, None].expand(-1, 2)
        crops = torch.tensor([[rng.choice((0, 0, 0, rng.randrange(16))) for _ in "yx"] for _ in range(n)])
        added = {"text_embeds": pooled, "time_ids": torch.cat([sizes, crops, torch.full((n, 2), PIXELS)], 1).float()}
        noisy = (a * z + s * noise).to(memory_format=torch.channels_last)
        return F.mse_loss(unet(noisy, t, context, added_cond_kwargs=added).sample, a * noise - s * z)

    pretraining.train_denoiser(work, "unet", unet, loss_of, steps, batch)


def assemble(work: Path) -> StableDiffusionXLPipeline:
    """Build the pipeline of the trained models."""
    tokenizer, encoders, vae = load_frozen(work)
    unet = build_unet()
    unet.load_state_dict(pretraining.averaged(work, "unet"))
    return StableDiffusionXLPipeline(
        vae=vae, text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=tokenizer,
        tokenizer_2=build_tokenizer(work / "tokenizer"), unet=unet.eval(), scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip


def export(work: Path, folder: Path) -> None:
    """Write the pipeline's folder so that both transformers 4 and 5 can read it."""
    assemble(work).to(torch.float16).save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):  # transformers 5 does not write the files that the slow tokenizers of 4 read
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(work / "tokenizer" / file, folder / name)
    # transformers 5 drops the prefix of the tensors' names. Both versions can read names with the prefix.
    encoder = folder / "text_encoder" / "model.safetensors"
    tensors = {"text_model." + k.removeprefix("text_model."): v for k, v in load_file(encoder).items()}
    save_file(tensors, encoder, metadata={"format": "pt"})


if __name__ == "__main__":
    stages = {"vae": train_vae, "text": train_text, "unet": train_unet}
    pretraining.main(__doc__, Path(__file__).parent / "sdxl", stages, export)
