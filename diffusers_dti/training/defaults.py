"""The choices of settings, and the defaults of those that a method, a preset or a family decides."""

import math
from typing import Any, Literal

from ..concept.methods import METHODS
from ..families.base import Family

DirectionOptimizer = Literal["rsgd", "radam", "adamw"]
Schedule = Literal["constant", "linear", "cosine", "late"]
TimestepSampling = Literal["uniform", "stratified"]
AdapterKind = Literal["lora", "oft"]
LearnableProperty = Literal["object", "style"]
MixedPrecision = Literal["bf16"]
PrefixSpace = Literal["absorbed", "kept"]
Preset = Literal["paper"]

# The authors' settings where they differ from ours and are the same in every family; the families have the others.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"pooling": "legacy", "initializer_context": False, "prefix_space": "kept"},
}
STEPS = 100  # of DTI, by default


def walk_settings(steps: int | None) -> dict[str, Any]:
    """Return DTI's default steps, rate and schedule, which need a quarter of the authors' steps (docs/study.md).

    The gradients of successive steps are hardly correlated, so that the angle grows like rate x sqrt(steps). The rate therefore
    depends on the number of steps, and more of them refine the same walk instead of going farther.

    Args:
        steps: the number of steps if it is given.
    """
    steps = steps or STEPS
    return {"max_train_steps": steps, "learning_rate": round(0.5 / math.sqrt(steps), 4), "lr_scheduler": "cosine"}


def default_settings(
    method: str, preset: Preset | None, family: Family | type[Family], steps: int | None = None
) -> dict[str, Any]:
    """Return the defaults of settings that are None, by field: of the preset, else the method, else the family.

    Args:
        method, preset: see `DTIConfig`.
        family: the family of the pipeline.
        steps: the number of steps if it is given.
    """
    general = {
        "learning_rate": 0.01,
        "reg_lambda": 0.0,
        "context_lambda": 0.0,
        "dco_beta": 0.0,
        "optimizer": "adamw" if METHODS[method].raw else "rsgd",
        "lr_scheduler": "constant",
        "timestep_sampling": "uniform",
        "pooling": "eos",
        "initializer_context": True,
        "num_starts": 1,
        "prefix_space": "absorbed",
    }
    # The other methods keep their authors' walks: raw rows grow longer at a higher rate, and an adapter has its own pace.
    walk = walk_settings(steps) if method == "dti" and preset is None else {}
    return {**general, **family.defaults, **walk, **METHODS[method].settings, **(PRESETS[preset] if preset else {})}
