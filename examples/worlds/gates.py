"""The gates of a world: is it a fair place to compare methods in? `python gates.py` prints every figure.

1. the verifier reads renders, 2. it reads the VAE's reconstructions, 3. the world follows prompts of subjects that it has
never seen, 4. a token can learn such a subject (`study.py dev`, which trains).
"""

import argparse
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import scenes
import torch
import verifier
from diffusers import AutoencoderKLWan, DiffusionPipeline

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class World:
    """How a world's pictures are made, and what its gate 3 asks of shape, fill and background jointly."""

    pipeline: str  # class
    pixels: int
    steps: int
    guidance: float
    jointly: float
    call: dict[str, Any] = field(default_factory=dict)  # further arguments of the pipeline's call


WORLDS = {
    "sdxl": World("StableDiffusionXLPipeline", 32, 12, 3.0, 0.90),
    "sana": World(
        # binning takes only the real model's sizes; the instruction's words are not of this world
        "SanaPipeline", 32, 12, 3.0, 0.85,
        {"height": 32, "width": 32, "use_resolution_binning": False, "complex_human_instruction": None},
    ),
    "wan": World("WanPipeline", 64, 12, 3.0, 0.85, {"height": 64, "width": 64, "num_frames": 1}),
}  # fmt: skip


def world_of(pipe: DiffusionPipeline) -> World:
    return next(w for w in WORLDS.values() if w.pipeline == type(pipe).__name__)


def folder_of(world: str | Path) -> Path:
    """Of a world's name; a folder is its own."""
    return FOLDER / world if world in WORLDS else Path(world)


def open_world(world: str | Path = "sdxl") -> DiffusionPipeline:
    """The committed half-precision pipeline, in float32; `world` is a name or a folder."""
    pipe = DiffusionPipeline.from_pretrained(folder_of(world), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def generate(pipe: DiffusionPipeline, prompts: list[str], seed: int = 0, batch: int = 64) -> torch.Tensor:
    """A picture of each prompt, (n, 3, side, side) in [0, 1]; picture i starts from noise (seed, i)."""
    world = world_of(pipe)
    settings = {"num_inference_steps": world.steps, "guidance_scale": world.guidance, "output_type": "pt"} | world.call
    images = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed * 100_003 + start + i) for i in range(len(part))]
        out = pipe(part, generator=generators, **settings)
        images.append((out.frames[:, 0] if "frames" in out else out.images).float())
    return torch.cat(images)


@torch.no_grad()
def reconstruct(pipe: DiffusionPipeline, pictures: torch.Tensor) -> torch.Tensor:
    """What the VAE makes of pictures in [0, 1]."""
    video = isinstance(pipe.vae, AutoencoderKLWan)
    x = pictures * 2 - 1
    encoded = pipe.vae.encode(x[:, :, None] if video else x)
    decoded = pipe.vae.decode(encoded.latent if "latent" in encoded else encoded.latent_dist.mode()).sample
    return ((decoded[:, :, 0] if video else decoded) / 2 + 0.5).clamp(0, 1)


def accuracy(images: torch.Tensor, truths: list[dict[str, str]]) -> dict[str, float]:
    found = verifier.read(images)
    shares = {k: sum(f[k] == t[k] for f, t in zip(found, truths)) / len(truths) for k in truths[0]}
    jointly = ("shape", "fill", "background")
    shares["shape, fill, background"] = sum(all(f[k] == t[k] for k in jointly) for f, t in zip(found, truths)) / len(truths)
    return shares


def measure(pipe: DiffusionPipeline, prompts: int) -> dict[str, dict[str, float]]:
    """Gates 1 to 3: the share of each attribute that the verifier finds right."""
    rng = random.Random(2024)
    drawn = [scenes.random_scene(rng, list(scenes.BUNDLES)) for _ in range(1000)]
    truths = [s.attributes() for s in drawn]
    pictures = torch.stack([scenes.draw(s, world_of(pipe).pixels) for s in drawn])
    held = [scenes.random_scene(rng, scenes.HELD_BUNDLES) for _ in range(prompts)]
    return {
        "renders": accuracy(pictures, truths),
        "reconstructions": accuracy(torch.cat([reconstruct(pipe, x) for x in pictures.split(100)]), truths),
        "prompts": accuracy(generate(pipe, [s.caption() for s in held]), [s.attributes() for s in held]),
    }


def encoders_of(pipe: DiffusionPipeline) -> dict[str, tuple[Any, torch.nn.Module]]:
    """Each text encoder with its tokenizer."""
    names = [k for k in pipe.components if k.startswith("text_encoder")]
    return {k: (getattr(pipe, k.replace("text_encoder", "tokenizer")), getattr(pipe, k)) for k in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", default="sdxl", help=f"{', '.join(WORLDS)}, or a folder")
    parser.add_argument("--prompts", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = open_world(args.world)
    world = world_of(pipe)
    print("Gate 1, renders: all >= .99. Gate 2, reconstructions: all >= .98.")
    print(f"Gate 3, {args.prompts} captions of held-out bundles, {world.steps} steps, guidance {world.guidance}:")
    print(f"shape, fill and background >= .95, jointly >= {world.jointly}.")
    for gate, shares in measure(pipe, args.prompts).items():
        print(f"{gate}: " + "  ".join(f"{k} {v:.3f}" for k, v in shares.items()))
    for name, (_, encoder) in encoders_of(pipe).items():
        norms = encoder.get_input_embeddings().weight.norm(dim=-1)
        figures = {"mean": norms.mean(), "std": norms.std(), "min": norms.min(), "max": norms.max()}
        print(f"norms of {name}, {len(norms)} rows: " + "  ".join(f"{k} {v:.3f}" for k, v in figures.items()))


if __name__ == "__main__":
    main()
