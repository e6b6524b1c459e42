"""Compare a training step with its floor: `python examples/benchmarks/steps.py`.

The floor is what any trainer of a word must compute, written out below with nothing around it: the text encoders on the real
tokens, with one row put in; the denoiser, forward and backward; noise, timesteps and the loss; one step of the optimizer. The
old floor leaves out the last two. Steps of the trainer and both floors alternate strictly, in one process, each in a pipeline
of its own. That they do the same work is checked by counting floating-point operations. The pipelines are small and random,
with vocabularies of real size.

`--profile` shows instead what a step's time goes to: its parts, and torch's operators.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from pipelines import FAMILIES, FULL, FULL_RESOLUTION, RESOLUTION, SMALL, Configs, build
from torch import Tensor
from torch.nn.functional import mse_loss, normalize, pad
from torch.utils.flop_counter import FlopCounterMode

from diffusers_dti import DTITrainer
from diffusers_dti.training.samples import TrainingSamples
from diffusers_dti.training.step import Stepper

PROMPT, TOKEN = "a photo of a {}", "<dog>"
SKIPPED = 4  # steps at the beginning that are not measured: counted, or slow because they are the first


class Case(NamedTuple):
    """What is measured: a family, the size of its models, and the batches of a step."""

    family: str
    batch: int = 1
    accumulation: int = 1
    configs: Configs = SMALL
    device: str = "cpu"

    @property
    def resolution(self) -> int:
        """The side of the crops, in pixels."""
        return (RESOLUTION if self.configs is SMALL else FULL_RESOLUTION)[self.family]

    def build(self) -> DiffusionPipeline:
        """Build a pipeline: small ones in float32, full ones in bfloat16."""
        return build(self.family, self.configs, self.device, torch.float32 if self.configs is SMALL else torch.bfloat16)

    def trainer(self, pipe: DiffusionPipeline, **settings: Any) -> DTITrainer:
        """Make a trainer that does nothing but take steps."""
        defaults = {
            "placeholder_token": TOKEN, "initializer_token": "dog", "templates": [PROMPT], "resolution": self.resolution,
            "train_batch_size": self.batch, "gradient_accumulation_steps": self.accumulation, "heldout_loss_steps": 0,
        } | ({"zero_pad": False} if self.family == "sana" else {})  # fmt: skip
        return DTITrainer(pipe, **defaults | settings)

    def photos(self, count: int = 4) -> list[Image.Image]:
        """Make photos of noise."""
        return [Image.effect_noise((self.resolution, self.resolution), 60 + number).convert("RGB") for number in range(count)]

    def clock(self) -> tuple[float, float]:
        """Return the CPU time and the time in milliseconds, when the device has done all it was asked to."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.process_time() * 1000, time.perf_counter() * 1000

    def timed(self, function: Callable[[], object]) -> tuple[float, float]:
        """Return the CPU time and the time of a call, in milliseconds."""
        began = self.clock()
        function()
        return since(began, self.clock())


FULL_CASES = (
    Case("sdxl", 4, 1, FULL, "cuda"),
    Case("sana", 2, 2, FULL, "cuda"),
    Case("wan", 2, 2, FULL, "cuda"),
)  # the authors' settings


class Floor:
    """A training step with nothing around it.

    Args:
        case: what is measured.
        pipe: a pipeline of its own, which knows `TOKEN`.
        latents: the latents of a batch of photos.
    """

    def __init__(self, case: Case, pipe: DiffusionPipeline, latents: Tensor):
        self.case, self.pipe, self.latents = case, pipe, latents.to(case.device)
        for model in pipe.components.values():
            if isinstance(model, torch.nn.Module):
                model.requires_grad_(False)
        self.rows, self.ids = [], []
        for name in ("", "_2") if case.family == "sdxl" else ("",):
            tokenizer, encoder = getattr(pipe, f"tokenizer{name}"), getattr(pipe, f"text_encoder{name}")
            padding = {"padding": "max_length"} if case.family == "sdxl" else {}
            ids = tokenizer([PROMPT.format(TOKEN)] * len(latents), return_tensors="pt", **padding).input_ids.to(case.device)
            table, place = encoder.get_input_embeddings(), ids == tokenizer.convert_tokens_to_ids(TOKEN)
            row = normalize(table.weight[:1].float(), dim=-1).requires_grad_()
            for module in encoder.modules():  # UMT5 has two for one table
                if getattr(module, "weight", None) is table.weight:
                    module.register_forward_hook(
                        lambda module, args, output, place=place, row=row: torch.where(
                            place[..., None], (0.4 * row).to(output.dtype), output
                        )
                    )
            self.rows.append(row)
            self.ids.append(ids)
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config) if case.family == "sdxl" else None

    def step(self, old: bool = False) -> None:
        """Take a step; with `old`, only forward and backward, on the latents themselves."""
        for _ in range(self.case.accumulation):
            self.accumulate(old)
        for row in self.rows:
            assert row.grad is not None
            if not old:
                with torch.no_grad():  # Riemannian SGD
                    gradient = row.grad - (row.grad * row).sum(-1, keepdim=True) * row
                    row.copy_(normalize(row - 0.01 * gradient, dim=-1))
            row.grad = None

    def accumulate(self, old: bool) -> None:
        """Compute the gradients of a batch."""
        count, device = len(self.latents), self.case.device
        noise = self.latents if old else torch.randn_like(self.latents)
        steps = torch.full((count,), 500, device=device) if old else torch.randint(1000, (count,), device=device)
        if self.scheduler is not None:
            noisy, target = self.latents if old else self.scheduler.add_noise(self.latents, noise, steps), noise
        else:
            at = (1 - steps / 1000).view(-1, *[1] * (self.latents.ndim - 1))
            noisy, target = (self.latents, noise) if old else ((1 - at) * self.latents + at * noise, noise - self.latents)
        predicted = self.predict(noisy.to(self.pipe.vae.dtype), steps).float()
        (predicted.sum() if old else mse_loss(predicted, target)).backward()

    def predict(self, noisy: Tensor, steps: Tensor) -> Tensor:
        """Encode the prompt and predict."""
        pipe, (ids, *more) = self.pipe, self.ids
        if self.case.family == "sdxl":
            one = pipe.text_encoder(ids, output_hidden_states=True)
            two = pipe.text_encoder_2(more[0], output_hidden_states=True)
            side = float(self.case.resolution)
            sizes = torch.tensor([[side, side, 0, 0, side, side]] * len(noisy), device=noisy.device)
            states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
            added = {"text_embeds": two.text_embeds, "time_ids": sizes}
            return pipe.unet(noisy, steps, states, added_cond_kwargs=added).sample
        mask = torch.ones_like(ids)
        if self.case.family == "sana":
            states = pipe.text_encoder(ids, mask, use_cache=False).last_hidden_state
            return pipe.transformer(noisy, states, steps.float(), encoder_attention_mask=mask).sample
        states = pipe.text_encoder(ids, mask).last_hidden_state
        return pipe.transformer(noisy, steps.float(), pad(states, (0, 0, 0, 512 - states.shape[1]))).sample


Times = dict[str, list[tuple[float, float]]]


def since(began: tuple[float, float], now: tuple[float, float]) -> tuple[float, float]:
    """Return what has passed between two readings of a clock."""
    return now[0] - began[0], now[1] - began[1]


def measure(case: Case, steps: int) -> Times:
    """Return the times of steps in milliseconds, CPU time and time: the trainer's, of the floor and of the old floor."""
    torch.manual_seed(0)
    pipe, other = case.build(), case.build()
    photos, times = case.photos(), Times(ours=[], floor=[], old=[])
    other.tokenizer.add_tokens(TOKEN)
    if case.family == "sdxl":
        other.tokenizer_2.add_tokens(TOKEN)
        other.text_encoder_2.resize_token_embeddings(len(other.tokenizer_2), mean_resizing=False)
    if len(other.tokenizer) > len(other.text_encoder.get_input_embeddings().weight):
        other.text_encoder.resize_token_embeddings(len(other.tokenizer), mean_resizing=False)
    state: dict[str, Any] = {}

    def between(trainer: DTITrainer, step: int) -> None:
        now = case.clock()
        if step == 1:
            state["floor"] = Floor(case, other, trainer_latents(trainer, photos, case.batch))
            state["flops"] = FlopCounterMode(display=False).__enter__()
        elif step == 2:  # the second step was counted
            state["flops"].__exit__(None, None, None)
            with FlopCounterMode(display=False) as counted:
                state["floor"].step()
            ours, floor = state["flops"].get_total_flops(), counted.get_total_flops()
            if ours != floor:
                raise RuntimeError(f"{case.family}: a step of ours takes {ours:,} operations, the floor {floor:,}.")
        elif step > SKIPPED:
            times["ours"].append(since(state["began"], now))
            times["floor"].append(case.timed(state["floor"].step))
            times["old"].append(case.timed(lambda: state["floor"].step(old=True)))
        state["began"] = case.clock()

    case.trainer(pipe, max_train_steps=steps + SKIPPED).fit(photos, callback_on_step_end=between)
    return times


def trainer_latents(trainer: DTITrainer, photos: list[Image.Image], count: int) -> Tensor:
    """Return latents in the shape of those that the trainer learns from."""
    from diffusers.image_processor import VaeImageProcessor

    pixels = VaeImageProcessor(vae_scale_factor=1).preprocess(photos[0])
    ((mean, _),) = trainer.family.encode_images(pixels)
    return mean.repeat(count, *[1] * (mean.ndim - 1))


def spread(values: list[float], digits: int = 1) -> str:
    """Return the median of some values with their quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def ratio(times: Times, to: str, kind: int) -> float:
    """Return the median ratio of a step of ours to the step after it, by CPU time (0) or time (1).

    Steps that follow each other are slowed down alike by whatever else the machine does.
    """
    return statistics.median(ours[kind] / other[kind] for ours, other in zip(times["ours"], times[to]))


def row(name: str, times: Times) -> str:
    """Return a line of the table: medians and quartiles of CPU time, and the ratios."""
    cells = [name, *(spread([cpu for cpu, _ in values]) for values in times.values())]
    for kind in (0, 1):
        cells.append(f"{ratio(times, 'floor', kind):.3f} / {ratio(times, 'old', kind):.3f}")
    return f"| {' | '.join(cells)} |"


def profile(case: Case, steps: int) -> str:
    """Return a line with a step's three largest parts and torch's three largest operators, in shares of the step's CPU time.

    The profiler slows down what takes many small operations. Parts contain operators.
    """
    pipe = case.build()
    trainer = case.trainer(pipe, max_train_steps=steps + SKIPPED)
    parts = {
        "drawing samples": (TrainingSamples, "batch"), "text encoders, forward": (type(trainer.family), "encode_prompts"),
        "denoiser, forward": (type(trainer.family), "predict"), "backward": (Tensor, "backward"),
        "optimizer": (Stepper, "_optimizer_step"), "step": (Stepper, "take"),
    }  # fmt: skip
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def between(trainer: DTITrainer, step: int) -> None:
        if step == SKIPPED:
            profiler.start()
        elif step == steps + SKIPPED:
            profiler.stop()

    with ExitStack() as stack:
        for name, (owner, method) in parts.items():
            recorded = torch.profiler.record_function(name)(getattr(owner, method))
            stack.enter_context(patch.object(owner, method, recorded))
        trainer.fit(case.photos(), callback_on_step_end=between)
    events = {event.key: event for event in profiler.key_averages()}
    step = events["step"].cpu_time_total
    of_parts = {name: events[name].cpu_time_total / step for name in parts if name != "step"}
    of_operators = {key: event.self_cpu_time_total / step for key, event in events.items() if key not in parts}
    cells = []
    for shares in (of_parts, of_operators):
        largest = sorted(shares, key=shares.__getitem__, reverse=True)[:3]
        cells.append(", ".join(f"{name.removeprefix('aten::')} {shares[name]:.0%}" for name in largest))
    return f"| {case.family}, {case.batch} | {cells[0]} | {cells[1]} | {1 - sum(of_operators.values()):.0%} |"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="batch sizes (default: 1 4)")
    parser.add_argument("--steps", type=int, default=100, help="steps of each kind (default: 100)")
    parser.add_argument("--profile", action="store_true", help="show what a step's time goes to instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.profile:
        print("| family, batch | largest parts | largest operators | outside operators |\n|---|---|---|---|")
    else:
        print("| family, batch | ours, CPU ms | floor | old floor | CPU time, ours / floor / old floor | wall time |")
        print("|---|---|---|---|---|---|")
    for family in args.families:
        for batch in args.batches:
            case = Case(family, batch)
            line = profile(case, args.steps) if args.profile else row(f"{family}, {batch}", measure(case, args.steps))
            print(line, flush=True)


if __name__ == "__main__":
    main()
