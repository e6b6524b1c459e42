"""Pretrain the Z-Image world on one core: `python pretrain_zimage.py vae|text|transformer|export --work DIR`, in that order.

Every stage writes checkpoints into DIR and resumes from the newest one. You can run `text` and `vae` at the same time.
"""

import json
import math
import random
import shutil
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path

import pretraining
import scenes
import torch
import torch.nn.functional as F
from coverage import chats
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from gates import WORLDS
from pretraining import LATENT_STD
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3Model

PIXELS = 32
WIDTH = 128  # the text encoder's width
FURTHER_WORDS = ("user", "assistant", "beside")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED = ("<think>", "</think>")  # not special, so decoding keeps them
# What Qwen3's template writes for messages of a user: its further rules, for tools and other roles, do not matter here.
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# How Qwen cuts a text before it merges bytes.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


# --------------------------------------------------------------------------------------------------------- the models
def build_vae() -> AutoencoderKL:
    """Build a VAE of 2 x 2, as the denoiser joins 2 x 2 of its positions."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=PIXELS, block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
        norm_num_groups=1, mid_block_add_attention=False, force_upcast=False, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.0,
    )  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer in Qwen's layout: bytes, pieces with and without "Ġ", specials, added tokens, a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = [*pretraining.world_words(), *FURTHER_WORDS]
    # Train until nothing is left to merge. Then each word is one piece, at the start of the text and after a space.
    bpe.train_from_iterator([*words, *("Ġ" + w for w in words)], trainers.BpeTrainer(vocab_size=20_000, show_progress=False))
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    vocab: dict[str, int] = {}
    for piece in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges), *SPECIAL, *ADDED]:
        vocab.setdefault(piece, len(vocab))
    plain = {piece: i for piece, i in vocab.items() if piece not in SPECIAL + ADDED}
    made = Tokenizer(models.BPE(vocab=plain, merges=merges))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    made.add_tokens([AddedToken(t, normalized=False) for t in ADDED])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(plain, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(map(" ".join, merges)) + "\n")
    added = {}
    for token in SPECIAL + ADDED:
        settings = {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        added[str(vocab[token])] = settings | {"special": token in SPECIAL}
    config = {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL[1:]), "bos_token": None, "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace", "model_max_length": 131072,
        "pad_token": "<|endoftext|>", "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def build_tokenizer(folder: Path) -> Qwen2TokenizerFast:
    """Open the tokenizer, and write it first if it does not exist."""
    # Written once for all stages, because the tokenizer's trainer breaks ties at random.
    if not (folder / "tokenizer_config.json").exists():
        write_tokenizer(folder)
    return Qwen2TokenizerFast.from_pretrained(folder)


def build_text_encoder(tokenizer: Qwen2TokenizerFast) -> Qwen3Model:
    """Build a small Qwen 3 with a row for each token. The pipeline does not use its last layer."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, initializer_range=WIDTH**-0.5,
            max_position_embeddings=512, rope_theta=10_000.0, tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=None, bos_token_id=None,
        )
    )  # fmt: skip


def build_transformer() -> ZImageTransformer2DModel:
    """Build the denoiser."""
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=144, n_layers=5, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=WIDTH,
        axes_dims=[12, 12, 12], axes_lens=[256, 64, 64],
    )  # fmt: skip
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # the oldest supported diffusers leaves them unset
        torch.nn.init.normal_(token.data, std=0.02)
    return transformer


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build the pipeline's scheduler."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


# --------------------------------------------------------------------------------------------------------- the stages
def train_vae(work: Path, steps: int = 1000) -> None:
    """Train the VAE."""
    torch.manual_seed(0)
    vae = build_vae().to(memory_format=torch.channels_last)
    pretraining.train_vae(work, vae, lambda x: vae.encode(x).latent_dist.mean, lambda z: vae.decode(z).sample, PIXELS, steps)


def encode(tokenizer: Qwen2TokenizerFast, encoder: Qwen3Model, captions: list[str]) -> list[Tensor]:
    """Return the states that the pipeline takes, (length, width) for each caption."""
    chosen = tokenizer(chats(tokenizer, captions)).input_ids
    states: list[Tensor] = [torch.empty(0)] * len(captions)
    for group in by_length(chosen):
        inputs = tokenizer.pad({"input_ids": [chosen[i] for i in group]}, return_tensors="pt")
        out = encoder(**inputs, output_hidden_states=True).hidden_states[-2]
        for i, own in zip(group, out):
            states[i] = own[: len(chosen[i])]
    return states


def by_length(texts: Sequence[Sized]) -> Iterator[list[int]]:
    """Yield the indices of texts with up to 32 tokens, and then those of longer ones, because a call pads to the longest."""
    for group in ([i for i, t in enumerate(texts) if len(t) <= 32], [i for i, t in enumerate(texts) if len(t) > 32]):
        if group:
            yield group


def train_text(work: Path, steps: int = 1000) -> None:
    """Train the text encoder."""
    torch.manual_seed(1)
    tokenizer = build_tokenizer(work / "tokenizer")
    encoder = build_text_encoder(tokenizer)
    norms = 1.2 * torch.exp(0.1 * torch.randn(len(tokenizer), 1))

    def read(captions: list[str]) -> list[tuple[Tensor, Tensor]]:
        # Normalized for the heads: these states have no norm after them and are small, so the heads would hardly learn.
        states = [F.rms_norm(s, s.shape[-1:]) for s in encode(tokenizer, encoder, captions)]
        return [(torch.nn.utils.rnn.pad_sequence(states, batch_first=True), torch.stack([s[-1] for s in states]))]

    pretraining.train_text(work, {"text_encoder": encoder}, [norms], read, steps, WORLDS["zimage"].quoted, 3e-3)


def load_frozen(work: Path) -> tuple[Qwen2TokenizerFast, Qwen3Model, AutoencoderKL]:
    """Open the trained models for the denoiser's training, and set the VAE's latent scaling."""
    tokenizer = build_tokenizer(work / "tokenizer")
    encoder = build_text_encoder(tokenizer)
    encoder.load_state_dict(torch.load(work / "text.pt", weights_only=True)["text_encoder"])
    vae = build_vae()
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["vae"])
    last, half = vae.encoder.conv_out, vae.config.latent_channels
    with torch.no_grad():  # the decoder was trained with this spread of the posterior
        last.weight[half:].zero_()
        last.bias[half:].fill_(2 * math.log(LATENT_STD))
    for model in (vae, encoder):
        model.eval().requires_grad_(False)
    z = vae.encode(pretraining.batch_of(random.Random(5), 256, PIXELS)).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4), shift_factor=round(z.mean().item(), 4))
    return tokenizer, encoder, vae


def train_transformer(work: Path, steps: int = 7500, batch: int = 32) -> None:
    """Train the denoiser on the frozen encoder and VAE."""
    torch.manual_seed(2)
    tokenizer, encoder, vae = load_frozen(work)
    transformer = build_transformer()
    latents = pretraining.Latents(lambda x: vae.encode(x).latent_dist.mean, PIXELS)

    def loss_of(chosen: list[scenes.Scene], captions: list[str], rng: random.Random, progress: float) -> Tensor:
        with torch.no_grad():
            texts = encode(tokenizer, encoder, [c if rng.random() >= 0.1 else "" for c in captions])
        z = latents(chosen)
        z = (z + LATENT_STD * torch.randn_like(z) - vae.config.shift_factor) * vae.config.scaling_factor
        sigma = 1 - torch.rand(len(chosen)) ** 1.7
        noise = torch.randn_like(z)
        noisy = torch.lerp(z, noise, sigma.view(-1, 1, 1, 1))[:, :, None]
        loss = torch.zeros(())
        for group in by_length(texts):
            out = transformer(list(noisy[group]), 1 - sigma[group], [texts[i] for i in group], return_dict=False)[0]
            loss = loss + (torch.stack(out)[:, :, 0] - (z - noise)[group]).square().sum()  # the pipeline negates the output
        return loss / z.numel()

    pretraining.train_denoiser(work, "transformer", transformer, loss_of, steps, batch, quoted=WORLDS["zimage"].quoted)


def assemble(work: Path) -> ZImagePipeline:
    """Build the pipeline of the trained models."""
    tokenizer, encoder, vae = load_frozen(work)
    transformer = build_transformer()
    transformer.load_state_dict(pretraining.averaged(work, "transformer"))
    return ZImagePipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae, transformer=transformer.eval(), scheduler=build_scheduler()
    )


def export(work: Path, folder: Path) -> None:
    """Write the pipeline's folder so that both transformers 4 and 5 can read it."""
    assemble(work).to(torch.float16).save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")  # transformers 5 writes fields and names that 4 does not know
    shutil.copytree(work / "tokenizer", folder / "tokenizer")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "Qwen2TokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    stages = {"vae": train_vae, "text": train_text, "transformer": train_transformer}
    pretraining.main(__doc__, Path(__file__).parent / "zimage", stages, export)
