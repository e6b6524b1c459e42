"""Build tiny random pipelines and tokenizers of the real classes, offline, and generate images with them.

This file must not import diffusers_dti, because some tests check that it is not imported.
"""

import copy
import json

import torch

WORDS = """a an the of my this in on with and photo picture close clear sharp cropped good nice simple rendering snapshot object
style painting drawing scene dog cat toy red blue beach tower chef outfit teapot robot wolf near painted zogory""".split()


def clip_tokenizer(folder, pad_token="<|endoftext|>", length=24):
    """Build a tokenizer with CLIP's layout: bytes, bytes with </w>, merges, start, end. Every word of WORDS is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=9999, end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {}
    for piece in ["!", *alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)]:
        vocab.setdefault(piece, len(vocab))
    for piece in ("<|startoftext|>", "<|endoftext|>"):
        vocab[piece] = len(vocab)
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=length, pad_token=pad_token)


def clip_encoder(tokenizer, width, projected=False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=tokenizer.model_max_length, projection_dim=width,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    encoder = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()
    with torch.no_grad():  # various norms, and one row of norm 0, which statistics leave out
        table = encoder.get_input_embeddings().weight
        table.mul_(torch.linspace(0.3, 0.5, len(table))[:, None] / table.norm(dim=-1, keepdim=True))
        table[7] = 0
    return encoder


def t5_tokenizer(folder, length=24):
    """Build a tokenizer like those of T5 and UMT5: unigram pieces with a leading ▁, and </s> at the end."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import AutoTokenizer

    special = ["<pad>", "</s>", "<unk>"]
    pieces = [(s, 0.0) for s in special] + [("▁", -3.0)] + [(f"▁{w}", -2.0) for w in WORDS]
    made = Tokenizer(models.Unigram(pieces + [(c, -6.0) for c in "abcdefghijklmnopqrstuvwxyz<>.,"], unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    made.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    made.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": length, "extra_ids": 0}
    config |= {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder)


def t5_encoder(tokenizer, width, spare_rows=0, umt5=False):
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    config = (UMT5Config if umt5 else T5Config)(
        vocab_size=len(tokenizer) + spare_rows, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return (UMT5EncoderModel if umt5 else T5EncoderModel)(config).eval()


def gemma_tokenizer(folder):
    """Build a tokenizer like Gemma's: pieces with and without ▁, bytes, <bos>, left padding, plain added tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import AutoTokenizer

    special, own = ["<pad>", "<eos>", "<bos>", "<unk>"], ["<unused0>", "<unused1>", "<h1>"]
    vocab = {piece: i for i, piece in enumerate([*special, *own, *(f"<0x{i:02X}>" for i in range(256)), "▁"])}
    merges = {}  # in order: "dog" letter by letter, then "▁dog"
    for word in WORDS:
        pairs = [(word[:i], word[i]) for i in range(1, len(word))] + [("▁", word)]
        for piece in (word[0], *word, *map("".join, pairs)):
            vocab.setdefault(piece, len(vocab))
        merges |= dict.fromkeys(pairs)
    made = Tokenizer(models.BPE(vocab, list(merges), byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bos = [("<bos>", vocab["<bos>"])]
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=bos)
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    made.add_tokens([AddedToken(t, normalized=False) for t in own])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "GemmaTokenizer", "padding_side": "left", "model_max_length": 10**30}
    config |= {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder)


def gemma_encoder(tokenizer, width):
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return Gemma2Model(config).eval()


def build_vae(latent_channels=4):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels, norm_num_groups=4, sample_size=16, scaling_factor=0.13,
    )  # fmt: skip


def build_unet(cross_attention_dim, **kwargs):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), cross_attention_dim=cross_attention_dim, **kwargs,
    )  # fmt: skip


def build_sdxl(tmp, prediction_type="epsilon"):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(0)
    tokenizers = clip_tokenizer(tmp / "one"), clip_tokenizer(tmp / "two", pad_token="!")
    encoders = clip_encoder(tokenizers[0], 16), clip_encoder(tokenizers[1], 24, projected=True)
    unet = build_unet(
        16 + 24, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 24,
        use_linear_projection=True,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type, steps_offset=1
    )
    return StableDiffusionXLPipeline(
        vae=build_vae(), text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1], unet=unet, scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip


def build_sd(tmp):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(1)
    tokenizer = clip_tokenizer(tmp / "sd")
    return StableDiffusionPipeline(
        vae=build_vae(), text_encoder=clip_encoder(tokenizer, 16), tokenizer=tokenizer, unet=build_unet(16),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def build_sana(tmp, sprint=False):
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaSprintPipeline,
        SanaTransformer2DModel,
        SCMScheduler,
    )

    torch.manual_seed(2)
    tokenizer = gemma_tokenizer(tmp / "gemma")
    stages = {"block_types": ("ResBlock",) * 3, "block_out_channels": (8, 8, 16), "layers_per_block": (1,) * 3}
    stages["qkv_multiscales"] = ((),) * 3
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=8, scaling_factor=0.41, upsample_block_type="interpolate",
        downsample_block_type="Conv", **{f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in stages.items()},
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16, sample_size=16, patch_size=1,
        guidance_embeds=sprint, qk_norm="rms_norm_across_heads" if sprint else None,
    )  # fmt: skip
    parts = {"tokenizer": tokenizer, "text_encoder": gemma_encoder(tokenizer, 16), "vae": vae, "transformer": transformer}
    if sprint:
        return SanaSprintPipeline(**parts, scheduler=SCMScheduler())
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    return SanaPipeline(**parts, scheduler=scheduler)


def build_wan(tmp, two=False):
    """Build Wan 2.1, or Wan 2.2, which has `two` transformers."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(3)
    tokenizer = t5_tokenizer(tmp / "umt5", length=512)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )

    def transformer():
        return WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=16, freq_dim=16,
            ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        )  # fmt: skip

    return WanPipeline(
        tokenizer=tokenizer, text_encoder=t5_encoder(tokenizer, 16, spare_rows=2, umt5=True), vae=vae,
        transformer=transformer(), transformer_2=transformer() if two else None, boundary_ratio=0.875 if two else None,
        scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
    )  # fmt: skip


SETTINGS = ("requires_safety_checker", "add_watermarker", "boundary_ratio", "expand_timesteps")


def fresh_copy(pipe):
    settings = {k: pipe.config[k] for k in SETTINGS if k in pipe.config}
    settings = {"add_watermarker": False} if "XL" in type(pipe).__name__ else settings
    fresh = type(pipe)(**{k: copy.deepcopy(v) for k, v in pipe.components.items()}, **settings)
    fresh.set_progress_bar_config(disable=True)
    return fresh


CALLS = {  # arguments besides the prompt that small pipelines need
    "SanaPipeline": {"height": 32, "width": 32, "use_resolution_binning": False, "max_sequence_length": 24},
    "SanaSprintPipeline": {"height": 32, "width": 32, "use_resolution_binning": False, "max_sequence_length": 24},
    "WanPipeline": {"height": 16, "width": 16, "num_frames": 1, "max_sequence_length": 24},
}


def generate(pipe, prompt, **kwargs):
    """Generate an image or a video as a tensor, in two steps from seed 0."""
    generator = torch.Generator().manual_seed(0)
    settings = CALLS.get(type(pipe).__name__, {"height": 16, "width": 16}) | kwargs
    out = pipe(prompt, num_inference_steps=2, generator=generator, output_type="np", **settings)
    return torch.from_numpy(out.frames if "Wan" in type(pipe).__name__ else out.images)
