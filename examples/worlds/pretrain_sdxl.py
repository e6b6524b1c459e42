"""Pretrain the SDXL world on one core: `python pretrain_sdxl.py vae|text|unet|export --work DIR`, in that order.

Every stage writes checkpoints into DIR and goes on from the newest; `text` and `vae` may run side by side.
"""

import argparse
import json
import math
import random
import shutil
import time
from pathlib import Path

import scenes
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PIXELS = 32
TEXT_LENGTH = 32
LATENT_STD = 0.05  # of the VAE's posterior: fixed, instead of a KL term


# --------------------------------------------------------------------------------------------------------- the models
def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=8, sample_size=PIXELS, block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1,
        norm_num_groups=1, mid_block_add_attention=False, force_upcast=False,
    )  # fmt: skip


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's own layout (bytes, bytes with </w>, merges, start and end last) with every word of the world one token."""
    if not (folder / "vocab.json").exists():  # once for all stages: the trainer breaks ties at random
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        # trained until nothing is left to merge: then each word it has seen is one piece
        bpe.train_from_iterator(
            world_words(), trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False)
        )
        merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
        vocab: dict[str, int] = {}
        for piece in ["!", *alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)]:
            vocab.setdefault(piece, len(vocab))
        vocab["<|startoftext|>"] = len(vocab)
        vocab["<|endoftext|>"] = len(vocab)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT_LENGTH)


def world_words() -> list[str]:
    """All words of all captions."""
    rng = random.Random(0)
    texts = [t for t in scenes.OBJECT_TEMPLATES] + list(scenes.NOUNS) + list(scenes.COLORS) + ["object"]
    for _ in range(20_000):
        texts.append(scenes.random_caption(scenes.random_scene(rng, list(scenes.BUNDLES)), rng)[0])
    return sorted({w for t in texts for w in t.replace("{}", "").split()})


def build_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    def config(width: int, act: str) -> CLIPTextConfig:
        # eos_token_id 2 as in the real SDXL: transformers then pools at the highest id
        return CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_attention_heads=4,
            num_hidden_layers=3, max_position_embeddings=TEXT_LENGTH, hidden_act=act, projection_dim=width,
            bos_token_id=0, eos_token_id=2, pad_token_id=1,
        )  # fmt: skip

    return CLIPTextModel(config(96, "quick_gelu")), CLIPTextModelWithProjection(config(128, "gelu"))


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=PIXELS // 4, in_channels=8, out_channels=8, block_out_channels=(48, 84), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(4, 4), transformer_layers_per_block=(1, 1), use_linear_projection=True, norm_num_groups=4,
        cross_attention_dim=96 + 128, addition_embed_type="text_time", addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + 128,
    )  # fmt: skip


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the stages
class Stage:
    """A training loop's checkpoints, clock and log."""

    def __init__(self, work: Path, name: str, models: dict, optimizer, schedule, ema: dict | None = None):
        self.file, self.log = work / f"{name}.pt", work / f"{name}.log"
        self.parts = {**models, "optimizer": optimizer, "schedule": schedule, **(ema or {})}
        self.step, self.start = 0, time.time()
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


def batch_of(rng: random.Random, size: int) -> tuple[torch.Tensor, list[scenes.Scene]]:
    batch = [scenes.random_scene(rng) for _ in range(size)]
    return torch.stack([scenes.draw(s, PIXELS) for s in batch]) * 2 - 1, batch


def train_vae(work: Path, steps: int = 3500) -> None:
    torch.manual_seed(0)
    vae = build_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    stage = Stage(work, "vae", {"vae": vae}, optimizer, schedule)
    rng = random.Random(stage.step)
    while stage.step < steps:
        x, _ = batch_of(rng, 16)
        z = vae.encode(x).latent_dist.mean
        y = vae.decode(z + LATENT_STD * torch.randn_like(z)).sample
        l1 = F.l1_loss(y, x)
        (l1 + F.mse_loss(y, x) + 1e-3 * z.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        stage.tick(100, steps, l1=round(l1.item(), 4), std=round(z.std().item(), 3))


def renormalize(embedding: torch.nn.Embedding, norms: torch.Tensor) -> None:
    """Put the rows back to CLIP-like norms; DTI's scale is a statistic of them."""
    with torch.no_grad():
        embedding.weight.mul_(norms / embedding.weight.norm(dim=-1, keepdim=True).clamp_min(1e-6))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt").input_ids


def train_text(work: Path, steps: int = 1500) -> None:
    """Both encoders, alone, with heads that read the named attributes; the heads are thrown away."""
    torch.manual_seed(1)
    tokenizer = build_tokenizer(work / "tokenizer")
    encoders = build_text_encoders(tokenizer)
    norms = [mean + std * torch.randn(len(tokenizer), 1) for mean, std in ((0.39, 0.02), (0.45, 0.02))]
    choices = {
        "shape": scenes.SHAPES, "fill": scenes.FILLS, "border": scenes.TRIMS, "dot": scenes.TRIMS, "size": tuple(scenes.SIZES),
        "place": tuple(scenes.PLACES), "background": scenes.BACKGROUNDS, "pattern": scenes.PATTERNS,
    }  # fmt: skip
    widths = [e.config.hidden_size for e in encoders]
    # Read from the subject's own position too, through attention pooling: the denoiser looks at tokens, not at one vector
    outputs = sum(len(c) + 1 for c in choices.values())
    heads = torch.nn.ModuleList(
        [torch.nn.ModuleList([torch.nn.Linear(w, w), torch.nn.Linear(w, outputs), torch.nn.Linear(w, outputs)]) for w in widths]
    )
    parameters = [*heads.parameters(), *(p for e in encoders for p in e.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    trained = {"text_encoder": encoders[0], "text_encoder_2": encoders[1], "heads": heads}
    stage = Stage(work, "text", trained, optimizer, schedule)
    rng = random.Random(stage.step)
    for e, n in zip(encoders, norms):
        renormalize(e.get_input_embeddings(), n)
    while stage.step < steps:
        pairs = [scenes.random_caption(scenes.random_scene(rng), rng, rng.choice((1.0, 0.8, 0.5))) for _ in range(64)]
        ids = tokenize(tokenizer, [c for c, _ in pairs])
        loss, right, total = 0.0, 0, 0
        for encoder, (query, token_head, pooled_head) in zip(encoders, heads):
            out = encoder(ids, output_hidden_states=True)
            states = out.hidden_states[-2]
            pooled = out[0] if encoder is encoders[1] else out.pooler_output
            weights = (query(pooled)[:, None] * states).sum(-1).softmax(-1)
            for logits in (token_head((weights[..., None] * states).sum(1)), pooled_head(pooled)):
                at = 0
                for name, values in choices.items():
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
        for e, n in zip(encoders, norms):
            renormalize(e.get_input_embeddings(), n)
        stage.tick(100, steps, loss=round(loss.item(), 4), right=round(right / total, 4))


@torch.no_grad()
def encode(encoders, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out_1, out_2 = (e(ids, output_hidden_states=True) for e in encoders)
    return torch.cat([out_1.hidden_states[-2], out_2.hidden_states[-2]], -1), out_2[0]


def load_frozen(work: Path):
    tokenizer = build_tokenizer(work / "tokenizer")
    encoders = build_text_encoders(tokenizer)
    saved = torch.load(work / "text.pt", weights_only=True)
    encoders[0].load_state_dict(saved["text_encoder"])
    encoders[1].load_state_dict(saved["text_encoder_2"])
    vae = build_vae()
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["vae"])
    with torch.no_grad():  # the posterior's spread is what the decoder was trained with
        half = vae.quant_conv.weight.shape[0] // 2
        vae.quant_conv.weight[half:].zero_()
        vae.quant_conv.bias[half:].fill_(2 * math.log(LATENT_STD))
    for model in (vae, *encoders):
        model.eval().requires_grad_(False)
    z = vae.encode(batch_of(random.Random(5), 256)[0]).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4))
    return tokenizer, encoders, vae


def train_unet(work: Path, steps: int, batch: int = 64) -> None:
    torch.manual_seed(2)
    tokenizer, encoders, vae = load_frozen(work)
    unet = build_unet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1.5e-3, weight_decay=0.01)
    warm, decay = 200, 0.35  # the last third of the steps decays the rate to nothing

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warm, max(0.0, (steps - step) / (steps * decay)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    ema = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    stage = Stage(work, "unet", {"unet": unet}, optimizer, schedule, {"ema": ema})
    torch.manual_seed(stage.step + 3)
    rng = random.Random(stage.step)
    alphas = build_scheduler().alphas_cumprod
    losses: list[float] = []
    latents: dict[scenes.Scene, torch.Tensor] = {}
    while stage.step < steps:
        drawn = [scenes.random_scene(rng) for _ in range(batch)]
        # captions in full first; from a third of the way on, half of them name a random part
        whole = stage.step < steps / 3
        captions = [scenes.random_caption(s, rng, 1.0 if whole or rng.random() < 0.5 else 0.6)[0] for s in drawn]
        context, pooled = encode(encoders, tokenize(tokenizer, captions))
        empty = torch.rand(batch) < 0.1  # as SDXL's force_zeros_for_empty_prompt has it
        context[empty], pooled[empty] = 0, 0
        if new := [s for s in drawn if s not in latents]:
            with torch.no_grad():
                pixels = torch.stack([scenes.draw(s, PIXELS) for s in new]) * 2 - 1
                latents.update(zip(new, vae.encode(pixels).latent_dist.mean))
        z = torch.stack([latents[s] for s in drawn])
        z = (z + LATENT_STD * torch.randn_like(z)) * vae.config.scaling_factor
        t = (1000 * (1 - torch.rand(batch) ** 1.7)).long().clamp(0, 999)
        a, s = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        noise = torch.randn_like(z)
        sizes = torch.tensor([rng.choice((32, 32, 64, 128, 256, 512)) for _ in range(batch)])[:, None].expand(-1, 2)
        crops = torch.tensor([[rng.choice((0, 0, 0, rng.randrange(16))) for _ in "yx"] for _ in range(batch)])
        added = {"text_embeds": pooled, "time_ids": torch.cat([sizes, crops, torch.full((batch, 2), PIXELS)], 1).float()}
        noisy = (a * z + s * noise).to(memory_format=torch.channels_last)
        loss = F.mse_loss(unet(noisy, t, context, added_cond_kwargs=added).sample, a * noise - s * z)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.update_parameters(unet)
        losses = [*losses[-199:], loss.item()]
        stage.tick(200, steps, loss=round(sum(losses) / len(losses), 4))


def assemble(work: Path) -> StableDiffusionXLPipeline:
    tokenizer, encoders, vae = load_frozen(work)
    unet = build_unet()
    saved = torch.load(work / "unet.pt", weights_only=True)["ema"]
    unet.load_state_dict({k.removeprefix("module."): v for k, v in saved.items() if k.startswith("module.")})
    return StableDiffusionXLPipeline(
        vae=vae, text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=tokenizer,
        tokenizer_2=build_tokenizer(work / "tokenizer"), unet=unet.eval(), scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip


def export(work: Path, folder: Path) -> None:
    """Write the pipeline's folder so that transformers 4 and 5 both read it."""
    assemble(work).to(torch.float16).save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):  # transformers 5 leaves out what the slow tokenizers of 4 read
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(work / "tokenizer" / file, folder / name)
    encoder = folder / "text_encoder" / "model.safetensors"  # and the names' prefix, which both know
    tensors = {"text_model." + k.removeprefix("text_model."): v for k, v in load_file(encoder).items()}
    save_file(tensors, encoder, metadata={"format": "pt"})
    print(sum(f.stat().st_size for f in folder.rglob("*.safetensors")) / 1e6, "MB of weights in", folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["vae", "text", "unet", "export"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6500, help="of the denoiser")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sdxl")
    args = parser.parse_args()
    torch.set_num_threads(1)  # two threads beside another busy process are many times slower than one
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "export":
        export(args.work, args.out)
    elif args.stage == "unet":
        train_unet(args.work, args.steps)
    else:
        {"vae": train_vae, "text": train_text}[args.stage](args.work)


if __name__ == "__main__":
    main()
