"""Small pipelines with random weights, whose vocabularies have their real sizes: what the benchmarks on a CPU measure."""

import itertools
import string

from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLWan,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = ("a", "photo", "of", "dog")  # each of them is a token
RESOLUTION = {"sdxl": 128, "sana": 256, "wan": 128}  # pixels


def tokenizer(size: int, length: int = 77) -> PreTrainedTokenizerFast:
    """Make a BPE tokenizer with a vocabulary of random words, and those of WORDS."""
    vocabulary = {"<pad>": 0, "<unk>": 1, "<eos>": 2} | {letter: 3 + i for i, letter in enumerate(string.ascii_lowercase)}
    merges, tokens = [], list(string.ascii_lowercase)

    def merge(first: str, second: str) -> None:
        if first + second not in vocabulary:
            vocabulary[first + second] = len(vocabulary)
            merges.append((first, second))
            tokens.append(first + second)

    for word in WORDS:
        for end in range(1, len(word)):
            merge(word[:end], word[end])
    for first, second in itertools.product(range(10**6), range(26)):
        if len(vocabulary) == size:
            break
        merge(tokens[first], tokens[second])
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens([AddedToken(token) for token in ("<pad>", "<unk>", "<eos>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        bos_token="<eos>",
        model_max_length=length,
    )


def build(family: str) -> DiffusionPipeline:
    """Build a pipeline of "sdxl", "sana" or "wan"."""
    pipe = {"sdxl": _sdxl, "sana": _sana, "wan": _wan}[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _sdxl() -> StableDiffusionXLPipeline:
    encoders = []
    for kind, width, layers in ((CLIPTextModel, 128, 4), (CLIPTextModelWithProjection, 160, 6)):
        config = CLIPTextConfig(
            hidden_size=width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=4 * width,
        )
        encoders.append(kind(config).eval())
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(64, 128, 128), layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=(1, 1, 2), use_linear_projection=True, cross_attention_dim=128 + 160,
        addition_embed_type="text_time", addition_time_embed_dim=32, projection_class_embeddings_input_dim=6 * 32 + 160,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4
    )
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    return StableDiffusionXLPipeline(
        tokenizer=tokenizer(49_408), text_encoder=encoders[0], tokenizer_2=tokenizer(49_408), text_encoder_2=encoders[1],
        unet=unet, vae=vae, scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip


def _sana() -> SanaPipeline:
    config = Gemma2Config(
        vocab_size=256_000, hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        num_attention_heads=8, attention_head_dim=16, num_layers=4, num_cross_attention_heads=4, cross_attention_head_dim=32,
        cross_attention_dim=128, caption_channels=64, sample_size=16,
    )  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=32, attention_head_dim=8, encoder_block_out_channels=(16, 16, 32, 32, 64, 64),
        decoder_block_out_channels=(16, 16, 32, 32, 64, 64),
        encoder_block_types="ResBlock", decoder_block_types="ResBlock", encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6, encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6,
    )  # fmt: skip
    return SanaPipeline(tokenizer(256_000), Gemma2Model(config).eval(), vae, transformer, FlowMatchEulerDiscreteScheduler())


def _wan() -> WanPipeline:
    config = UMT5Config(vocab_size=256_384, d_model=64, d_kv=16, d_ff=256, num_layers=3, num_heads=4)
    transformer = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, text_dim=64, ffn_dim=256, num_layers=4, rope_max_seq_len=1024
    )
    vae = AutoencoderKLWan(base_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    return WanPipeline(
        tokenizer(256_300, length=512), UMT5EncoderModel(config).eval(), vae, FlowMatchEulerDiscreteScheduler(), transformer
    )
