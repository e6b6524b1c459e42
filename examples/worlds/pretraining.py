"""The common parts of the pretraining scripts: three training loops and the command line."""

import argparse
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import scenes
import torch
import torch.nn.functional as F
from captions import NOUNS, random_caption, with_quotes
from stage import Stage
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffusers_dti.training.samples import OBJECT_TEMPLATES

POOL = 30_000  # scenes that a denoiser learns from: each is encoded once
LATENT_STD = 0.05  # standard deviation of a VAE's posterior, fixed instead of learned with a KL term
CHOICES = {
    "shape": scenes.SHAPES, "fill": scenes.FILLS, "border": scenes.TRIMS, "dot": scenes.TRIMS, "size": tuple(scenes.SIZES),
    "place": tuple(scenes.PLACES), "background": scenes.BACKGROUNDS, "pattern": scenes.PATTERNS,
    "second_shape": scenes.SECOND_SHAPES, "second_fill": scenes.FILLS,
}  # fmt: skip


def world_words() -> list[str]:
    """Return all words of all captions, sorted."""
    rng = random.Random(0)
    texts = list(OBJECT_TEMPLATES) + list(NOUNS) + list(scenes.COLORS) + ["object"]
    for _ in range(20_000):
        caption, _ = random_caption(scenes.random_scene(rng, list(scenes.BUNDLES)), rng)
        texts.append(caption)
    words: set[str] = set()
    for text in texts:
        words.update(text.replace("{}", "").split())
    return sorted(words)


def batch_of(rng: random.Random, size: int, pixels: int) -> Tensor:
    """Render new images of random scenes, (size, 3, pixels, pixels) in [-1, 1]."""
    return torch.stack([scenes.render(scenes.random_scene(rng), pixels) for _ in range(size)]) * 2 - 1


def train_vae(
    work: Path,
    vae: nn.Module,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    pixels: int,
    steps: int,
    make_batch: Callable[[random.Random, int], Tensor] | None = None,
) -> None:
    """Train a VAE, whose decoder learns to tolerate a noise of LATENT_STD.

    Args:
        work: the folder for checkpoints and logs.
        vae: the VAE.
        encode: images to latents without noise.
        decode: latents to images.
        pixels: the side of the images.
        steps: optimizer steps.
        make_batch: returns the images or clips of a step, given (rng, step). The default is 16 new images.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    stage = Stage(work, "vae", {"vae": vae, "optimizer": optimizer, "schedule": schedule})
    rng = random.Random(stage.step)
    while stage.step < steps:
        x = make_batch(rng, stage.step) if make_batch else batch_of(rng, 16, pixels)
        z = encode(x)
        y = decode(z + LATENT_STD * torch.randn_like(z))
        l1 = F.l1_loss(y, x)
        (l1 + F.mse_loss(y, x) + 1e-3 * z.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        stage.tick(100, steps, l1=round(l1.item(), 4), std=round(z.std().item(), 3))


def renormalize(embedding: nn.Embedding, norms: Tensor) -> None:
    """Rescale the rows to realistic norms, (rows, 1), because DTI's scale is a statistic of them."""
    with torch.no_grad():
        embedding.weight.mul_(norms / embedding.weight.norm(dim=-1, keepdim=True).clamp_min(1e-6))


def split_logits(logits: Tensor, named: list[dict[str, str]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits and the true classes of each attribute. The last class means "not named"."""
    start = 0
    for name, values in CHOICES.items():
        stop = start + len(values) + 1
        classes = [values.index(attributes[name]) if name in attributes else len(values) for attributes in named]
        yield logits[:, start:stop], torch.tensor(classes)
        start = stop


def text_batch(rng: random.Random, quoted: str) -> tuple[list[str], list[dict[str, str]]]:
    """Return 64 captions for the text encoders, and the attributes that each one names."""
    captions, named = [], []
    for _ in range(64):
        caption, attributes = random_caption(scenes.random_scene(rng), rng, rng.choice((1.0, 0.8, 0.5)))
        captions.append(with_quotes(caption, rng, quoted))
        named.append(attributes)
    return captions, named


def train_text(
    work: Path,
    encoders: Mapping[str, PreTrainedModel],
    norms: Sequence[Tensor],
    read: Callable[[list[str]], list[tuple[Tensor, Tensor]]],
    steps: int,
    quoted: str = "{}",
    learning_rate: float = 1e-3,
) -> None:
    """Train the text encoders with heads that read the named attributes. The heads are discarded afterwards.

    Args:
        work: the folder for checkpoints and logs.
        encoders: the text encoders, by component.
        norms: the norms of each encoder's rows, (rows, 1).
        read: returns for captions each encoder's states, (n, length, d) with zeros at padding, and a summary, (n, d).
        steps: optimizer steps.
        quoted: a word in quotation marks, see `with_quotes`.
        learning_rate: the highest learning rate.
    """
    widths = [e.config.hidden_size for e in encoders.values()]
    # Read from single tokens too, through attention pooling: the denoiser attends to tokens, not to one vector.
    outputs = sum(len(c) + 1 for c in CHOICES.values())
    heads = nn.ModuleList()
    for w in widths:
        heads.append(nn.ModuleList([nn.Linear(w, w), nn.Linear(w, outputs), nn.Linear(w, outputs)]))
    parameters = list(heads.parameters())
    for encoder in encoders.values():
        parameters += encoder.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    stage = Stage(work, "text", {**encoders, "heads": heads, "optimizer": optimizer, "schedule": schedule})
    rng = random.Random(stage.step)
    tables = [e.get_input_embeddings() for e in encoders.values()]
    for table, n in zip(tables, norms):
        renormalize(table, n)
    while stage.step < steps:
        captions, named = text_batch(rng, quoted)
        loss, right, total = torch.zeros(()), 0, 0
        for (states, pooled), (query, token_head, pooled_head) in zip(read(captions), heads):
            weights = (query(pooled)[:, None] * states).sum(-1).softmax(-1)
            for logits in (token_head((weights[..., None] * states).sum(1)), pooled_head(pooled)):
                for part, truth in split_logits(logits, named):
                    loss = loss + F.cross_entropy(part, truth)
                    right += int((part.argmax(-1) == truth).sum())
                    total += len(truth)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        for table, n in zip(tables, norms):
            renormalize(table, n)
        stage.tick(100, steps, loss=round(loss.item(), 4), right=round(right / total, 4))


class Latents:
    """The latents of scenes, each encoded once.

    Args:
        encode: images in [-1, 1] to latents.
        pixels: the side of the images.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], pixels: int) -> None:
        self.encode, self.pixels = encode, pixels
        self.cache: dict[scenes.Scene, Tensor] = {}

    @torch.no_grad()
    def __call__(self, batch: Sequence[scenes.Scene]) -> Tensor:
        new = [scene for scene in batch if scene not in self.cache]
        if new:
            images = torch.stack([scenes.render(scene, self.pixels) for scene in new])
            self.cache.update(zip(new, self.encode(images * 2 - 1)))
        return torch.stack([self.cache[scene] for scene in batch])


def train_denoiser(
    work: Path,
    name: str,
    model: nn.Module,
    loss_of: Callable[[list[scenes.Scene], list[str], random.Random, float], Tensor],
    steps: int,
    batch: int = 64,
    learning_rate: float = 1.5e-3,
    quoted: str = "{}",
) -> None:
    """Train a denoiser and a running average of its weights. The learning rate decays in the last 35 % of the steps.

    Args:
        work: the folder for checkpoints and logs.
        name: the denoiser's component.
        model: the denoiser.
        loss_of: returns the loss of a batch, given (scenes, captions, rng, progress), where progress goes from 0 to 1.
        steps: optimizer steps.
        batch: scenes per step.
        learning_rate: the highest learning rate.
        quoted: a word in quotation marks, see `with_quotes`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    warm, decay = 200, 0.35

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warm, max(0.0, (steps - step) / (steps * decay)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    stage = Stage(work, name, {name: model, "optimizer": optimizer, "schedule": schedule, "ema": ema})
    torch.manual_seed(stage.step + 3)
    rng = random.Random(stage.step)
    pool = [scenes.random_scene(random.Random(i)) for i in range(POOL)]
    losses: list[float] = []
    while stage.step < steps:
        chosen = rng.choices(pool, k=batch)
        # Captions are complete at first. After a third of the steps, half of them name random attributes only.
        whole = stage.step < steps / 3
        captions = [random_caption(s, rng, 1.0 if whole or rng.random() < 0.5 else 0.6)[0] for s in chosen]
        captions = [with_quotes(caption, rng, quoted) for caption in captions]
        loss = loss_of(chosen, captions, rng, stage.step / steps)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.update_parameters(model)
        losses = [*losses[-199:], loss.item()]
        stage.tick(200, steps, loss=round(sum(losses) / len(losses), 4))


def averaged(work: Path, name: str) -> dict[str, Tensor]:
    """Read the averaged weights of `train_denoiser`."""
    saved = torch.load(work / f"{name}.pt", weights_only=True)["ema"]
    return {k.removeprefix("module."): v for k, v in saved.items() if k.startswith("module.")}


def main(
    description: str, out: Path, stages: Mapping[str, Callable[[Path], None]], export: Callable[[Path, Path], None]
) -> None:  # fmt: skip
    """Run a pretraining script: `python pretrain_*.py STAGE --work DIR`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("stage", choices=[*stages, "export"], help="the stage to run")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--out", type=Path, default=out, help="folder for the exported pipeline")
    args = parser.parse_args()
    torch.set_num_threads(1)  # if another process is busy, two threads are many times slower than one
    torch.set_flush_denormal(True)  # a saturated softmax is full of them, and each is slow
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "export":
        export(args.work, args.out)
        print(sum(f.stat().st_size for f in args.out.rglob("*.safetensors")) / 1e6, "MB of weights in", args.out)
    else:
        stages[args.stage](args.work)
