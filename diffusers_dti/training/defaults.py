"""The choices of settings, and the defaults of those that a method, a preset or a family decides."""

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

# The settings in which the authors' code differs from our defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"pooling": "legacy", "initializer_context": False, "prefix_space": "kept"},
}


def default_settings(method: str, preset: Preset | None, family: Family | type[Family]) -> dict[str, Any]:
    """Return the defaults of settings that are None, by field: of the preset, else the method, else the family."""
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
    return {**general, **family.defaults, **METHODS[method].settings, **(PRESETS[preset] if preset else {})}
