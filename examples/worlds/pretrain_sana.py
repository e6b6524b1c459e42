"""Pretrain the SANA world on one core: `python pretrain_sana.py vae|text|transformer|export --work DIR`, in that order.

Every stage writes checkpoints into DIR and resumes from the newest one. You can run `text` and `vae` at the same time.
"""

import json
import random
import shutil
from pathlib import Path

import pretraining
import scenes
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from gates import WORLDS
from pretraining import LATENT_STD
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizerFast

PIXELS = 32
WIDTH = 128  # the text encoder's width
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
# Gemma's further added tokens are not special, so decoding keeps them.
ADDED = ("<mask>", *(f"<unused{i}>" for i in range(8)), "<start_of_turn>", "<end_of_turn>", "\n")


# --------------------------------------------------------------------------------------------------------- the models
def build_vae() -> AutoencoderDC:
    """Build a deep compression autoencoder."""
    return AutoencoderDC(
        latent_channels=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(32, 64, 64), decoder_block_out_channels=(32, 64, 64),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 2, 2),
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
        downsample_block_type="conv", upsample_block_type="interpolate",
    )  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer in Gemma's layout: specials, added tokens, fallback bytes, pieces with and without "▁", merges."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = pretraining.world_words()
    # Train until nothing is left to merge. Then each word is one piece, at the start of the text and after a space.
    bpe.train_from_iterator(
        [*words, *("▁" + w for w in words), '"'], trainers.BpeTrainer(vocab_size=20_000, show_progress=False)
    )
    trained = json.loads(bpe.to_str())["model"]
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    learned = sorted(trained["vocab"], key=trained["vocab"].get)
    vocab: dict[str, int] = {}
    for piece in [*SPECIAL, *ADDED, *fallback, *learned]:
        vocab.setdefault(piece, len(vocab))
    merges = [tuple(m) for m in trained["merges"]]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    made.add_tokens([AddedToken(t, normalized=False) for t in ADDED])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    added = {}
    for token in SPECIAL + ADDED:
        plain = {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        added[str(vocab[token])] = plain | {"special": token in SPECIAL}
    config = {
        "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": added, "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False, "eos_token": "<eos>", "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<pad>", "padding_side": "left", "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer", "unk_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def build_tokenizer(folder: Path) -> GemmaTokenizerFast:
    """Open the tokenizer, and write it first if it does not exist."""
    # Written once for all stages, because the tokenizer's trainer breaks ties at random.
    if not (folder / "tokenizer_config.json").exists():
        write_tokenizer(folder)
    tokenizer = GemmaTokenizerFast.from_pretrained(folder)
    tokenizer.padding_side = "right"  # as the pipeline sets it
    return tokenizer


def build_text_encoder(tokenizer: GemmaTokenizerFast) -> Gemma2Model:
    """Build a small Gemma 2 with a row for each token."""
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32,
            pad_token_id=0, eos_token_id=1, bos_token_id=2, initializer_range=WIDTH**-0.5,
        )
    )  # fmt: skip
    # The row of padding would be zero, but the norms are statistics of all rows.
    torch.nn.init.normal_(encoder.embed_tokens.weight.data[0])
    return encoder


def build_transformer() -> SanaTransformer2DModel:
    """Build the denoiser."""
    return SanaTransformer2DModel(
        in_channels=8, out_channels=8, sample_size=PIXELS // 4, patch_size=1, num_layers=6, num_attention_heads=4,
        attention_head_dim=32, num_cross_attention_heads=4, cross_attention_head_dim=32, cross_attention_dim=128,
        caption_channels=WIDTH, interpolation_scale=1,
    )  # fmt: skip


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Build the pipeline's scheduler."""
    return DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)


# --------------------------------------------------------------------------------------------------------- the stages
def train_vae(work: Path, steps: int = 1500) -> None:
    """Train the VAE."""
    torch.manual_seed(0)
    vae = build_vae().to(memory_format=torch.channels_last)
    pretraining.train_vae(work, vae, lambda x: vae.encode(x).latent, lambda z: vae.decode(z).sample, PIXELS, steps)


def encode(tokenizer: GemmaTokenizerFast, encoder: Gemma2Model, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last states and the mask, padded to the longest caption. The pipeline masks any further padding."""
    inputs = tokenizer(captions, padding=True, return_tensors="pt")
    return encoder(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state, inputs.attention_mask


def train_text(work: Path, steps: int = 1500) -> None:
    """Train the text encoder."""
    torch.manual_seed(1)
    tokenizer = build_tokenizer(work / "tokenizer")
    encoder = build_text_encoder(tokenizer)
    # Gemma's norms before the factor √d: mean 1.77, none below 1.06
    norms = 1.06 + 0.71 * torch.exp(0.2 * torch.randn(len(tokenizer), 1) - 0.02)

    def read(captions: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        states, mask = encode(tokenizer, encoder, captions)
        return [(states * mask[..., None], states[torch.arange(len(states)), mask.sum(1) - 1])]

    pretraining.train_text(work, {"text_encoder": encoder}, [norms], read, steps, WORLDS["sana"].quoted)


def load_frozen(work: Path) -> tuple[GemmaTokenizerFast, Gemma2Model, AutoencoderDC]:
    """Open the trained models for the denoiser's training, and set the VAE's latent scaling."""
    tokenizer = build_tokenizer(work / "tokenizer")
    encoder = build_text_encoder(tokenizer)
    encoder.load_state_dict(torch.load(work / "text.pt", weights_only=True)["text_encoder"])
    vae = build_vae()
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["vae"])
    for model in (vae, encoder):
        model.eval().requires_grad_(False)
    z = vae.encode(pretraining.batch_of(random.Random(5), 256, PIXELS)).latent
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4))
    return tokenizer, encoder, vae


def train_transformer(work: Path, steps: int = 7500, batch: int = 32) -> None:
    """Train the denoiser on the frozen encoder and VAE."""
    torch.manual_seed(2)
    tokenizer, encoder, vae = load_frozen(work)
    transformer = build_transformer()
    latents = pretraining.Latents(lambda x: vae.encode(x).latent, PIXELS)

    def loss_of(chosen: list[scenes.Scene], captions: list[str], rng: random.Random, progress: float) -> torch.Tensor:
        with torch.no_grad():
            context, mask = encode(tokenizer, encoder, [c if rng.random() >= 0.1 else "" for c in captions])
        z = latents(chosen)
        z = (z + LATENT_STD * torch.randn_like(z)) * vae.config.scaling_factor
        sigma = 1 - torch.rand(len(chosen)) ** 1.7
        noise = torch.randn_like(z)
        noisy = torch.lerp(z, noise, sigma.view(-1, 1, 1, 1))
        velocity = transformer(noisy, context, 1000 * sigma, encoder_attention_mask=mask).sample
        return F.mse_loss(velocity, noise - z)

    pretraining.train_denoiser(work, "transformer", transformer, loss_of, steps, batch, quoted=WORLDS["sana"].quoted)


def assemble(work: Path) -> SanaPipeline:
    """Build the pipeline of the trained models."""
    tokenizer, encoder, vae = load_frozen(work)
    transformer = build_transformer()
    transformer.load_state_dict(pretraining.averaged(work, "transformer"))
    return SanaPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae, transformer=transformer.eval(), scheduler=build_scheduler()
    )


def export(work: Path, folder: Path) -> None:
    """Write the pipeline's folder so that both transformers 4 and 5 can read it."""
    assemble(work).to(torch.float16).save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")  # transformers 5 writes fields and names that 4 does not know
    shutil.copytree(work / "tokenizer", folder / "tokenizer")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "GemmaTokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    stages = {"vae": train_vae, "text": train_text, "transformer": train_transformer}
    pretraining.main(__doc__, Path(__file__).parent / "sana", stages, export)
