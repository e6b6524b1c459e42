"""Build tiny random pipelines whose text encoder is a language model, of the real classes, offline."""

import json

import torch
from tiny_pipelines import WORDS, build_vae

# What Qwen3's own template makes of a single message.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
PIPELINES = ["z_image"]  # the fixtures in conftest.py
CALLS = {  # arguments besides the prompt that switch guidance off and keep prompts short
    "ZImagePipeline": {"guidance_scale": 0.0, "max_sequence_length": 64},
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
    vae = build_vae()
    vae.register_to_config(shift_factor=0.12)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=qwen3_encoder(tokenizer, 16),
        tokenizer=tokenizer, transformer=transformer,
    )  # fmt: skip


def encode(pipe, prompts):
    """Return what the pipeline's own `encode_prompt` gives its denoiser: each prompt's real states, and the pooled ones."""
    name = type(pipe).__name__
    if name == "ZImagePipeline":
        return pipe.encode_prompt(prompts, do_classifier_free_guidance=False)[0]
    raise NotImplementedError(name)
