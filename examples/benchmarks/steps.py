"""Compare a training step with its floor: `python examples/benchmarks/steps.py`.

The floor is what any trainer of a word must compute, written out below with nothing around it: the text encoders on the real
tokens, with one row put in; the denoiser, forward and backward; noise, timesteps and the loss; one step of the optimizer. The
old floor leaves out the last two. Steps of the trainer and both floors alternate strictly, in one process, each in a pipeline
of its own. That they do the same work is checked by counting floating-point operations. The pipelines are small and random,
with vocabularies of real size.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from pipelines import RESOLUTION, build
from torch import Tensor
from torch.nn.functional import mse_loss, normalize, pad
from torch.utils.flop_counter import FlopCounterMode

from diffusers_dti import DTITrainer

PROMPT, TOKEN = "a photo of a {}", "<dog>"
FAMILIES = ("sdxl", "sana", "wan")


class Floor:
    """A training step with nothing around it.

    Args:
        pipe: a pipeline of the family, which knows `TOKEN`.
        family: "sdxl", "sana" or "wan".
        latents: the latents of a batch of photos.
    """

    def __init__(self, pipe: DiffusionPipeline, family: str, latents: Tensor):
        self.pipe, self.family, self.latents = pipe, family, latents
        for model in pipe.components.values():
            if isinstance(model, torch.nn.Module):
                model.requires_grad_(False)
        self.rows, self.ids = [], []
        for name in ("", "_2") if family == "sdxl" else ("",):
            tokenizer, encoder = getattr(pipe, f"tokenizer{name}"), getattr(pipe, f"text_encoder{name}")
            padding = {"padding": "max_length"} if family == "sdxl" else {}
            ids = tokenizer([PROMPT.format(TOKEN)] * len(latents), return_tensors="pt", **padding).input_ids
            table, place = encoder.get_input_embeddings(), ids == tokenizer.convert_tokens_to_ids(TOKEN)
            row = normalize(table.weight[:1].clone(), dim=-1).requires_grad_()
            for module in encoder.modules():  # UMT5 has two for one table
                if getattr(module, "weight", None) is table.weight:
                    module.register_forward_hook(
                        lambda module, args, output, place=place, row=row: torch.where(place[..., None], 0.4 * row, output)
                    )
            self.rows.append(row)
            self.ids.append(ids)
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config) if family == "sdxl" else None

    def step(self, old: bool = False) -> None:
        """Take a step; with `old`, only forward and backward, on the latents themselves."""
        count = len(self.latents)
        noise = self.latents if old else torch.randn_like(self.latents)
        steps = torch.full((count,), 500) if old else torch.randint(1000, (count,))
        if self.scheduler is not None:
            noisy, target = self.latents if old else self.scheduler.add_noise(self.latents, noise, steps), noise
        else:
            at = (1 - steps / 1000).view(-1, *[1] * (self.latents.ndim - 1))
            noisy, target = (self.latents, noise) if old else ((1 - at) * self.latents + at * noise, noise - self.latents)
        predicted = self.predict(noisy, steps)
        (predicted.sum() if old else mse_loss(predicted, target)).backward()
        for row in self.rows:
            assert row.grad is not None
            if not old:
                with torch.no_grad():  # Riemannian SGD
                    gradient = row.grad - (row.grad * row).sum(-1, keepdim=True) * row
                    row.copy_(normalize(row - 0.01 * gradient, dim=-1))
            row.grad = None

    def predict(self, noisy: Tensor, steps: Tensor) -> Tensor:
        """Encode the prompt and predict."""
        pipe, (ids, *more) = self.pipe, self.ids
        if self.family == "sdxl":
            one = pipe.text_encoder(ids, output_hidden_states=True)
            two = pipe.text_encoder_2(more[0], output_hidden_states=True)
            side = float(RESOLUTION["sdxl"])
            added = {"text_embeds": two.text_embeds, "time_ids": torch.tensor([[side, side, 0, 0, side, side]] * len(noisy))}
            states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
            return pipe.unet(noisy, steps, states, added_cond_kwargs=added).sample
        mask = torch.ones_like(ids)
        if self.family == "sana":
            states = pipe.text_encoder(ids, mask, use_cache=False).last_hidden_state
            return pipe.transformer(noisy, states, steps.float(), encoder_attention_mask=mask).sample
        states = pipe.text_encoder(ids, mask).last_hidden_state
        return pipe.transformer(noisy, steps.float(), pad(states, (0, 0, 0, 512 - states.shape[1]))).sample


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Return the CPU time and the time of a call, in milliseconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return (time.process_time() - cpu) * 1000, (time.perf_counter() - wall) * 1000


def measure(family: str, batch: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """Return the times of steps: the trainer's, of the floor and of the old floor."""
    torch.manual_seed(0)
    pipe, other = build(family), build(family)
    side = RESOLUTION[family]
    photos = [Image.effect_noise((side, side), 60 + number).convert("RGB") for number in range(4)]
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "floor": [], "old floor": []}
    other.tokenizer.add_tokens(TOKEN)
    if family == "sdxl":
        other.tokenizer_2.add_tokens(TOKEN)
        other.text_encoder_2.resize_token_embeddings(len(other.tokenizer_2), mean_resizing=False)
    if len(other.tokenizer) > len(other.text_encoder.get_input_embeddings().weight):
        other.text_encoder.resize_token_embeddings(len(other.tokenizer), mean_resizing=False)
    state: dict[str, Any] = {}

    def between(trainer: DTITrainer, step: int) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        if step == 1:
            state["floor"] = Floor(other, family, trainer_latents(trainer, photos, batch))
            state["flops"] = FlopCounterMode(display=False).__enter__()
        elif step == 2:  # the second step was counted
            state["flops"].__exit__(None, None, None)
            with FlopCounterMode(display=False) as counted:
                state["floor"].step()
            ours, floor = state["flops"].get_total_flops(), counted.get_total_flops()
            if ours != floor:
                raise RuntimeError(f"{family}: a step of ours takes {ours:,} operations, the floor {floor:,}.")
        elif step > 4:
            times["ours"].append(((cpu - state["cpu"]) * 1000, (wall - state["wall"]) * 1000))
            times["floor"].append(timed(state["floor"].step))
            times["old floor"].append(timed(lambda: state["floor"].step(old=True)))
        state["cpu"], state["wall"] = time.process_time(), time.perf_counter()

    trainer = DTITrainer(
        pipe, placeholder_token=TOKEN, initializer_token="dog", templates=[PROMPT], resolution=side, train_batch_size=batch,
        gradient_accumulation_steps=1, max_train_steps=steps + 4, heldout_loss_steps=0,
        **({"zero_pad": False} if family == "sana" else {}),
    )  # fmt: skip
    trainer.fit(photos, callback_on_step_end=between)
    return times


def trainer_latents(trainer: DTITrainer, photos: list[Image.Image], count: int) -> Tensor:
    """Return latents in the shape of those that the trainer learns from."""
    from diffusers.image_processor import VaeImageProcessor

    pixels = VaeImageProcessor(vae_scale_factor=1).preprocess(photos[0])
    ((mean, _),) = trainer.family.encode_images(pixels)
    return mean.repeat(count, *[1] * (mean.ndim - 1))


def row(name: str, times: dict[str, list[tuple[float, float]]]) -> str:
    """Return a line of the table: medians and quartiles of CPU time, and the ratios of all steps together."""
    cells = [name]
    for values in times.values():
        low, middle, high = statistics.quantiles([cpu for cpu, _ in values], n=4)
        cells.append(f"{middle:.1f} [{low:.1f}, {high:.1f}]")
    for kind in (0, 1):
        ours, floor, old = (statistics.median(value[kind] for value in values) for values in times.values())
        cells.append(f"{ours / floor:.3f} / {ours / old:.3f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="batch sizes (default: 1 4)")
    parser.add_argument("--steps", type=int, default=100, help="steps of each kind (default: 100)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| family, batch | ours, CPU ms | floor | old floor | CPU time, ours / floor / old floor | wall time |")
    print("|---|---|---|---|---|---|")
    for family in args.families:
        for batch in args.batches:
            print(row(f"{family}, {batch}", measure(family, batch, args.steps)), flush=True)


if __name__ == "__main__":
    main()
