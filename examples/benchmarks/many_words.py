"""Measure loading, unloading and storing many concepts: `python examples/benchmarks/many_words.py sdxl`.

The vocabularies and the tables of embeddings have their real sizes, with random words and weights; the encoders have one layer,
because loading does not use them. Times are CPU times of one thread, in milliseconds a concept.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, SanaPipeline, StableDiffusionXLPipeline, WanPipeline
from pipelines import FAMILIES, tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, Gemma2Config, Gemma2Model, UMT5Config, UMT5EncoderModel

from diffusers_dti import DirectionalInversion
from diffusers_dti.pipeline.text_encoders import find_text_encoders


def build(family: str, width: int = 2304) -> DiffusionPipeline:
    """Build a pipeline of which only the text encoders are there, SANA's in a width of your choice."""
    if family == "sana":
        model = Gemma2Model(Gemma2Config(vocab_size=256_000, hidden_size=width, num_hidden_layers=1)).bfloat16()
        return SanaPipeline(tokenizer(256_000), model, vae=None, transformer=None, scheduler=None)
    if family == "wan":
        config = UMT5Config(vocab_size=256_384, d_model=4096, num_layers=1)
        return WanPipeline(tokenizer(256_300, length=512), UMT5EncoderModel(config).bfloat16(), vae=None, scheduler=None)
    small, big = (
        CLIPTextModel(CLIPTextConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=8, intermediate_size=64))
        for width in (768, 1280)
    )
    return StableDiffusionXLPipeline(
        tokenizer=tokenizer(49_408), text_encoder=small, tokenizer_2=tokenizer(49_408), text_encoder_2=big, vae=None, unet=None,
        scheduler=None,
    )  # fmt: skip


def milliseconds(function: Callable[[], object], concepts: int) -> float:
    """Return the CPU time of a call, for each of its concepts."""
    began = time.process_time()
    function()
    return (time.process_time() - began) * 1000 / concepts


def grown(pipe: DiffusionPipeline, component: str) -> torch.Tensor:
    """Return a copy of a table with one more row: what loading a word must at least do."""
    table = getattr(pipe, component).get_input_embeddings().weight.detach()
    return torch.cat([table, table.new_zeros(1, table.shape[1])])


def load_by_stock(pipe: DiffusionPipeline) -> None:
    """Load a word as users of stock diffusers do, with one call for each encoder."""
    for component, encoder in find_text_encoders(pipe).items():
        state = {"<stock>": torch.randn(encoder.width, dtype=encoder.weight.dtype)}
        tokenizer = component.replace("text_encoder", "tokenizer")
        pipe.load_textual_inversion(state, text_encoder=getattr(pipe, component), tokenizer=getattr(pipe, tokenizer))


def measure(pipe: DiffusionPipeline, count: int, folder: Path) -> dict[str, float]:
    """Return the times of one concept after the other, and of all at once."""
    widths = {component: encoder.width for component, encoder in find_text_encoders(pipe).items()}
    made = []
    for number in range(count):
        rows = {component: torch.randn(1, width) for component, width in widths.items()}
        made.append(DirectionalInversion.from_embeddings(f"<word{number}>", rows, {}).rescale(0.4))
    folders = [folder / str(number) for number in range(count)]
    times = {"save": milliseconds(lambda: [c.save_pretrained(f) for c, f in zip(made, folders)], count)}
    times["read"] = milliseconds(lambda: [DirectionalInversion.from_pretrained(f) for f in folders], count)
    bytes_written = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    pipe.load_directional_inversion(made[:2])
    pipe.unload_directional_inversion()  # whatever happens only once

    def one_by_one(first: int) -> None:
        for concept in made[first : first + 5]:
            pipe.load_directional_inversion(concept)

    times["copy of the tables"] = milliseconds(lambda: [grown(pipe, component) for component in widths], 1)
    times["load the 1st to 5th"] = milliseconds(lambda: one_by_one(0), 5)
    if count > 50:
        pipe.load_directional_inversion(made[5:45])
        times["load the 46th to 50th"] = milliseconds(lambda: one_by_one(45), 5)
        times["unload one of 50"] = milliseconds(lambda: pipe.unload_directional_inversion("<word0>"), 1)
    pipe.unload_directional_inversion()
    times[f"load {count:,} in one call"] = milliseconds(lambda: pipe.load_directional_inversion(made), count)
    times[f"unload {count:,} in one call"] = milliseconds(pipe.unload_directional_inversion, count)
    return times | {"KB on the disk": bytes_written / count / 1000}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--width", type=int, default=2304, help="the width of SANA's encoder (default: 2304)")
    parser.add_argument("--stock", action="store_true", help="also measure stock `load_textual_inversion`")
    parser.add_argument("--count", type=int, default=1000, help="the number of concepts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipe = build(arguments.family, arguments.width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        results = measure(pipe, arguments.count, Path(folder))
    if arguments.stock:
        results["stock, load one"] = milliseconds(lambda: load_by_stock(pipe), 1)
    results["peak memory above the pipeline (MB)"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    print(f"| {arguments.family} | CPU ms a concept |\n|---|---|")
    for name, value in results.items():
        print(f"| {name} | {value:.2f} |")


if __name__ == "__main__":
    main()
