"""The metadata of a trained concept: what its files and model card say about it."""

import json
import os
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..concept.concept import Concept
from ..families.base import Family
from .config import ResolvedConfig


def training_settings(config: ResolvedConfig, placeholder: str) -> dict[str, Any]:
    """Return the settings that affect the result, as JSON values."""
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.metadata["affects_result"]}
    settings["placeholder_token"] = placeholder
    initializer = config.initializers_for(placeholder)[0]
    settings["initializer_token"] = initializer.placeholder_token if isinstance(initializer, Concept) else initializer
    return json.loads(json.dumps(settings))


def concept_metadata(family: Family, config: ResolvedConfig, placeholder: str) -> dict[str, Any]:
    """Return the metadata of one of a run's concepts.

    Args:
        family: the family, bound to the pipeline that is trained.
        config: the settings of the run.
        placeholder: the concept's placeholder.
    """
    settings = training_settings(config, placeholder)
    base = family.pipe.config.get("_name_or_path") or ""
    if os.path.isdir(base):
        base = Path(base).name  # the rest of a local path is private
    return {
        "initializer": settings["initializer_token"],
        "base_model": base,
        "family": family.name,
        "method": config.method,
        "scale_rule": "learned" if config.raw or config.train_magnitude else config.token_scale,
        "pooling": config.pooling,
        "prefix_space": config.prefix_space,
        "training": settings,
        "versions": {p: version(p) for p in ("diffusers-dti", "diffusers", "transformers", "torch")},
    }
