"""Build tiny random text encoders of the kinds that newer pipelines have, with tokenizers of their layouts, offline."""

import inspect
import json

import diffusers
import transformers
from tiny_pipelines import WORDS, clip_encoder, clip_tokenizer, gemma_encoder, gemma_tokenizer, t5_encoder, t5_tokenizer

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 32}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 14}
VISION |= {"patch_size": 14, "depth": 1, "num_heads": 2, "out_hidden_size": 16, "num_position_embeddings": 4}
VISION |= {"fullatt_block_indexes": [0], "deepstack_visual_indexes": [0], "embed_dim": 16}
CLIP_VISION, PIXTRAL = {"model_type": "clip_vision_model"}, {"model_type": "pixtral", "head_dim": 8}
IMAGES = {"vision_start_token_id": 9, "image_token_id": 8, "video_token_id": 7}
ROPE = {"type": "default", "rope_type": "default", "mrope_section": [2, 1, 1]}


def byte_tokenizer(folder, kind, specials, length=10**30, **kwargs):
    """Build a tokenizer of byte pairs whose words begin with Ġ, of a class of transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=9999, initial_alphabet=alphabet, show_progress=False, special_tokens=list(specials)
    )
    bpe.train_from_iterator(WORDS, trainer)
    folder.mkdir()
    model = json.loads(bpe.to_str())["model"]
    merges = [" ".join(m) for m in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    if kind == "PreTrainedTokenizerFast":
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=length, **kwargs)
    return getattr(transformers, kind).from_pretrained(folder, model_max_length=length, **kwargs)


def qwen_tokenizer(folder):
    specials = {"unk_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return byte_tokenizer(folder, "Qwen2Tokenizer", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], **specials)


def llama_tokenizer(folder):
    specials = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|pad|>"}
    return byte_tokenizer(folder, "PreTrainedTokenizerFast", ["<|pad|>", "<|begin_of_text|>", "<|eot_id|>"], **specials)


def roberta_tokenizer(folder):
    return byte_tokenizer(folder, "RobertaTokenizer", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], length=24)


def bert_tokenizer(folder):
    """Build a tokenizer like BERT's: word pieces, which lower-case."""
    folder.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"<>.,", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys([*pieces, *WORDS])) + "\n")
    return transformers.BertTokenizer.from_pretrained(folder, model_max_length=24)


def xlm_tokenizer(folder):
    """Build a tokenizer like XLM-R's: unigram pieces with a leading ▁, between <s> and </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [(s, 0.0) for s in special] + [("▁", -3.0)] + [(f"▁{w}", -2.0) for w in WORDS]
    made = Tokenizer(
        models.Unigram(pieces + [(c, -6.0) for c in "abcdefghijklmnopqrstuvwxyz<>.,"] + [("<mask>", 0.0)], unk_id=3)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 24})
    )
    return transformers.AutoTokenizer.from_pretrained(folder)


def byt5_tokenizer(folder):
    return transformers.ByT5Tokenizer(model_max_length=64)


TOKENIZERS = {
    "qwen": qwen_tokenizer, "llama": llama_tokenizer, "roberta": roberta_tokenizer, "bert": bert_tokenizer,
    "xlm": xlm_tokenizer, "byt5": byt5_tokenizer, "gemma": gemma_tokenizer, "clip": clip_tokenizer,
    "t5": t5_tokenizer,
}  # fmt: skip


class TinyProcessor(transformers.ProcessorMixin):
    """A processor of texts alone."""

    attributes = ["tokenizer"]  # noqa: RUF012 (as in transformers)
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.tokenizer = tokenizer

    def __call__(self, text, **kwargs):
        return self.tokenizer(text, **kwargs)

    def apply_chat_template(self, *args, **kwargs):
        return [self.tokenizer("an object").input_ids]


def plain(model, config, **kwargs):
    """Return a builder of a model of transformers whose configuration is flat."""

    def build(tokenizer):
        sizes = SIZES | {"vocab_size": len(tokenizer)} | kwargs
        return getattr(transformers, model)(getattr(transformers, config)(**sizes))

    return build


def seeing(model, config, text=None, vision=None, **kwargs):
    """Return a builder of a model of transformers that also sees images."""

    def build(tokenizer):
        own = SIZES | {"vocab_size": len(tokenizer)} | (text or {})
        whole = getattr(transformers, config)(text_config=own, vision_config=VISION | (vision or {}), **kwargs)
        return getattr(transformers, model)(whole)

    return build


def qwen(name, config):
    return seeing(name, config, {"rope_scaling": ROPE}, **IMAGES)


def qwen2_5_vl_text(tokenizer):
    """Build the text part alone, which HunyuanVideo 1.5 has."""
    return qwen("Qwen2_5_VLModel", "Qwen2_5_VLConfig")(tokenizer).language_model


def byt5(tokenizer):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "pad_token_id": 0}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(tokenizer), **sizes))


def t5gemma(tokenizer):
    own = SIZES | GEMMA | {"vocab_size": len(tokenizer)}
    sides = {"encoder": own, "decoder": dict(own), "vocab_size": len(tokenizer)}
    return transformers.T5GemmaEncoderModel(transformers.T5GemmaConfig(is_encoder_decoder=False, **sides))


def t5gemma2(tokenizer):
    own = SIZES | GEMMA | {"vocab_size": len(tokenizer)}
    config = transformers.T5Gemma2Config(encoder={"text_config": own, "vision_config": VISION}, decoder=dict(own))
    return transformers.models.t5gemma2.modeling_t5gemma2.T5Gemma2Encoder(config.encoder)


def clap(tokenizer):
    text = SIZES | {"vocab_size": len(tokenizer), "projection_dim": 16, "pad_token_id": 1}
    audio = {
        "hidden_size": 16,
        "patch_embeds_hidden_size": 16,
        "depths": [1],
        "num_attention_heads": [1],
        "num_hidden_layers": 1,
    }
    audio |= {"spec_size": 16, "num_mel_bins": 4, "patch_size": 4, "patch_stride": [4, 4], "projection_dim": 16}
    return transformers.ClapModel(transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=16))


def multilingual_clip(tokenizer):
    module = inspect.getmodule(diffusers.KandinskyPipeline)
    return module.MultilingualCLIP(module.MultilingualCLIP.config_class(16, 16, vocab_size=len(tokenizer), **SIZES))


def alt_clip(tokenizer):
    cls = inspect.getmodule(diffusers.AltDiffusionPipeline).RobertaSeriesModelWithTransformation
    return cls(cls.config_class(vocab_size=len(tokenizer), project_dim=16, **SIZES))


def blip_clip(tokenizer):
    cls = inspect.getmodule(diffusers.BlipDiffusionPipeline).ContextCLIPTextModel
    return cls(transformers.CLIPTextConfig(vocab_size=len(tokenizer), **SIZES))


# By kind: the kind of tokenizer that such encoders have, and how to build one for a tokenizer.
ENCODERS = {
    "clip": ("clip", lambda tokenizer: clip_encoder(tokenizer, 16)),
    "projected": ("clip", lambda tokenizer: clip_encoder(tokenizer, 24, projected=True)),
    "t5": ("t5", lambda tokenizer: t5_encoder(tokenizer, 16)),
    "umt5": ("t5", lambda tokenizer: t5_encoder(tokenizer, 16, spare_rows=2, umt5=True)),
    "gemma": ("gemma", lambda tokenizer: gemma_encoder(tokenizer, 16)),
    "gemma3": ("gemma", seeing("Gemma3ForConditionalGeneration", "Gemma3Config", GEMMA, mm_tokens_per_image=1)),
    "t5gemma": ("gemma", t5gemma),
    "t5gemma2": ("gemma", t5gemma2),
    "qwen2_vl": ("qwen", qwen("Qwen2VLForConditionalGeneration", "Qwen2VLConfig")),
    "qwen2_5_vl": ("qwen", qwen("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig")),
    "qwen2_5_vl_text": ("qwen", qwen2_5_vl_text),
    "qwen3": ("qwen", plain("Qwen3ForCausalLM", "Qwen3Config", tie_word_embeddings=True)),  # tied, as the 4B model's
    "qwen3_model": ("qwen", plain("Qwen3Model", "Qwen3Config")),
    "qwen3_vl": ("qwen", qwen("Qwen3VLForConditionalGeneration", "Qwen3VLConfig")),
    "qwen3_vl_model": ("qwen", qwen("Qwen3VLModel", "Qwen3VLConfig")),
    "llama": ("llama", plain("LlamaForCausalLM", "LlamaConfig")),
    "llama_model": ("llama", plain("LlamaModel", "LlamaConfig")),
    "llava": ("llama", seeing("LlavaForConditionalGeneration", "LlavaConfig", {"model_type": "llama"}, CLIP_VISION)),
    "smollm3": ("llama", plain("SmolLM3ForCausalLM", "SmolLM3Config")),
    "glm": ("llama", plain("GlmModel", "GlmConfig")),
    "mistral3": ("llama", seeing("Mistral3ForConditionalGeneration", "Mistral3Config", {"model_type": "mistral"}, PIXTRAL)),
    "mistral3_model": ("llama", seeing("Mistral3Model", "Mistral3Config", {"model_type": "mistral"}, PIXTRAL)),
    "bert": ("bert", plain("BertModel", "BertConfig")),
    "byt5": ("byt5", byt5),
    "clap": ("roberta", clap),
    "clap_text": ("roberta", plain("ClapTextModelWithProjection", "ClapTextConfig", projection_dim=16, pad_token_id=1)),
    "multilingual_clip": ("xlm", multilingual_clip),
    "alt_clip": ("xlm", alt_clip),
    "blip_clip": ("clip", blip_clip),
}
