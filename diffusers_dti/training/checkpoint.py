"""Checkpoints of a run: the concepts so far, which can be loaded, and what the optimizers need to continue."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..atomic import atomic_folder
from ..concept.inversion import DirectionalInversion
from .adapter import Adapter
from .seeds import SAMPLES_VERSION
from .trainable import TrainableConcept

STATE = "training_state.safetensors"


def save_concepts(folder: str | Path, concepts: Sequence[DirectionalInversion]) -> None:
    """Write one concept into the folder itself, several into a folder each, named after their placeholders."""
    names: list[str] = []
    for number, concept in enumerate(concepts):
        name = re.sub(r"\W", "", concept.placeholder_token) or str(number)
        names.append(f"{name}-{number}" if name in names else name)
        concept.save_pretrained(Path(folder) / names[-1] if len(concepts) > 1 else folder)


# Not accelerate's `save_state`: it pickles, it writes the random states of all processes, which nothing here depends on, and it
# knows only the models and optimizers that it has prepared. A few KB of safetensors also load as a concept.
def save(
    output_dir: Path,
    step: int,
    concepts: Sequence[TrainableConcept],
    optimizers: Sequence[torch.optim.Optimizer],
    adapter: Adapter | None,
    settings: dict[str, Any],
) -> Path:
    """Write `checkpoint-<step>` as a whole: a run that is killed meanwhile leaves no partial one.

    Args:
        output_dir: the folder of the run.
        step: the number of steps done.
        concepts, optimizers, adapter: what is trained.
        settings: what must be the same when the run is resumed, as JSON values.

    Returns:
        The folder of the checkpoint.
    """
    folder = output_dir / f"checkpoint-{step}"
    with atomic_folder(folder) as temporary:
        save_concepts(temporary, [concept.current() for concept in concepts])
        if adapter is not None:
            adapter.keep()
            adapter.save(temporary)
        tensors: dict[str, Tensor] = dict(_parameters(concepts, adapter))
        for number, optimizer in enumerate(optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    tensors[f"optimizer.{number}.{index}.{key}"] = value
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"step": str(step), "samples_version": str(SAMPLES_VERSION), "settings": json.dumps(settings)}
        save_file(tensors, temporary / STATE, metadata=metadata)
    return folder


def _parameters(concepts: Sequence[TrainableConcept], adapter: Adapter | None) -> dict[str, nn.Parameter]:
    """Return all parameters in training, by name."""
    parameters = {}
    for number, concept in enumerate(concepts):
        for component, rows in concept.rows.items():
            for name, parameter in rows.named_parameters():
                parameters[f"rows.{number}.{component}.{name}"] = parameter
    if adapter is not None:
        for name, parameter in adapter.parameters.items():
            parameters[f"adapter.{name}"] = parameter
    return parameters


def prune(output_dir: Path, step: int, limit: int | None) -> None:
    """Remove all but the `limit` newest checkpoints up to a step. Later ones belong to another run."""
    if limit is None:
        return
    own = [folder for folder in _checkpoints(output_dir) if _step(folder) <= step]
    for folder in own[:-limit]:
        shutil.rmtree(folder)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints in a folder, in the order of their steps."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=_step)


def find_checkpoint(output_dir: Path, which: str | Path) -> Path | None:
    """Find the checkpoint to resume from.

    Args:
        output_dir: the folder of the run.
        which: "latest", or a folder, also by its name in `output_dir`.

    Returns:
        Its folder; None if "latest" is asked for and there is none yet.

    Raises:
        OSError: if there is no such checkpoint.
    """
    if which == "latest":
        checkpoints = _checkpoints(output_dir)
        return checkpoints[-1] if checkpoints else None
    for folder in (Path(which), output_dir / which):
        if (folder / STATE).is_file():
            return folder
    raise OSError(f"{which} is not a checkpoint: a folder with {STATE} is expected, here or in {output_dir}.")


def read_settings(output_dir: str | Path | None, which: str | Path | None) -> dict[str, Any]:
    """Return the settings that the checkpoint to resume from was written with; empty if the run starts anew.

    Args:
        output_dir, which: see `find_checkpoint`; None if the run has no folder, or does not resume.
    """
    folder = find_checkpoint(Path(output_dir), which) if which and output_dir is not None else None
    if folder is None:
        return {}
    with safe_open(folder / STATE, framework="pt") as f:
        settings: dict[str, Any] = json.loads(f.metadata()["settings"])
    return settings


def load(
    folder: Path,
    concepts: Sequence[TrainableConcept],
    optimizers: Sequence[torch.optim.Optimizer],
    adapter: Adapter | None,
    settings: dict[str, Any],
) -> int:
    """Put the contents of a checkpoint into what is trained.

    Args:
        folder: the checkpoint.
        concepts, optimizers, adapter: what is trained.
        settings: the settings of this run.

    Returns:
        The number of steps done.

    Raises:
        ValueError: if the checkpoint is another run's, naming the settings that differ, or an earlier version's, with other
            samples.
    """
    with safe_open(folder / STATE, framework="pt") as f:
        metadata, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    if metadata.get("samples_version") != str(SAMPLES_VERSION):  # checkpoints of version 1 do not say so
        raise ValueError(
            f"{folder} was written by another version of diffusers-dti, which trained on other samples of the same photos, so "
            "its run cannot be continued here. Start anew, without `resume_from_checkpoint` or in another `output_dir`. The "
            "checkpoint itself can still be loaded as a concept."
        )
    before = json.loads(metadata["settings"])
    differing = sorted(k for k in settings.keys() | before.keys() if settings.get(k) != before.get(k))
    if differing:
        raise ValueError(f"{folder} was written with other settings: {', '.join(differing)}. Use those, or start anew.")
    with torch.no_grad():
        for name, parameter in _parameters(concepts, adapter).items():
            parameter.copy_(tensors.pop(name))
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, value in tensors.items():
        _, number, index, key = name.split(".", 3)
        states[int(number)].setdefault(int(index), {})[key] = value
    for optimizer, state in zip(optimizers, states):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"])
