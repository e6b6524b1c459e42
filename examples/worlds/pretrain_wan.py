"""Pretrain the Wan world on one core: `python pretrain_wan.py vae|text|transformer|export --work DIR`, in that order.

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
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from gates import WORLDS
from pretraining import LATENT_STD
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel
from wan_autoencoder import LATENTS, PIXELS, build_vae, clips_of, quicken, train_vae

TEXT_LENGTH = 512  # the length that WanPipeline pads to
FLOW_SHIFT = 3.0
CLIPS_FROM = 0.62  # share of the transformer's steps after which clips join the single frames
SPARE_ROWS = 84  # the real table too has spare rows: 256384 for 256300 tokens


# --------------------------------------------------------------------------------------------------------- the models
def build_tokenizer(folder: Path) -> T5TokenizerFast:
    """Build a tokenizer in UMT5's layout: <pad>, </s>, <unk>, pieces, 300 extra ids. Every word of the world is one piece."""
    if not (folder / "tokenizer.json").exists():
        specials, extra = ["<pad>", "</s>", "<unk>"], [f"<extra_id_{i}>" for i in range(300)]
        # Single letters spell any other word. They are so improbable that a word of the world is never split.
        letters = ["▁", *map(chr, range(33, 127))]
        pieces = [(t, 0.0) for t in specials]
        pieces += [("▁" + w, -5.0) for w in pretraining.world_words()] + [(c, -20.0) for c in letters]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
        # transformers 5 always uses this pre-tokenizer and ignores the one in the file.
        metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
        tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in specials + extra])
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        # Written by hand, because transformers 4 cannot read what transformers 5 would write.
        config = {
            "tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
            "padding_side": "right", "model_max_length": TEXT_LENGTH, "clean_up_tokenization_spaces": False,
            "extra_ids": len(extra), "additional_special_tokens": extra,
        }  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return T5TokenizerFast.from_pretrained(folder)


def build_text_encoder(tokenizer: T5TokenizerFast) -> UMT5EncoderModel:
    """Build a small UMT5 with a row for each token and spare rows."""
    config = UMT5Config(
        vocab_size=len(tokenizer) + SPARE_ROWS, d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return UMT5EncoderModel(config)


def build_transformer() -> WanTransformer3DModel:
    """Build the denoiser."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=40, in_channels=LATENTS, out_channels=LATENTS,
        text_dim=128, freq_dim=64, ffn_dim=480, num_layers=7, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip


class PaddedAttention(WanAttnProcessor):
    """Cross-attention over a caption's tokens and one position that weighs as much as all the padding.

    The pipeline pads with hundreds of equal positions and masks none of them. Adding the logarithm of their number to the score
    of one position has the same result, at a tenth of the cost.
    """

    bias: torch.Tensor  # the attention bias of the current batch, (n, 1, 1, positions)

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attend with the current batch's bias in place of the mask."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)


def build_scheduler() -> UniPCMultistepScheduler:
    """Build the pipeline's scheduler."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT)


# --------------------------------------------------------------------------------------------------------- the stages
def tokenize(tokenizer: T5TokenizerFast, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, padded to the longest caption."""
    out = tokenizer(captions, padding="longest", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    return out.input_ids, out.attention_mask


def train_text(work: Path, steps: int = 2000) -> None:
    """Train the text encoder."""
    torch.manual_seed(1)
    tokenizer = build_tokenizer(work / "tokenizer")
    encoder = build_text_encoder(tokenizer)
    norms = 8 + 0.4 * torch.randn(encoder.config.vocab_size, 1)

    def read(captions: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        ids, mask = tokenize(tokenizer, captions)
        states = encoder(ids, mask).last_hidden_state * mask[..., None]
        return [(states, states.sum(1) / mask.sum(1, keepdim=True))]

    pretraining.train_text(work, {"text_encoder": encoder}, [norms], read, steps, WORLDS["wan"].quoted)


@torch.no_grad()
def encode(
    encoder: UMT5EncoderModel, tokenizer: T5TokenizerFast, captions: list[str], length: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states with one padding position, and the attention bias that makes it count as padding to `length`."""
    ids, mask = tokenize(tokenizer, captions)
    states = encoder(ids, mask).last_hidden_state * mask[..., None]
    bias = torch.zeros(mask.shape).masked_fill(mask == 0, -math.inf)
    padding = (length - mask.sum(1, keepdim=True)).clamp_min(1)  # at first, some captions are longer
    bias = torch.cat([bias, torch.log(padding)], 1)
    return F.pad(states, (0, 0, 0, 1)), bias[:, None, None]


def load_frozen(work: Path) -> tuple[T5TokenizerFast, UMT5EncoderModel, AutoencoderKLWan]:
    """Open the trained models for the denoiser's training, and set the VAE's latent scaling."""
    tokenizer = build_tokenizer(work / "tokenizer")
    encoder = build_text_encoder(tokenizer)
    encoder.load_state_dict(torch.load(work / "text.pt", weights_only=True)["text_encoder"])
    vae = build_vae()
    vae.load_state_dict(torch.load(work / "motion.pt", weights_only=True)["vae"])
    with torch.no_grad():  # the decoder was trained with this spread of the posterior
        vae.quant_conv.weight[LATENTS:].zero_()
        vae.quant_conv.bias[LATENTS:].fill_(2 * math.log(LATENT_STD))
    for model in (vae, encoder):
        model.eval().requires_grad_(False)
    z = vae.encode(clips_of(random.Random(5), 256, 1)).latent_dist.mean.transpose(0, 1).flatten(1)
    vae.register_to_config(
        latents_mean=[round(m, 4) for m in z.mean(1).tolist()], latents_std=[round(s, 4) for s in z.std(1).tolist()]
    )
    return tokenizer, encoder, vae


def train_transformer(work: Path, steps: int = 6500, batch: int = 64) -> None:
    """Train the denoiser on the frozen encoder and VAE."""
    torch.manual_seed(2)
    tokenizer, encoder, vae = load_frozen(work)
    quicken(vae)
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    transformer = build_transformer()
    attention = PaddedAttention()
    for block in transformer.blocks:
        block.attn2.processor = attention
    # Matrix products run in bfloat16, which is faster here. The residual stream stays in float32.
    transformer.patch_embedding.register_forward_hook(lambda _, inputs, output: output.float())
    latents = pretraining.Latents(lambda x: vae.encode(x[:, :, None]).latent_dist.mean, PIXELS)

    def loss_of(chosen: list[scenes.Scene], captions: list[str], rng: random.Random, progress: float) -> torch.Tensor:
        if progress > CLIPS_FROM and rng.random() < 0.3:
            chosen, captions, frames = chosen[:10], captions[:10], rng.choice((5, 9))
            with torch.no_grad():
                x = torch.stack([scenes.clip(scene, PIXELS, frames) for scene in chosen])
                z = vae.encode(x * 2 - 1).latent_dist.mean
        else:
            z = latents(chosen)
        z = (z + LATENT_STD * torch.randn_like(z) - mean) / std
        captions = ["" if rng.random() < 0.1 else c for c in captions]
        # Start with little padding: the real amount hides the words from a model that does not know them yet.
        context, attention.bias = encode(encoder, tokenizer, captions, min(TEXT_LENGTH, 64 * 8 ** (2 * progress)))
        u = torch.rand(len(z))
        sigma = FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)  # as dense as the scheduler's steps
        noise = torch.randn_like(z)
        noisy = torch.lerp(z, noise, sigma.view(-1, 1, 1, 1, 1))
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            predicted = transformer(noisy, sigma * 1000, context).sample
        return F.mse_loss(predicted.float(), noise - z)

    pretraining.train_denoiser(work, "transformer", transformer, loss_of, steps, batch, 2e-3, WORLDS["wan"].quoted)


def assemble(work: Path) -> WanPipeline:
    """Build the pipeline of the trained models."""
    tokenizer, encoder, vae = load_frozen(work)
    transformer = build_transformer()
    transformer.load_state_dict(pretraining.averaged(work, "transformer"))
    return WanPipeline(
        vae=vae, text_encoder=encoder, tokenizer=tokenizer, transformer=transformer.eval(), scheduler=build_scheduler()
    )  # fmt: skip


def export(work: Path, folder: Path) -> None:
    """Write the pipeline's folder so that both transformers 4 and 5 can read it."""
    assemble(work).to(torch.float16).save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")  # transformers 5 writes fields and names that 4 does not know
    shutil.copytree(work / "tokenizer", folder / "tokenizer")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "T5TokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    stages = {"vae": train_vae, "text": train_text, "transformer": train_transformer}
    pretraining.main(__doc__, Path(__file__).parent / "wan", stages, export)
