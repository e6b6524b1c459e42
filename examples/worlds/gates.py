"""Check that methods can be compared fairly in a world: `python gates.py` prints every number.

There are five gates:

1. The verifier reads rendered scenes.
2. The verifier reads the VAE's reconstructions.
3. The world follows prompts for subjects that it has never seen.
4. A placeholder can learn such a subject. `walk.py 1` measures this one, because it trains.
5. Pretraining met every row that a prompt can reach.
"""

import argparse
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import scenes
import torch
import verifier
from coverage import coverage
from diffusers import AutoencoderKLWan, DiffusionPipeline
from packaging.version import Version

FOLDER = Path(__file__).parent
RENDERS = 1000  # scenes of gates 1 and 2


@dataclass(frozen=True)
class World:
    """How to generate images in a world, and what its gate 3 requires.

    Args:
        pipeline: the name of the pipeline's class.
        pixels: the side of its images.
        steps: inference steps.
        guidance: guidance scale.
        jointly: the least share of images in which shape, fill and background are all right.
        quoted: a word in quotation marks, as its captions write some of them, so that its text encoder knows every row.
        call: further arguments of the pipeline's call.
    """

    pipeline: str
    pixels: int
    steps: int
    guidance: float
    jointly: float
    quoted: str = "{}"
    call: dict[str, Any] = field(default_factory=dict)


WORLDS = {
    "sdxl": World("StableDiffusionXLPipeline", 32, 12, 3.0, 0.90),
    "sana": World(
        # Binning knows only the real model's sizes, and this world does not know the instruction's words.
        "SanaPipeline", 32, 12, 3.0, 0.85, '"{}"',
        {"height": 32, "width": 32, "use_resolution_binning": False, "complex_human_instruction": None},
    ),
    "wan": World("WanPipeline", 64, 12, 3.0, 0.85, '" {} "', {"height": 64, "width": 64, "num_frames": 1}),
    "zimage": World(
        # This pipeline adds the guidance to one: 2 is what the others call 3.
        "ZImagePipeline", 32, 12, 2.0, 0.85, '"{}"', {"height": 32, "width": 32, "max_sequence_length": 64},
    ),
}  # fmt: skip
STUDIED = ("sdxl", "sana", "wan")  # the worlds of docs/study.md


def world_of(pipe: DiffusionPipeline) -> World:
    """Return the world that a pipeline is from."""
    return next(w for w in WORLDS.values() if w.pipeline == type(pipe).__name__)


def folder_of(world: str | Path) -> Path:
    """Return the folder of a world, given its name or the folder itself."""
    return FOLDER / world if world in WORLDS else Path(world)


def load_pipeline(source: str | Path, dtype: torch.dtype) -> DiffusionPipeline:
    """Load a pipeline in a dtype, without a warning on any supported version of diffusers.

    Loading in the stored dtype and then calling `.to(dtype)` is not the same: Gemma's embedding scale would keep the rounding
    of the stored half precision.
    """
    argument = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"
    return DiffusionPipeline.from_pretrained(source, **{argument: dtype})


def open_world(world: str | Path = "sdxl") -> DiffusionPipeline:
    """Open the committed half-precision pipeline in float32, by the world's name or folder."""
    pipe = load_pipeline(folder_of(world), torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def generate(pipe: DiffusionPipeline, prompts: list[str], seed: int = 0, batch: int = 64) -> torch.Tensor:
    """Generate an image for each prompt.

    Image i starts from the noise of (seed, i), for every batch size.

    Returns:
        The images, (n, 3, side, side) in [0, 1].
    """
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
def reconstruct(pipe: DiffusionPipeline, images: torch.Tensor) -> torch.Tensor:
    """Encode images in [0, 1] with the VAE and decode them again."""
    video = isinstance(pipe.vae, AutoencoderKLWan)
    x = images * 2 - 1
    encoded = pipe.vae.encode(x[:, :, None] if video else x)
    decoded = pipe.vae.decode(encoded.latent if "latent" in encoded else encoded.latent_dist.mode()).sample
    return ((decoded[:, :, 0] if video else decoded) / 2 + 0.5).clamp(0, 1)


def accuracy(images: torch.Tensor, truths: list[dict[str, str]]) -> dict[str, float]:
    """Return the share of images in which the verifier reads each attribute right, and shape, fill and background jointly."""
    found = verifier.read(images)
    shares = {}
    for attribute in dict.fromkeys(k for truth in truths for k in truth):
        right = [read[attribute] == truth[attribute] for read, truth in zip(found, truths) if attribute in truth]
        shares[attribute] = sum(right) / len(right)
    jointly = ("shape", "fill", "background")
    right = [all(read[k] == truth[k] for k in jointly) for read, truth in zip(found, truths)]
    shares["shape, fill, background"] = sum(right) / len(truths)
    return shares


def measure(pipe: DiffusionPipeline, prompts: int) -> dict[str, dict[str, float]]:
    """Measure gates 1 to 3: for each gate, the shares of `accuracy`."""
    rng = random.Random(2024)
    pixels = world_of(pipe).pixels
    rendered = [scenes.random_scene(rng, list(scenes.BUNDLES)) for _ in range(RENDERS)]
    truths = [scene.attributes() for scene in rendered]
    images = torch.stack([scenes.render(scene, pixels) for scene in rendered])
    held = [scenes.random_scene(rng, scenes.HELD_BUNDLES) for _ in range(prompts)]
    reconstructions = torch.cat([reconstruct(pipe, part) for part in images.split(100)])
    generated = generate(pipe, [scene.caption() for scene in held])
    return {
        "renders": accuracy(images, truths),
        "reconstructions": accuracy(reconstructions, truths),
        "prompts": accuracy(generated, [scene.attributes() for scene in held]),
    }


def encoders_of(pipe: DiffusionPipeline) -> dict[str, tuple[Any, torch.nn.Module]]:
    """Return each text encoder with its tokenizer, as (tokenizer, encoder) by component."""
    encoders = {}
    for name in pipe.components:
        if name.startswith("text_encoder"):
            encoders[name] = (getattr(pipe, name.replace("text_encoder", "tokenizer")), getattr(pipe, name))
    return encoders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="sdxl", help=f"{', '.join(WORLDS)} or a folder (default: sdxl)")
    parser.add_argument("--prompts", type=int, default=512, help="number of prompts for gate 3 (default: 512)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = open_world(args.world)
    world = world_of(pipe)
    print("Gate 1, renders: every attribute >= .99. Gate 2, reconstructions: every attribute >= .98.")
    print(f"Gate 3, {args.prompts} captions of held-out bundles, {world.steps} steps, guidance {world.guidance}:")
    print(f"shape, fill and background each >= .95, jointly >= {world.jointly}.")
    for gate, shares in measure(pipe, args.prompts).items():
        print(f"{gate}: " + "  ".join(f"{k} {v:.3f}" for k, v in shares.items()))
    for name, (tokenizer, encoder) in encoders_of(pipe).items():
        counts = coverage(tokenizer, world.quoted)
        rarest = min(counts, key=lambda token: counts[token])
        print(f"Gate 5, {name}: captions of pretraining meet all of {len(counts)} reachable rows.")
        print(f"rows met: {sum(map(bool, counts.values()))}, the rarest one, {rarest!r}, {counts[rarest]} times")
        norms = encoder.get_input_embeddings().weight.norm(dim=-1)
        figures = {"mean": norms.mean(), "std": norms.std(), "min": norms.min(), "max": norms.max()}
        print(f"norms of {name}, {len(norms)} rows: " + "  ".join(f"{k} {v:.3f}" for k, v in figures.items()))


if __name__ == "__main__":
    main()
