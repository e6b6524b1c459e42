"""`DTIConfig`: the settings of a training run, with the names that diffusers' scripts use."""
# ruff: noqa: RUF009 (`setting` returns a dataclass field)

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

from ..concept.checks import LARGEST_SCALE, SMALLEST_SCALE, check_word
from ..concept.inversion import DirectionalInversion
from ..concept.methods import METHODS
from ..data.subject_fields import LearnableProperty
from ..families.base import Family
from ..pipeline.state import Pooling
from ..pipeline.text_encoders import ScaleRule
from .defaults import (
    AdapterKind,
    DirectionOptimizer,
    MixedPrecision,
    PrefixSpace,
    Schedule,
    TimestepSampling,
    check_family_has,
    default_settings,
)
from .distributed import processes
from .optimization_settings import OptimizationSettings
from .settings import check_settings, document_settings, setting
from .token_settings import AUTO, Initializer, TokenSettings
from .trackers import check_tracker

SCALE_RULES = (*get_args(ScaleRule), "initializer")


@dataclass(frozen=True)
class DTIConfig(OptimizationSettings, TokenSettings):
    """Settings of `DTITrainer`.

    If a setting is None, the default of the method or of the pipeline's family applies (the authors' settings).

    Args:

    Raises:
        TypeError: if a value is of another type than its setting.
        ValueError: if a value is not allowed, or two settings contradict each other.
        ImportError: if the package of `report_to` is not installed.

    Example:

        ```py
        >>> from diffusers_dti import DTIConfig

        >>> config = DTIConfig(placeholder_token="<dog>", initializer_token="dog", max_train_steps=300)
        >>> config.method, config.kappa
        ('dti', None)
        ```
    """

    adapter: AdapterKind | None = setting(
        None,
        'an adapter on the denoiser\'s attention that is trained together with the token, "lora" or "oft"; by default the '
        'one of the method. "lora" with method "dti" or "ti" is pivotal tuning',
        choices=get_args(AdapterKind),
    )
    adapter_rank: int = setting(4, "the rank of the LoRA, or the number of blocks of OFT", at_least=1)
    adapter_learning_rate: float = setting(5e-5, "the learning rate of AdamW for the adapter", at_least=0)
    adapter_start_step: int = setting(1, "the number of steps that train the token alone, before the adapter", at_least=0)
    dco_beta: float | None = setting(
        None,
        'the strength of the DCO loss, or 0 for the plain loss (1000 for "dco"). As in the authors\' code, the loss is taken '
        "of the mean of each batch, so accumulated batches are not the same as one large batch",
        at_least=0,
    )
    resolution: int | None = setting(None, "the side of the training crops in pixels", at_least=1)
    crops_per_image: int = setting(8, "the number of random crops per non-square photo", at_least=1)
    random_flip: bool = setting(False, "mirror half of the samples")
    learnable_property: LearnableProperty = setting(
        "object", 'what is learned, "object" or "style": this chooses the templates', choices=get_args(LearnableProperty)
    )
    templates: Sequence[str] | None = setting(None, 'prompts with "{}" for the placeholder, instead of the built-in templates')
    pooling: Pooling | None = setting(
        None,
        '"eos" pools CLIP\'s text vector at the end of the prompt, "legacy" at the placeholder; by default "eos"',
        choices=get_args(Pooling),
    )
    zero_pad: bool | None = setting(
        None,
        "put up to 15 tokens of zero embedding before each prompt, so that the concept works at any position; only for "
        "families that encode prompts at their real length, by default as their authors did",
    )
    mixed_precision: MixedPrecision | None = setting(
        None, '"bf16" to run float32 models under autocast; by default models run in their own dtype',
        choices=get_args(MixedPrecision),
    )  # fmt: skip
    seed: int = setting(42, "the seed of all samples")
    output_dir: str | Path | None = setting(
        None, "the folder for the log, the checkpoints and the result; by default nothing is written", affects_result=False
    )
    checkpointing_steps: int | None = setting(
        None, "write a checkpoint every N steps; by default never", at_least=1, affects_result=False
    )
    checkpoints_total_limit: int | None = setting(
        None, "keep only the N newest checkpoints; by default all", at_least=1, affects_result=False
    )
    resume_from_checkpoint: str | Path | None = setting(
        None, 'the checkpoint to resume from: "latest", or a folder', affects_result=False
    )
    validation_prompt: str | Sequence[str] | None = setting(
        None,
        'a prompt or several, with "{}" for the placeholder, to generate images of during training, always from the same seeds',
        affects_result=False,
    )
    validation_steps: int = setting(
        25, "generate validation images every N steps, and at the end", at_least=1, affects_result=False
    )
    report_to: str | None = setting(None, 'a tracker of accelerate, such as "tensorboard" or "wandb"', affects_result=False)

    def __post_init__(self) -> None:
        check_settings(self)
        scale = self.token_scale
        known = scale in SCALE_RULES if isinstance(scale, str) else scale > 0
        if not known:
            raise ValueError(f"token_scale must be one of {', '.join(SCALE_RULES)}, or a positive number, got {scale!r:.80}.")
        if not isinstance(scale, str) and not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
            raise ValueError(f"token_scale must be from {SMALLEST_SCALE:g} to {LARGEST_SCALE:g}, got {scale!s:.80}.")
        if self.placeholder_token is not None:
            check_word(self.placeholder_token)
        if self.beta >= 1:
            raise ValueError(f"beta must be less than 1, got {self.beta}.")
        if (self.checkpointing_steps or self.resume_from_checkpoint) and self.output_dir is None:
            raise ValueError("`checkpointing_steps` and `resume_from_checkpoint` need an `output_dir`.")
        for name in ("templates", "context_prompts"):
            if not all("{}" in template for template in getattr(self, name) or ()):
                raise ValueError(f'{name} need a "{{}}" where the placeholder goes.')
        check_tracker(self.report_to, self.output_dir)
        self._check_initializers()
        self._check_method()

    def _check_initializers(self) -> None:
        """Check the words that training may start from."""
        given = self.initializer_token
        for own in given.values() if isinstance(given, Mapping) else [given]:
            words = own if isinstance(own, Sequence) and not isinstance(own, str) else [own]
            if not words or "" in words:
                raise ValueError('initializer_token must name a word: leave it out for "object" or "style".')
            if self.learnable_property == "style" and list(words) == [AUTO]:
                raise ValueError(
                    'initializer_token="auto" looks for a noun, and a style has none: give a word, or leave it out.'
                )

    def _check_method(self) -> None:
        """Check the settings that only some methods have."""
        if self.raw and (self.optimizer in ("rsgd", "radam") or self.train_magnitude):
            raise ValueError(
                f'method "{self.method}" trains raw rows by AdamW, including their norms: leave out `optimizer` and '
                "`train_magnitude`."
            )
        if self.raw and (self.kappa or self.token_scale != "mean"):
            raise ValueError(
                f'method "{self.method}" trains raw rows, which have no prior and no fixed norm: leave out `kappa` and '
                "`token_scale`. `reg_lambda` pulls rows to their start."
            )
        if self.reg_lambda and not self.raw:
            raise ValueError("reg_lambda pulls raw rows to their start; for directions, use `kappa`.")
        own = METHODS[self.method].settings.get("adapter")
        if own is not None and self.adapter not in (None, own):
            raise ValueError(f'method "{self.method}" has its own adapter, {own}: for another one, use method "dti".')
        if self.dco_beta and self.adapter is None and own is None:
            raise ValueError('The DCO loss (`dco_beta`) trains an adapter: use adapter="lora" or method="dco".')

    def resolve(self, family: Family | type[Family]) -> "ResolvedConfig":
        """Fill in the defaults of the method and the family.

        Args:
            family: the family of the pipeline that is trained.

        Returns:
            The settings of the run. Resolving them again changes nothing.

        Raises:
            ValueError: if the family does not have a setting, or the adapter would never be trained.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, default in default_settings(values, family).items():
            if values[name] is None:
                values[name] = default
        check_family_has(values, family)
        resolved = ResolvedConfig(**values)
        if resolved.adapter and resolved.adapter_start_step >= resolved.max_train_steps:
            raise ValueError(
                f"The adapter would join in at step {resolved.adapter_start_step}, and there are only "
                f"{resolved.max_train_steps}: lower adapter_start_step."
            )
        return resolved

    @property
    def raw(self) -> bool:
        """Whether the rows themselves are trained, not their directions."""
        return METHODS[self.method].raw


document_settings(DTIConfig)


class ResolvedConfig(DTIConfig):
    """Settings with the defaults of a method and a family filled in, from `DTIConfig.resolve`."""

    # Not a dataclass of its own: the annotations only narrow the types. Fields, defaults and help remain `DTIConfig`'s.
    optimizer: DirectionOptimizer
    lr_scheduler: Schedule
    timestep_sampling: TimestepSampling
    pooling: Pooling
    prefix_space: PrefixSpace
    initializer_context: bool
    num_starts: int
    kappa: float
    reg_lambda: float
    context_lambda: float
    learning_rate: float
    max_train_steps: int
    train_batch_size: int
    gradient_accumulation_steps: int
    dco_beta: float
    resolution: int

    def initializers_for(self, placeholder: str) -> list[Initializer]:
        """Return what a concept may start from: its own entry of a mapping, the common one, or "object" or "style"."""
        given = self.initializer_token
        if isinstance(given, Mapping):
            given = given.get(placeholder)
        if given is None or isinstance(given, str | DirectionalInversion):
            return [given or self.learnable_property]
        return list(given) or [self.learnable_property]

    @property
    def samples_per_step(self) -> int:
        """The number of samples of a step, over accumulated batches and processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes().num_processes

    @property
    def rate_factor(self) -> int:
        """The number that `scale_lr` multiplies rates by."""
        return self.samples_per_step if self.scale_lr else 1

    @property
    def effective_learning_rate(self) -> float:
        """The learning rate of the token's optimizer, 0.04 with the settings of the authors' launchers."""
        return self.learning_rate * self.rate_factor
