"""What the worlds' pretraining scripts share: the three training loops, their checkpoints, and the command line."""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import scenes
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_STD = 0.05  # of a VAE's posterior: fixed, instead of a KL term
CHOICES = {
    "shape": scenes.SHAPES, "fill": scenes.FILLS, "border": scenes.TRIMS, "dot": scenes.TRIMS, "size": tuple(scenes.SIZES),
    "place": tuple(scenes.PLACES), "background": scenes.BACKGROUNDS, "pattern": scenes.PATTERNS,
}  # fmt: skip


class Stage:
    """A training loop's checkpoints, clock and log. Every stage goes on from its newest checkpoint."""

    def __init__(self, work: Path, name: str, parts: dict[str, Any]):
        self.file, self.log = work / f"{name}.pt", work / f"{name}.log"
        self.parts, self.step, self.start = parts, 0, time.time()
        if self.file.exists():
            saved = torch.load(self.file, weights_only=True)
            self.step = saved.pop("step")
            for key, value in saved.items():
                self.parts[key].load_state_dict(value)

    def tick(self, every: int, steps: int, **figures: float) -> None:
        self.step += 1
        if self.step % every == 0 or self.step == steps:
            line = {"step": self.step, "seconds": round(time.time() - self.start), **figures}
            with self.log.open("a") as f:
                f.write(json.dumps(line) + "\n")
            temporary = self.file.with_suffix(".tmp")
            torch.save({"step": self.step} | {k: v.state_dict() for k, v in self.parts.items()}, temporary)
            temporary.replace(self.file)


def world_words() -> list[str]:
    """All words of all captions."""
    rng = random.Random(0)
    texts = [t for t in scenes.OBJECT_TEMPLATES] + list(scenes.NOUNS) + list(scenes.COLORS) + ["object"]
    for _ in range(20_000):
        texts.append(scenes.random_caption(scenes.random_scene(rng, list(scenes.BUNDLES)), rng)[0])
    return sorted({w for t in texts for w in t.replace("{}", "").split()})


def batch_of(rng: random.Random, size: int, pixels: int) -> Tensor:
    """Fresh pictures, (size, 3, pixels, pixels) in [-1, 1]."""
    return torch.stack([scenes.draw(scenes.random_scene(rng), pixels) for _ in range(size)]) * 2 - 1


def train_vae(
    work: Path,
    vae: nn.Module,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    pixels: int,
    steps: int,
    draw: Callable[[random.Random, int], Tensor] | None = None,
) -> None:
    """`encode` gives latents without noise, `decode` pictures; the decoder learns to bear a noise of LATENT_STD.

    `draw(rng, step)` gives a step's pictures or clips; 16 fresh pictures if left out.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    stage = Stage(work, "vae", {"vae": vae, "optimizer": optimizer, "schedule": schedule})
    rng = random.Random(stage.step)
    while stage.step < steps:
        x = draw(rng, stage.step) if draw else batch_of(rng, 16, pixels)
        z = encode(x)
        y = decode(z + LATENT_STD * torch.randn_like(z))
        l1 = F.l1_loss(y, x)
        (l1 + F.mse_loss(y, x) + 1e-3 * z.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        stage.tick(100, steps, l1=round(l1.item(), 4), std=round(z.std().item(), 3))


def renormalize(embedding: nn.Embedding, norms: Tensor) -> None:
    """Put the rows back to realistic norms, (rows, 1); DTI's scale is a statistic of them."""
    with torch.no_grad():
        embedding.weight.mul_(norms / embedding.weight.norm(dim=-1, keepdim=True).clamp_min(1e-6))


def train_text(
    work: Path,
    encoders: dict[str, nn.Module],
    norms: Sequence[Tensor],
    read: Callable[[list[str]], list[tuple[Tensor, Tensor]]],
    steps: int,
) -> None:
    """Encoders, alone, with heads that read the named attributes; the heads are thrown away.

    `read` gives, for captions, each encoder's states, (n, length, d) with padding's zeroed, and a summary, (n, d).
    """
    widths = [e.config.hidden_size for e in encoders.values()]
    # Read from the subject's own position too, through attention pooling: the denoiser looks at tokens, not at one vector
    outputs = sum(len(c) + 1 for c in CHOICES.values())
    heads = nn.ModuleList(
        [nn.ModuleList([nn.Linear(w, w), nn.Linear(w, outputs), nn.Linear(w, outputs)]) for w in widths]
    )  # fmt: skip
    parameters = [*heads.parameters(), *(p for e in encoders.values() for p in e.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    stage = Stage(work, "text", {**encoders, "heads": heads, "optimizer": optimizer, "schedule": schedule})
    rng = random.Random(stage.step)
    tables = [e.get_input_embeddings() for e in encoders.values()]
    for table, n in zip(tables, norms):
        renormalize(table, n)
    while stage.step < steps:
        pairs = [scenes.random_caption(scenes.random_scene(rng), rng, rng.choice((1.0, 0.8, 0.5))) for _ in range(64)]
        loss, right, total = 0.0, 0, 0
        for (states, pooled), (query, token_head, pooled_head) in zip(read([c for c, _ in pairs]), heads):
            weights = (query(pooled)[:, None] * states).sum(-1).softmax(-1)
            for logits in (token_head((weights[..., None] * states).sum(1)), pooled_head(pooled)):
                at = 0
                for name, values in CHOICES.items():
                    # the last class means "not named"
                    truth = torch.tensor([values.index(n[name]) if name in n else len(values) for _, n in pairs])
                    part = logits[:, at : at + len(values) + 1]
                    at += len(values) + 1
                    loss = loss + F.cross_entropy(part, truth)
                    right += (part.argmax(-1) == truth).sum().item()
                    total += len(truth)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        for table, n in zip(tables, norms):
            renormalize(table, n)
        stage.tick(100, steps, loss=round(loss.item(), 4), right=round(right / total, 4))


class Latents:
    """A scene's latents, encoded once: `encode` takes pictures in [-1, 1]."""

    def __init__(self, encode: Callable[[Tensor], Tensor], pixels: int):
        self.encode, self.pixels, self.cache = encode, pixels, {}

    @torch.no_grad()
    def __call__(self, drawn: Sequence[scenes.Scene]) -> Tensor:
        if new := [s for s in drawn if s not in self.cache]:
            self.cache.update(zip(new, self.encode(torch.stack([scenes.draw(s, self.pixels) for s in new]) * 2 - 1)))
        return torch.stack([self.cache[s] for s in drawn])


def train_denoiser(
    work: Path,
    name: str,
    model: nn.Module,
    loss_of: Callable[[list[scenes.Scene], list[str], random.Random, float], Tensor],
    steps: int,
    batch: int = 64,
    learning_rate: float = 1.5e-3,
) -> None:
    """`loss_of(scenes, captions, rng, progress)`, progress going from 0 to 1. The last third of the steps decays the rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    warm, decay = 200, 0.35

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warm, max(0.0, (steps - step) / (steps * decay)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    stage = Stage(work, name, {name: model, "optimizer": optimizer, "schedule": schedule, "ema": ema})
    torch.manual_seed(stage.step + 3)
    rng = random.Random(stage.step)
    losses: list[float] = []
    while stage.step < steps:
        drawn = [scenes.random_scene(rng) for _ in range(batch)]
        # captions in full first; from a third of the way on, half of them name a random part
        whole = stage.step < steps / 3
        captions = [scenes.random_caption(s, rng, 1.0 if whole or rng.random() < 0.5 else 0.6)[0] for s in drawn]
        loss = loss_of(drawn, captions, rng, stage.step / steps)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.update_parameters(model)
        losses = [*losses[-199:], loss.item()]
        stage.tick(200, steps, loss=round(sum(losses) / len(losses), 4))


def averaged(work: Path, name: str) -> dict[str, Tensor]:
    """The averaged weights that `train_denoiser` has come to."""
    saved = torch.load(work / f"{name}.pt", weights_only=True)["ema"]
    return {k.removeprefix("module."): v for k, v in saved.items() if k.startswith("module.")}


def main(
    description: str, out: Path, stages: dict[str, Callable[[Path], None]], export: Callable[[Path, Path], None]
) -> None:  # fmt: skip
    """`python pretrain_*.py STAGE --work DIR`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("stage", choices=[*stages, "export"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    torch.set_num_threads(1)  # two threads beside another busy process are many times slower than one
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "export":
        export(args.work, args.out)
        print(sum(f.stat().st_size for f in args.out.rglob("*.safetensors")) / 1e6, "MB of weights in", args.out)
    else:
        stages[args.stage](args.work)
