"""The choices of settings, and the defaults of those that a method, a preset or a family decides."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from .. import families
from ..concept.methods import METHODS
from ..families.base import Family

DirectionOptimizer = Literal["rsgd", "radam", "adamw"]
Schedule = Literal["constant", "linear", "cosine", "late"]
TimestepSampling = Literal["uniform", "stratified"]
AdapterKind = Literal["lora", "oft"]
MixedPrecision = Literal["bf16"]
PrefixSpace = Literal["absorbed", "kept"]
Preset = Literal["paper"]

# The authors' settings where they differ from ours and are the same in every family; the families have the others.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"pooling": "legacy", "initializer_context": False, "prefix_space": "kept"},
}
STEPS = 100  # of Riemannian SGD with a falling rate


def walk_settings(steps: int) -> dict[str, Any]:
    """Return the default rate and schedule of Riemannian SGD, which needs a quarter of the authors' steps (docs/study.md).

    The gradients of successive steps are hardly correlated, so that the angle grows like rate x sqrt(steps). The rate therefore
    depends on the number of steps: more of them refine the same walk instead of going farther.

    Args:
        steps: the number of steps.
    """
    return {"max_train_steps": steps, "learning_rate": round(1 / math.sqrt(steps), 4), "lr_scheduler": "cosine"}


def default_settings(given: Mapping[str, Any], family: Family | type[Family]) -> dict[str, Any]:
    """Return the defaults of settings that are None, by field: of the preset, else the method, else the family.

    Args:
        given: the settings as the user gave them, by field.
        family: the family of the pipeline.
    """
    method = METHODS[given["method"]]
    general = {
        "learning_rate": 0.01,
        "reg_lambda": 0.0,
        "context_lambda": 0.0,
        "dco_beta": 0.0,
        "optimizer": "adamw" if method.raw else "rsgd",
        "lr_scheduler": "constant",
        "timestep_sampling": "uniform",
        "pooling": "eos",
        "initializer_context": True,
        "num_starts": 1,
        "prefix_space": "absorbed",
    }
    # All others keep their authors' walk: a higher rate makes raw rows longer, an adapter has its own pace, other optimizers
    # have other rates, and a constant rate is for runs that are to be made longer.
    ours = given["method"] == "dti" and given["preset"] is None and given["adapter"] is None
    ours = ours and given["optimizer"] in (None, "rsgd") and given["lr_scheduler"] != "constant"
    walk = walk_settings(given["max_train_steps"] or STEPS) if ours else {}
    prior = {"kappa": 0.0} if method.raw else {}
    preset = PRESETS[given["preset"]] if given["preset"] else {}
    return {**general, **family.defaults, **prior, **walk, **method.settings, **preset}


def check_family_has(values: Mapping[str, Any], family: Family | type[Family]) -> None:
    """Check the settings that only some families have.

    Args:
        values: the settings with all defaults filled in, by field.
        family: the family of the pipeline.

    Raises:
        ValueError: if the family does not have one of them.
    """
    if values["zero_pad"] and "zero_pad" not in family.defaults:
        names = " and ".join(f.name for f in families.FAMILIES if "zero_pad" in f.defaults)
        raise ValueError(f"zero_pad is for {names}: {family.name} is not trained with zeros before its prompts.")
    if values["context_lambda"] and not family.token_states:
        raise ValueError(
            f"{family.name} has no context loss, since its denoiser does not get one state for each token of each text "
            "encoder, side by side: leave out `context_lambda`, or choose another `method`."
        )
