"""The gates of a world: is it a fair place to compare methods in? `python gates.py` prints every figure.

1. the verifier reads renders, 2. it reads the VAE's reconstructions, 3. the world follows prompts of subjects that it has
never seen, 4. a token can learn such a subject (`study.py dev`, which trains).
"""

import argparse
import random
from pathlib import Path

import scenes
import torch
import verifier
from diffusers import DiffusionPipeline

WORLD = Path(__file__).parent / "sdxl"
STEPS, GUIDANCE = 12, 3.0  # of every picture in the world


def open_world(folder: Path = WORLD) -> DiffusionPipeline:
    """The committed half-precision pipeline, in float32."""
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def generate(pipe: DiffusionPipeline, prompts: list[str], seed: int = 0, batch: int = 64) -> torch.Tensor:
    """A picture of each prompt, (n, 3, 32, 32) in [0, 1]; picture i starts from noise (seed, i)."""
    images = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed * 100_003 + start + i) for i in range(len(part))]
        out = pipe(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators, output_type="pt")
        images.append(out.images.float())
    return torch.cat(images)


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
    pictures = torch.stack([scenes.draw(s, pipe.unet.config.sample_size * pipe.vae_scale_factor) for s in drawn])
    with torch.no_grad():
        decoded = [pipe.vae.decode(pipe.vae.encode(x * 2 - 1).latent_dist.mode()).sample for x in pictures.split(100)]
    held = [scenes.random_scene(rng, scenes.HELD_BUNDLES) for _ in range(prompts)]
    return {
        "renders": accuracy(pictures, truths),
        "reconstructions": accuracy((torch.cat(decoded) / 2 + 0.5).clamp(0, 1), truths),
        "prompts": accuracy(generate(pipe, [s.caption() for s in held]), [s.attributes() for s in held]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=Path, default=WORLD)
    parser.add_argument("--prompts", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = open_world(args.world)
    print("Gate 1, renders: all >= .99. Gate 2, reconstructions: all >= .98.")
    print(f"Gate 3, {args.prompts} captions of held-out bundles, {STEPS} steps, guidance {GUIDANCE}:")
    print("shape, fill and background >= .95, jointly >= .90.")
    for gate, shares in measure(pipe, args.prompts).items():
        print(f"{gate}: " + "  ".join(f"{k} {v:.3f}" for k, v in shares.items()))
    for name in ("text_encoder", "text_encoder_2"):
        norms = getattr(pipe, name).get_input_embeddings().weight.norm(dim=-1)
        figures = {"mean": norms.mean(), "std": norms.std(), "min": norms.min(), "max": norms.max()}
        print(f"norms of {name}, {len(norms)} rows: " + "  ".join(f"{k} {v:.3f}" for k, v in figures.items()))


if __name__ == "__main__":
    main()
