"""Tiny random pipelines and tokenizers of the real classes, built offline, once a session."""

import copy
import json
import os
import random

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

WORDS = """a an the of my this in on with and photo picture close clear sharp cropped good nice simple rendering snapshot object
style painting drawing scene dog cat toy red blue beach tower chef outfit teapot robot wolf near painted zogory""".split()


def clip_tokenizer(folder, pad_token="<|endoftext|>", length=24):
    """CLIP's own layout: bytes, bytes with </w>, merges, start and end last. Every word of WORDS is one token."""
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
    with torch.no_grad():  # a spread of norms, and one row of norm 0 that statistics leave out
        table = encoder.get_input_embeddings().weight
        table.mul_(torch.linspace(0.3, 0.5, len(table))[:, None] / table.norm(dim=-1, keepdim=True))
        table[7] = 0
    return encoder


def t5_tokenizer(folder, length=24):
    """Unigram pieces with a leading ▁, as T5's and UMT5's, and </s> at the end."""
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


@pytest.fixture(scope="session")
def _sdxl(tmp_path_factory):
    return build_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def _sd(tmp_path_factory):
    return build_sd(tmp_path_factory.mktemp("sd"))


def _fresh(pipe):
    fresh = type(pipe)(**{k: copy.deepcopy(v) for k, v in pipe.components.items()} | _extra(pipe))
    fresh.set_progress_bar_config(disable=True)
    return fresh


def _extra(pipe):
    return {"requires_safety_checker": False} if "requires_safety_checker" in pipe.config else {"add_watermarker": False}


@pytest.fixture
def sdxl(_sdxl):
    return _fresh(_sdxl)


@pytest.fixture
def sd(_sd):
    return _fresh(_sd)


@pytest.fixture(params=["sdxl", "sd"])
def pipe(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def photos():
    """Three little pictures, one of them not square."""
    from PIL import Image

    rng = random.Random(0)
    made = []
    for size in ((16, 16), (16, 16), (24, 16)):
        image = Image.new("RGB", size, tuple(rng.randrange(256) for _ in "rgb"))
        image.paste(tuple(rng.randrange(256) for _ in "rgb"), (4, 4, 12, 12))
        made.append(image)
    return made


@pytest.fixture
def concept():
    """Makes a concept that fits a pipeline: `concept(pipe, "<dog>", vectors=2, scale=0.4)`."""
    from diffusers_dti import DirectionalInversion
    from diffusers_dti.loading import text_pairs

    def make(pipe, word="<dog>", vectors=1, scale=0.4, seed=0, **metadata):
        generator = torch.Generator().manual_seed(seed)
        rows = {}
        for component, (_, encoder) in text_pairs(pipe).items():
            width = encoder.get_input_embeddings().weight.shape[1]
            rows[component] = torch.randn(vectors, width, generator=generator)
        return DirectionalInversion.from_embeddings(word, rows, metadata).rescale(scale)

    return make


def generate(pipe, prompt, **kwargs):
    """A picture as a tensor, two steps, seed 0."""
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(
        pipe(prompt, num_inference_steps=2, height=16, width=16, generator=generator, output_type="np", **kwargs).images
    )
