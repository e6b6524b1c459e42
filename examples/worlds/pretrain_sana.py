"""Pretrain the SANA world on one core: `python pretrain_sana.py vae|text|transformer|export --work DIR`, in that order.

Every stage writes checkpoints into DIR and goes on from the newest; `text` and `vae` may run side by side.
"""

import json
import random
import shutil
from pathlib import Path

import pretraining
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from pretraining import LATENT_STD
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizerFast

PIXELS = 32
WIDTH = 128  # of the text encoder
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
# Gemma's further added tokens are not special: they are kept in decoded text
ADDED = ("<mask>", *(f"<unused{i}>" for i in range(8)), "<start_of_turn>", "<end_of_turn>", "\n")


# --------------------------------------------------------------------------------------------------------- the models
def build_vae() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(32, 64, 64), decoder_block_out_channels=(32, 64, 64),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 2, 2),
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
        downsample_block_type="conv", upsample_block_type="interpolate",
    )  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """Gemma's own layout: specials, added tokens, bytes to fall back on, pieces with and without "▁", merges."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = pretraining.world_words()
    # trained until nothing is left to merge: then each word is one piece, at the text's start and after a space
    bpe.train_from_iterator(words + ["▁" + w for w in words], trainers.BpeTrainer(vocab_size=20_000, show_progress=False))
    trained = json.loads(bpe.to_str())["model"]
    vocab: dict[str, int] = {}
    for piece in [*SPECIAL, *ADDED, *(f"<0x{i:02X}>" for i in range(256)), *sorted(trained["vocab"], key=trained["vocab"].get)]:
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
    added = {
        str(vocab[t]): {
            "content": t,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": t in SPECIAL,
        }
        for t in SPECIAL + ADDED
    }
    config = {
        "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": added, "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False, "eos_token": "<eos>", "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<pad>", "padding_side": "left", "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer", "unk_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def build_tokenizer(folder: Path) -> GemmaTokenizerFast:
    if not (folder / "tokenizer_config.json").exists():  # once for all stages: the trainer breaks ties at random
        write_tokenizer(folder)
    tokenizer = GemmaTokenizerFast.from_pretrained(folder)
    tokenizer.padding_side = "right"  # as the pipeline sets it
    return tokenizer


def build_text_encoder(tokenizer: GemmaTokenizerFast) -> Gemma2Model:
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32,
            pad_token_id=0, eos_token_id=1, bos_token_id=2, initializer_range=WIDTH**-0.5,
        )
    )  # fmt: skip
    torch.nn.init.normal_(encoder.embed_tokens.weight.data[0])  # padding's row, else zero: norms are statistics of all rows
    return encoder


def build_transformer() -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        in_channels=8, out_channels=8, sample_size=PIXELS // 4, patch_size=1, num_layers=6, num_attention_heads=4,
        attention_head_dim=28, num_cross_attention_heads=4, cross_attention_head_dim=28, cross_attention_dim=112,
        caption_channels=WIDTH, interpolation_scale=1,
    )  # fmt: skip


def build_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)


# --------------------------------------------------------------------------------------------------------- the stages
def train_vae(work: Path, steps: int = 1500) -> None:
    torch.manual_seed(0)
    vae = build_vae().to(memory_format=torch.channels_last)
    pretraining.train_vae(work, vae, lambda x: vae.encode(x).latent, lambda z: vae.decode(z).sample, PIXELS, steps)


def encode(tokenizer: GemmaTokenizerFast, encoder: Gemma2Model, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The last states and the mask, padded to the longest: what the pipeline's mask hides changes nothing."""
    inputs = tokenizer(captions, padding=True, return_tensors="pt")
    return encoder(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state, inputs.attention_mask


def train_text(work: Path, steps: int = 1000) -> None:
    torch.manual_seed(1)
    tokenizer = build_tokenizer(work / "tokenizer")
    encoder = build_text_encoder(tokenizer)
    # Gemma's norms before the √d: mean 1.77, none below 1.06
    norms = 1.06 + 0.71 * torch.exp(0.2 * torch.randn(len(tokenizer), 1) - 0.02)

    def read(captions: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        states, mask = encode(tokenizer, encoder, captions)
        return [(states * mask[..., None], states[torch.arange(len(states)), mask.sum(1) - 1])]

    pretraining.train_text(work, {"text_encoder": encoder}, [norms], read, steps)


def load_frozen(work: Path) -> tuple[GemmaTokenizerFast, Gemma2Model, AutoencoderDC]:
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


def train_transformer(work: Path, steps: int = 6500, batch: int = 32) -> None:
    torch.manual_seed(2)
    tokenizer, encoder, vae = load_frozen(work)
    transformer = build_transformer()
    latents = pretraining.Latents(lambda x: vae.encode(x).latent, PIXELS)

    def loss_of(drawn, captions: list[str], rng: random.Random, progress: float) -> torch.Tensor:
        with torch.no_grad():
            context, mask = encode(tokenizer, encoder, [c if rng.random() >= 0.1 else "" for c in captions])
        z = latents(drawn)
        z = (z + LATENT_STD * torch.randn_like(z)) * vae.config.scaling_factor
        sigma = 1 - torch.rand(len(drawn)) ** 1.7
        noise = torch.randn_like(z)
        noisy = torch.lerp(z, noise, sigma.view(-1, 1, 1, 1))
        velocity = transformer(noisy, context, 1000 * sigma, encoder_attention_mask=mask).sample
        return F.mse_loss(velocity, noise - z)

    pretraining.train_denoiser(work, "transformer", transformer, loss_of, steps, batch)


def assemble(work: Path) -> SanaPipeline:
    tokenizer, encoder, vae = load_frozen(work)
    transformer = build_transformer()
    transformer.load_state_dict(pretraining.averaged(work, "transformer"))
    return SanaPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae, transformer=transformer.eval(), scheduler=build_scheduler()
    )


def export(work: Path, folder: Path) -> None:
    """Write the pipeline's folder so that transformers 4 and 5 both read it."""
    assemble(work).to(torch.float16).save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")  # transformers 5 writes fields and names of its own
    shutil.copytree(work / "tokenizer", folder / "tokenizer")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "GemmaTokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    stages = {"vae": train_vae, "text": train_text, "transformer": train_transformer}
    pretraining.main(__doc__, Path(__file__).parent / "sana", stages, export)
