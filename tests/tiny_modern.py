"""Build tiny random pipelines whose text encoder is a language model, of the real classes, offline."""

import json

import torch
from tiny_pipelines import (
    WORDS,
    build_vae,
    clip_encoder,
    clip_tokenizer,
    gemma_encoder,
    gemma_tokenizer,
    t5_encoder,
    t5_tokenizer,
)

# What Qwen3's own template makes of a single message.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CALLS = {  # arguments besides the prompt that switch guidance off
    "ZImagePipeline": {"guidance_scale": 0.0},
    "Lumina2Pipeline": {"guidance_scale": 1.0},
    "StableDiffusion3Pipeline": {"guidance_scale": 1.0},
    "FluxPipeline": {},
    "Flux2KleinPipeline": {"guidance_scale": 1.0},
    "QwenImagePipeline": {"true_cfg_scale": 1.0},
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def qwen_tokenizer(folder):
    """Build a tokenizer with Qwen's layout: byte pairs, words with and without Ġ, added tokens for chats, no start or end."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import AutoTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = {piece: i for i, piece in enumerate(alphabet)}, {}
    for word in [*WORDS, "user", "assistant"]:
        pairs = [(word[:i], word[i]) for i in range(1, len(word))] + [("Ġ", word)]
        for piece in map("".join, pairs):
            vocab.setdefault(piece, len(vocab))
        merges |= dict.fromkeys(pairs)
    made = Tokenizer(models.BPE(vocab, list(merges)))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    made.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 131072, "pad_token": "<|endoftext|>"}
    config |= {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    return AutoTokenizer.from_pretrained(folder)


def qwen3_encoder(tokenizer, width, head=False, layers=3):
    """Build a Qwen3, with spare rows as the real one has."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(
        vocab_size=len(tokenizer) + 3, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=head,
    )  # fmt: skip
    return (Qwen3ForCausalLM if head else Qwen3Model)(config).eval()


def build_z_image(tmp):
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(4)
    tokenizer = qwen_tokenizer(tmp / "qwen3")
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 2, 2],
        axes_lens=[256, 32, 32],
    )  # fmt: skip
    with torch.no_grad():  # zeros at first
        transformer.cap_pad_token.normal_(), transformer.x_pad_token.normal_()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=shifted_vae(), text_encoder=qwen3_encoder(tokenizer, 16),
        tokenizer=tokenizer, transformer=transformer,
    )  # fmt: skip


def shifted_vae():
    vae = build_vae()
    vae.register_to_config(shift_factor=0.12)
    return vae


def dynamic_scheduler():
    """Build a scheduler whose shift depends on the resolution."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def build_lumina2(tmp):
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    torch.manual_seed(5)
    tokenizer = gemma_tokenizer(tmp / "gemma")
    transformer = Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
        multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(300, 32, 32), cap_feat_dim=16,
    )  # fmt: skip
    return Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), vae=shifted_vae(), text_encoder=gemma_encoder(tokenizer, 16),
        tokenizer=tokenizer, transformer=transformer,
    )  # fmt: skip


def build_sd3(tmp):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(6)
    clips = clip_tokenizer(tmp / "one"), clip_tokenizer(tmp / "two", pad_token="!")
    t5 = t5_tokenizer(tmp / "t5", length=256)
    transformer = SD3Transformer2DModel(
        sample_size=16, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=48,
        caption_projection_dim=16, pooled_projection_dim=16 + 24, out_channels=4, pos_embed_max_size=32,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=shifted_vae(),
        text_encoder=clip_encoder(clips[0], 16, projected=True), tokenizer=clips[0],
        text_encoder_2=clip_encoder(clips[1], 24, projected=True), tokenizer_2=clips[1],
        text_encoder_3=t5_encoder(t5, 48), tokenizer_3=t5,
    )  # fmt: skip


def build_flux(tmp, guidance=True):
    """Build FLUX.1 dev, or schnell, which has no input for guidance."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(7)
    clip, t5 = clip_tokenizer(tmp / "clip"), t5_tokenizer(tmp / "t5", length=512)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=24,
        pooled_projection_dim=16, guidance_embeds=guidance, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return FluxPipeline(
        scheduler=dynamic_scheduler(), vae=shifted_vae(), text_encoder=clip_encoder(clip, 16), tokenizer=clip,
        text_encoder_2=t5_encoder(t5, 24), tokenizer_2=t5, transformer=transformer,
    )  # fmt: skip


def build_klein(tmp):
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

    torch.manual_seed(8)
    tokenizer = qwen_tokenizer(tmp / "qwen3")
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=3 * 16, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16, use_quant_conv=True, use_post_quant_conv=True,
    )  # fmt: skip
    vae.bn.running_mean.normal_(), vae.bn.running_var.uniform_(0.5, 2)
    return Flux2KleinPipeline(
        scheduler=dynamic_scheduler(), vae=vae, text_encoder=qwen3_encoder(tokenizer, 16, head=True, layers=28),
        tokenizer=tokenizer, transformer=transformer,
    )  # fmt: skip


def build_qwen_image(tmp):
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

    torch.manual_seed(9)
    tokenizer = qwen_tokenizer(tmp / "qwen")
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.2, 2.0],
    )  # fmt: skip
    pipe = QwenImagePipeline(
        scheduler=dynamic_scheduler(), vae=vae, text_encoder=qwen25_vl_encoder(tokenizer, 16), tokenizer=tokenizer,
        transformer=transformer,
    )  # fmt: skip
    return pipe


def qwen25_vl_encoder(tokenizer, width):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": len(tokenizer) + 3, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width}
    ids = {f"{kind}_token_id": 1 for kind in ("image", "video", "vision_start", "vision_end")}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)).eval()


PIPELINES = {  # by the fixtures' names
    "z_image": build_z_image, "lumina2": build_lumina2, "sd3": build_sd3, "flux": build_flux, "klein": build_klein,
    "qwen_image": build_qwen_image,
}  # fmt: skip


def build_sd3_without_t5(tmp):
    pipe = build_sd3(tmp)
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    return pipe


VARIANTS = {"schnell": lambda tmp: build_flux(tmp, guidance=False), "sd3_without_t5": build_sd3_without_t5}


def encode(pipe, prompts):
    """Return what the pipeline's own `encode_prompt` gives its denoiser: each prompt's real states, and the pooled ones."""
    name = type(pipe).__name__
    if name == "ZImagePipeline":
        return pipe.encode_prompt(prompts, do_classifier_free_guidance=False)[0]
    if name == "StableDiffusion3Pipeline":
        states, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        return [*states, pooled]
    if name == "FluxPipeline":
        states, pooled, _ = pipe.encode_prompt(prompts, None)
        return [*states, pooled]
    if name == "Flux2KleinPipeline":
        return list(pipe.encode_prompt(prompts)[0])
    no_guidance = {"do_classifier_free_guidance": False} if name == "Lumina2Pipeline" else {}
    states, mask = pipe.encode_prompt(prompts, **no_guidance)[:2]
    return list(states) if mask is None else [own[real > 0] for own, real in zip(states, mask)]
