"""The pipelines that the benchmarks measure, with random weights and vocabularies of real size.

Those of `SMALL` are for a CPU. Those of `FULL` have the architectures of Stable Diffusion XL, SANA 1.6B and Wan 2.1 1.3B, for a
GPU: nothing is downloaded.
"""

import itertools
import string
from typing import Any

import torch
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
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Model,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    UMT5EncoderModel,
)

WORDS = ("a", "photo", "of", "dog", "on", "the", "beach")  # each of them is a token
CLASSES: dict[str, dict[str, Any]] = {
    "sdxl": {
        "text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection, "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
    },
    "sana": {"text_encoder": Gemma2Model, "transformer": SanaTransformer2DModel, "vae": AutoencoderDC},
    "wan": {"text_encoder": UMT5EncoderModel, "transformer": WanTransformer3DModel, "vae": AutoencoderKLWan},
}  # fmt: skip
FAMILIES = tuple(CLASSES)
VOCABULARY = {"sdxl": 49_408, "sana": 256_000, "wan": 256_300}  # tokens
RESOLUTION = {"sdxl": 128, "sana": 256, "wan": 128}  # pixels
FULL_RESOLUTION = {"sdxl": 768, "sana": 1024, "wan": 512}

Configs = dict[str, dict[str, dict[str, Any]]]  # of each family's components
_UNET: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2, "use_linear_projection": True, "addition_embed_type": "text_time",
}  # fmt: skip
_KL = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
SMALL: Configs = {
    "sdxl": {
        "text_encoder": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512},
        "text_encoder_2": {
            "hidden_size": 160, "projection_dim": 160, "num_hidden_layers": 6, "num_attention_heads": 4,
            "intermediate_size": 640,
        },
        "unet": _UNET | {
            "sample_size": 16, "block_out_channels": (64, 128, 128), "attention_head_dim": (2, 4, 4),
            "transformer_layers_per_block": (1, 1, 2), "cross_attention_dim": 128 + 160, "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 6 * 32 + 160,
        },
        "vae": _KL | {"block_out_channels": (32,) * 4},
    },
    "sana": {
        "text_encoder": {
            "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16,
        },
        "transformer": {
            "num_attention_heads": 8, "attention_head_dim": 16, "num_layers": 4, "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 32, "cross_attention_dim": 128, "caption_channels": 64, "sample_size": 16,
        },
        "vae": {
            "latent_channels": 32, "attention_head_dim": 8, "encoder_block_out_channels": (16, 16, 32, 32, 64, 64),
            "decoder_block_out_channels": (16, 16, 32, 32, 64, 64), "encoder_layers_per_block": (1,) * 6,
            "decoder_layers_per_block": (1,) * 6, "encoder_qkv_multiscales": ((),) * 6, "decoder_qkv_multiscales": ((),) * 6,
        },
    },
    "wan": {
        "text_encoder": {"d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 3, "num_heads": 4},
        "transformer": {
            "num_attention_heads": 4, "attention_head_dim": 32, "text_dim": 64, "ffn_dim": 256, "num_layers": 4,
            "rope_max_seq_len": 1024,
        },
        "vae": {"base_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
    },
}  # fmt: skip
_EFFICIENT = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
FULL: Configs = {  # what is missing has the value of the class, which is the model's
    "sdxl": {
        "text_encoder": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
        "text_encoder_2": {
            "hidden_size": 1280, "projection_dim": 1280, "num_hidden_layers": 32, "num_attention_heads": 20,
            "intermediate_size": 5120, "hidden_act": "gelu",
        },
        "unet": _UNET | {
            "sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 768 + 1280, "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 6 * 256 + 1280,
        },
        "vae": _KL | {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    },
    "sana": {
        "text_encoder": {"num_hidden_layers": 26},
        "transformer": {"num_layers": 20},
        "vae": {
            "encoder_block_types": _EFFICIENT, "decoder_block_types": _EFFICIENT, "downsample_block_type": "Conv",
            "upsample_block_type": "interpolate", "scaling_factor": 0.41407,
        },
    },
    "wan": {
        "text_encoder": {
            "d_model": 4096, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64
        },
        "transformer": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        "vae": {},
    },
}  # fmt: skip


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


def build(
    family: str,
    configs: Configs = SMALL,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    vocabulary: int | None = None,
) -> DiffusionPipeline:
    """Build a pipeline of "sdxl", "sana" or "wan".

    Args:
        family: the family.
        configs: the configurations, `SMALL` or `FULL`.
        device: where the models are made.
        dtype: the dtype that they are made in.
        vocabulary: the number of tokens, if not the real one.
    """
    size, kept, models = vocabulary or VOCABULARY[family], torch.get_default_dtype(), {}
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            for name, config in configs[family].items():
                models[name] = _model(CLASSES[family][name], config, size)
    finally:
        torch.set_default_dtype(kept)
    if family == "sdxl":
        scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
        pipe = StableDiffusionXLPipeline(
            tokenizer=tokenizer(size), tokenizer_2=tokenizer(size), scheduler=scheduler, add_watermarker=False, **models
        )
    else:
        kind, length = (SanaPipeline, 77) if family == "sana" else (WanPipeline, 512)
        pipe = kind(tokenizer=tokenizer(size, length), scheduler=FlowMatchEulerDiscreteScheduler(), **models)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _model(kind: Any, config: dict[str, Any], vocabulary: int) -> torch.nn.Module:
    """Make a model, a text encoder with a row for each token."""
    if not issubclass(kind, PreTrainedModel):
        return kind(**config).eval()
    rows = vocabulary + 84 if kind is UMT5EncoderModel else vocabulary  # UMT5 has spare ones
    return kind(kind.config_class(**config | {"vocab_size": rows})).eval()
