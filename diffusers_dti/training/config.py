"""`DTIConfig`: the settings of a training run, with the names that diffusers' scripts use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..concept.methods import METHODS

if TYPE_CHECKING:
    from ..concept.inversion import DirectionalInversion
    from ..families.base import Family


@dataclass(frozen=True)
class DTIConfig:
    """Settings of `DTITrainer`. None stands for the default of the pipeline's family (the authors' settings).

    Args:
        placeholder_token: the new word.
        initializer_token: a word or two for what the photos show; training starts there. "object", or "style". A concept to
            start from instead, or a mapping from placeholder to any of these where several tokens are trained.
        num_vectors: vectors of the concept; by default as many as the initializer has tokens.
        method: "dti"; "ti" for classic textual inversion, AdamW on the raw row, whose norm may drift; "crossinit" for the same
            from the encoder's output for the initializer, with a pull to it (arXiv 2312.15905); "dco" or "oft" for DTI
            together with a LoRA trained by Direct Consistency Optimization (arXiv 2402.12004), or with Orthogonal
            Finetuning (arXiv 2306.07280).
        token_scale: the fixed norm: "mean", "min" or "max" of the encoder's vocabulary, "initializer" for that word's own, or
            a number.
        train_magnitude: train the norm as well, by AdamW on its logarithm (an ablation).
        optimizer: "rsgd" is the method's Riemannian SGD; "adamw" takes AdamW for the direction, put back on the sphere after
            each step (an ablation).
        kappa: concentration of the von Mises-Fisher prior around the initializer.
        beta: decay of the running mean of squared gradient norms; 0 makes every step of one length.
        reg_lambda: weight of the squared distance to the start, mean over the rows' entries (1e-5 for "crossinit").
        learning_rate: step length on the sphere, before `scale_lr` (.01; .005 for "ti" and "crossinit").
        scale_lr: multiply `learning_rate` by batch size, accumulation steps and processes.
        max_train_steps: steps of the optimizer.
        train_batch_size: samples of a batch, in each process.
        gradient_accumulation_steps: batches of a step.
        adapter: "lora" or "oft", trained together with the token on the denoiser's attention; None for the method's own.
            "lora" with method "dti" or "ti" is pivotal tuning.
        adapter_rank: of the LoRA; of OFT the number of blocks.
        adapter_learning_rate: AdamW's for the adapter.
        adapter_start_step: steps of the token alone before the adapter joins in.
        dco_beta: strength of the DCO loss, 0 for the plain one (1000 for "dco"). It is taken of each batch's mean, as by the
            authors, so that accumulated batches are not one large batch.
        resolution: side of the training crops, pixels.
        crops_per_image: cached random crops of a photo that is not square.
        random_flip: mirror half of the samples.
        learnable_property: "object" or "style": which templates are used.
        templates: prompts with "{}" for the placeholder, in place of the built-in ones.
        pooling: "eos" pools CLIP's text vector at the end of the prompt, "legacy" at the placeholder.
        zero_pad: put up to 15 tokens of zero embedding before each prompt, so that the concept works at any position (SANA's
            default; possible for Wan).
        gradient_checkpointing: trade time for memory in the denoiser.
        mixed_precision: "bf16" to run float32 models under autocast; None runs them in the dtype they have.
        seed: of every draw.
        output_dir: folder for the log, checkpoints and the result; None writes nothing.
        checkpointing_steps: write a checkpoint every so many steps; None for none.
        checkpoints_total_limit: keep so many of them, the newest; None for all.
        resume_from_checkpoint: "latest", or a checkpoint's folder.
        report_to: a tracker of accelerate's: "tensorboard", "wandb", "trackio", ...
        validation_prompt: prompt or prompts with "{}" for the placeholder, drawn with the same seeds on the way.
        validation_steps: how often, and at the end.
    """

    placeholder_token: str | None = None
    initializer_token: "str | DirectionalInversion | Mapping[str, str | DirectionalInversion] | None" = None
    num_vectors: int | None = None
    method: str = "dti"
    token_scale: str | float = "mean"
    train_magnitude: bool = False
    optimizer: str | None = None
    kappa: float | None = None
    beta: float = 0.0
    reg_lambda: float | None = None
    learning_rate: float | None = None
    scale_lr: bool = True
    max_train_steps: int | None = None
    train_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    adapter: str | None = None
    adapter_rank: int = 4
    adapter_learning_rate: float = 5e-5
    adapter_start_step: int = 1
    dco_beta: float | None = None
    resolution: int | None = None
    crops_per_image: int = 8
    random_flip: bool = False
    learnable_property: str = "object"
    templates: Sequence[str] | None = None
    pooling: str = "eos"
    zero_pad: bool | None = None
    gradient_checkpointing: bool = False
    mixed_precision: str | None = None
    seed: int = 42
    output_dir: str | Path | None = None
    checkpointing_steps: int | None = None
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | Path | None = None
    validation_prompt: str | Sequence[str] | None = None
    validation_steps: int = 100
    report_to: str | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("method", tuple(METHODS)),
            ("optimizer", (None, "rsgd", "adamw")),
            ("adapter", (None, "lora", "oft")),
            ("pooling", ("eos", "legacy")),
            ("learnable_property", ("object", "style")),
            ("mixed_precision", (None, "bf16")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}.")
        at_least_1 = (
            "num_vectors", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "resolution", "adapter_rank",
            "crops_per_image", "checkpointing_steps", "checkpoints_total_limit", "validation_steps",
        )  # fmt: skip
        for name in at_least_1:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        rates = ("learning_rate", "adapter_learning_rate", "kappa", "reg_lambda", "dco_beta", "adapter_start_step")
        for name in rates:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}.")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be at least 0 and less than 1, got {self.beta}.")
        if (self.checkpointing_steps or self.resume_from_checkpoint) and self.output_dir is None:
            raise ValueError("Checkpoints need an `output_dir` to be written to.")
        if self.raw and (self.optimizer == "rsgd" or self.train_magnitude):
            raise ValueError(f'method "{self.method}" trains raw rows, by AdamW, norm and all: leave the optimizer to it.')
        if self.reg_lambda and not self.raw:
            raise ValueError("reg_lambda pulls raw rows to their start; directions have `kappa` for that.")
        if self.adapter not in (None, own := METHODS[self.method].settings.get("adapter", self.adapter)):
            raise ValueError(f'method "{self.method}" has an adapter of its own, {own}: for another give method "dti".')
        if self.dco_beta and not (self.adapter or METHODS[self.method].settings.get("adapter")):
            raise ValueError('The DCO loss (`dco_beta`) trains an adapter: give adapter="lora", or method="dco".')
        if any("{}" not in t for t in self.templates or ()):
            raise ValueError('Every template needs a "{}" where the placeholder goes.')

    def resolved(self, family: "Family") -> "DTIConfig":
        """With the family's defaults in place of None.

        Raises:
            ValueError: for a setting that the family does not have.
        """
        if self.zero_pad and "zero_pad" not in family.defaults:
            raise ValueError(f"zero_pad is for SANA and Wan: {family.name} encodes every prompt at one length.")
        general = {"learning_rate": 0.01, "reg_lambda": 0.0, "dco_beta": 0.0, "optimizer": "adamw" if self.raw else "rsgd"}
        defaults = {**general, **family.defaults, **METHODS[self.method].settings}
        resolved = replace(self, **{k: v for k, v in defaults.items() if getattr(self, k) is None})
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

    @property
    def rate_factor(self) -> int:
        """What `scale_lr` multiplies rates by: the samples of a step."""
        from .distributed import processes

        samples = self.train_batch_size * self.gradient_accumulation_steps * processes().num_processes
        return samples if self.scale_lr else 1

    @property
    def effective_learning_rate(self) -> float:
        """The rate that the token's optimizer gets: .04 for the authors' launchers."""
        return self.learning_rate * self.rate_factor
