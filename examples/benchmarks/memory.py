"""Compute how much memory a training step takes, without weights and without a GPU: `python examples/benchmarks/memory.py`.

The models have the published sizes, and torch's fake tensors run them: shapes and dtypes are real, and nothing is computed.
What autograd saves for the backward pass is counted in its own hooks, each piece of memory once. Not counted: what a layer
needs while it runs, the CUDA context, and fragmentation, for which 1 GiB is left. This is arithmetic, not a measurement.
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2Config,
    Qwen2Model,
    UMT5Config,
    UMT5EncoderModel,
)

GIB = 2**30
FOUR_BITS = 0.5 + 4 / 64  # bytes a weight: nf4 with a float32 scale for each 64 weights


@dataclass
class Case:
    """A pipeline with the published sizes, and the inputs of one sample."""

    aim: int  # GiB
    denoiser: nn.Module
    encoders: list[nn.Module]
    vae: nn.Module
    tokens: int  # of a prompt
    inputs: dict[str, Any]  # of the denoiser, besides the states of the prompt
    states: tuple[int, ...]  # the shape of these


@dataclass
class Saved:
    """What autograd saves: outside of the parts that can be checkpointed, and by these parts, with their inputs."""

    weights: set[int]
    outside: dict[int, int] = field(default_factory=dict)
    parts: list[tuple[dict[int, int], dict[int, int]]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)  # so that no memory gets another's address

    def note(self, where: dict[int, int], tensor: Tensor) -> None:
        if id(tensor) in self.weights or id(tensor._base) in self.weights:
            return
        self.kept.append(tensor)
        storage = tensor.untyped_storage()
        where[storage._cdata] = storage.nbytes()

    def run(self, module: nn.Module, *args: Any) -> Any:
        """Run a part, in place of diffusers' gradient checkpointing."""
        inputs, own = {}, {}
        for argument in args:
            if isinstance(argument, Tensor):
                self.note(inputs, argument)
        self.parts.append((inputs, own))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: self.note(own, t) or t, lambda t: t):
            return module(*args)

    def bytes(self, interval: int | None) -> int:
        """Return the most bytes that are there at once, with a checkpoint at every so many parts."""
        always, again = dict(self.outside), [0]
        for number, (inputs, own) in enumerate(self.parts):
            always |= own if interval is None or number % interval else inputs
        for number, (_, own) in enumerate(self.parts):
            if interval is not None and number % interval == 0:
                again.append(sum(size for key, size in own.items() if key not in always))
        return sum(always.values()) + max(again)


def saved_by(model: nn.Module, call: Callable[[], Any]) -> Saved:
    saved = Saved({id(p) for p in model.parameters()})
    if getattr(model, "_supports_gradient_checkpointing", False):
        model.enable_gradient_checkpointing(saved.run)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.note(saved.outside, t) or t, lambda t: t):
        call()
    return saved


def sdxl() -> Case:
    unet = UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(5, 10, 20),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    large = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408
    )
    big = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
        hidden_act="gelu", vocab_size=49408,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    conditions = {
        "text_embeds": torch.empty(1, 1280),
        "time_ids": torch.empty(1, 6),
    }
    inputs = {"sample": torch.empty(1, 4, 96, 96), "timestep": torch.ones(1), "added_cond_kwargs": conditions}
    return Case(8, unet, [CLIPTextModel(large), CLIPTextModelWithProjection(big)], vae, 77, inputs, (1, 77, 2048))


def sana() -> Case:
    inputs = {"hidden_states": torch.empty(1, 32, 32, 32), "timestep": torch.ones(1)}
    return Case(12, SanaTransformer2DModel(), [Gemma2Model(Gemma2Config())], AutoencoderDC(), 20, inputs, (1, 20, 2304))


def wan() -> Case:
    umt5 = UMT5Config(
        vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    transformer = WanTransformer3DModel(num_attention_heads=12, num_layers=30, ffn_dim=8960)
    inputs = {"hidden_states": torch.empty(1, 16, 1, 64, 64), "timestep": torch.ones(1)}
    return Case(12, transformer, [UMT5EncoderModel(umt5)], AutoencoderKLWan(), 20, inputs, (1, 512, 4096))


def qwen_image() -> Case:
    qwen = Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4,
    )  # fmt: skip
    inputs = {"hidden_states": torch.empty(1, 4096, 64), "timestep": torch.ones(1), "img_shapes": [[(1, 64, 64)]]}
    inputs["encoder_hidden_states_mask"] = None
    return Case(24, QwenImageTransformer2DModel(), [Qwen2Model(qwen)], AutoencoderKLQwenImage(), 54, inputs, (1, 20, 3584))


CASES = {
    "SDXL, 768 px": sdxl, "SANA 1.6B, 1024 px": sana, "Wan 2.1 1.3B, 512 px": wan, "Qwen-Image 20B, 1024 px": qwen_image,
}  # fmt: skip


def weights(model: nn.Module) -> tuple[float, ...]:
    """Return a model's GiB in bfloat16, with linear layers in int8 and in four bits, and its largest layer's in bfloat16."""
    total = sum(p.numel() for p in model.parameters())
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    return tuple(n / GIB for n in (2 * total, 2 * total - linear, 2 * total - (2 - FOUR_BITS) * linear, 2 * largest))


def show(name: str, build: Callable[[], Case]) -> None:
    """Print a pipeline's tables: weights by component, what is saved for the backward pass, and sums beside the aim."""
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)  # fake weights cannot be converted afterwards
        try:
            case = build()
            states = torch.empty(case.states, requires_grad=True)
        finally:
            torch.set_default_dtype(torch.float32)
        texts = 0.0
        for model in (case.denoiser, *case.encoders, case.vae):
            model.eval().requires_grad_(False)
        for encoder in case.encoders:
            table = encoder.get_input_embeddings().weight
            for module in encoder.modules():  # UMT5 calls a different one than `get_input_embeddings()`
                if isinstance(module, nn.Embedding) and module.weight is table:
                    module.register_forward_hook(lambda module, args, output: output.requires_grad_())
            ids = torch.ones(1, case.tokens, dtype=torch.long)
            texts += saved_by(encoder, functools.partial(encoder, ids)).bytes(None) / GIB
        saved = saved_by(case.denoiser, functools.partial(case.denoiser, **case.inputs, encoder_hidden_states=states))
    print(f"\n{name}, batch 1, aim {case.aim} GiB\n\n| GiB | bfloat16 | int8 | 4 bits | largest layer |\n|---|---|---|---|---|")
    sizes = [("denoiser", weights(case.denoiser))]
    sizes += [(type(encoder).__name__, weights(encoder)) for encoder in case.encoders] + [("VAE", weights(case.vae))]
    for part, own in sizes:
        print(f"| {part} | " + " | ".join(f"{value:.2f}" for value in own) + " |")
    plain, half, full = (saved.bytes(n) / GIB for n in (None, 2, 1))
    print(
        f"\nSaved for the backward pass: {plain:.2f}; with checkpoints at every second of {len(saved.parts)} parts {half:.2f},"
    )
    print(f"at every part {full:.2f}. By the text encoders: {texts:.2f}.\n")
    denoiser, encoders = sizes[0][1], [own for _, own in sizes[1:-1]]
    all_encoders, away = sum(own[0] for own in encoders), max(own[3] for own in encoders)
    rows = {
        "all in bfloat16": denoiser[0] + all_encoders + plain,
        "with checkpoints": denoiser[0] + all_encoders + full,
        "and the text encoders offloaded": denoiser[0] + away + full,
        "and the denoiser in int8": denoiser[1] + away + full,
        "or in 4 bits": denoiser[2] + away + full,
        "or offloaded as well": max(away, denoiser[3]) + full,
    }
    print("| weights and activations, without the VAE | GiB | fits |\n|---|---|---|")
    for what, size in rows.items():
        print(f"| {what} | {size + texts:.1f} | {'yes' if size + texts + 1 < case.aim else 'no'} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"the beginnings of the cases' names, by default all: {', '.join(CASES)}")
    names = parser.parse_args().names
    for name, build in CASES.items():
        if not names or name.lower().startswith(tuple(n.lower() for n in names)):
            show(name, build)
