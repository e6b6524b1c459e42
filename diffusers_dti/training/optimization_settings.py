"""Settings of how the token is optimized."""
# ruff: noqa: RUF009 (`setting` returns a dataclass field)

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from .defaults import DirectionOptimizer, Schedule, TimestepSampling
from .settings import setting


@dataclass(frozen=True)
class OptimizationSettings:
    """Optimizer, rate, prior, steps and batches."""

    optimizer: DirectionOptimizer | None = setting(
        None,
        'the optimizer of the directions: "rsgd" is the method\'s Riemannian SGD; "radam" is Riemannian Adam, whose rate is '
        'the angle of a step; "adamw" is AdamW, with the directions put back on the sphere after each step (an ablation)',
        choices=get_args(DirectionOptimizer),
    )
    kappa: float | None = setting(None, "the concentration of the von Mises-Fisher prior around the initializer", at_least=0)
    beta: float = setting(
        0.0, "the decay of the running mean of squared gradient norms; 0 makes every step the same length", at_least=0
    )
    reg_lambda: float | None = setting(
        None,
        'the weight of the squared distance between the rows and their start, averaged over entries (1e-5 for "crossinit")',
        at_least=0,
    )
    context_lambda: float | None = setting(
        None,
        "the weight of CoRe's context loss (arXiv 2408.15914), which keeps the text encoder's states at the words around the "
        "placeholder near those around the initializer; by default 0, which is off (its authors use 1.5e-4 with classic "
        "Textual Inversion)",
        at_least=0,
    )
    context_prompts: Sequence[str] | None = setting(
        None, 'the prompts of the context loss, with "{}" for the placeholder, instead of the built-in ones'
    )
    learning_rate: float | None = setting(
        None,
        "the step length on the sphere, before `scale_lr`: by default 1 / sqrt(`max_train_steps`) at the first step; with "
        'another optimizer, an adapter or a constant rate 0.01; 0.005 for "ti" and "crossinit"',
        at_least=0,
    )
    lr_scheduler: Schedule | None = setting(
        None,
        'how the rate falls: "cosine", the default, and "linear" reach 0 at the end, "late" is constant for two thirds of the '
        'steps and then linear, "constant" does not fall. Only a run with a constant rate can be made longer afterwards',
        choices=get_args(Schedule),
    )
    timestep_sampling: TimestepSampling | None = setting(
        None,
        'how noise levels are drawn: "uniform", each by itself, or "stratified", so that any few samples in a row cover '
        "them evenly",
        choices=get_args(TimestepSampling),
    )
    heldout_loss_steps: int = setting(
        20,
        "measure the loss on fixed draws of noise and noise level every N steps, and at the end; 0 never does",
        at_least=0,
        affects_result=False,
    )
    scale_lr: bool = setting(True, "multiply `learning_rate` by batch size, accumulation steps and number of processes")
    max_train_steps: int | None = setting(
        None,
        "the number of steps of the optimizer: by default 100 for Riemannian SGD with a rate that falls, and otherwise as many "
        "as the authors take for the method and the family",
        at_least=1,
    )
    train_batch_size: int | None = setting(None, "the number of samples in a batch, in each process", at_least=1)
    gradient_accumulation_steps: int | None = setting(None, "the number of batches in a step", at_least=1)
    gradient_checkpointing: bool = setting(False, "use less memory in the denoiser, at the cost of speed", affects_result=False)
    gradient_checkpointing_interval: int = setting(
        1,
        "with `gradient_checkpointing`, save memory in every N-th block only: 2 takes half of the additional time",
        at_least=1,
        affects_result=False,
    )
