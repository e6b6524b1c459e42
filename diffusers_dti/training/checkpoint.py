"""Checkpoints of a run: the concepts so far, readable as such, and beside them what the optimizers need to go on."""

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..concept.inversion import DirectionalInversion
from .adapter import Adapter
from .trainable import TrainableConcept

STATE = "training_state.safetensors"


def save_concepts(folder: str | Path, concepts: Sequence[DirectionalInversion]) -> None:
    """One concept into the folder itself, several into a folder each, named after their placeholders."""
    names: list[str] = []
    for number, concept in enumerate(concepts):
        name = re.sub(r"\W", "", concept.placeholder_token) or str(number)
        names.append(f"{name}-{number}" if name in names else name)
        concept.save_pretrained(Path(folder) / names[-1] if len(concepts) > 1 else folder)


def save(
    output_dir: str | Path,
    step: int,
    concepts: Sequence[TrainableConcept],
    optimizers: Sequence[torch.optim.Optimizer],
    adapter: Adapter | None,
    settings: dict[str, Any],
) -> Path:
    """Write `checkpoint-<step>` as a whole; a run that is killed while it is written leaves no half of one."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    folder = output_dir / f"checkpoint-{step}"
    temporary = Path(tempfile.mkdtemp(dir=output_dir, prefix=".checkpoint-"))
    try:
        save_concepts(temporary, [x.current() for x in concepts])
        if adapter is not None:
            adapter.keep()
            adapter.save(temporary)
        tensors = _trained(concepts, adapter)
        for number, optimizer in enumerate(optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{key}": value for key, value in state.items()}
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save_file(tensors, temporary / STATE, metadata={"step": str(step), "settings": json.dumps(settings)})
        if folder.exists():
            shutil.rmtree(folder)
        temporary.chmod(0o755)  # mkdtemp's folders are private
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _trained(concepts: Sequence[TrainableConcept], adapter: Adapter | None) -> dict[str, torch.Tensor]:
    """All parameters in training, by name."""
    parts = {f"rows.{i}.{c}": r for i, x in enumerate(concepts) for c, r in x.rows.items()}
    parameters = {f"{name}.{k}": p for name, rows in parts.items() for k, p in rows.named_parameters()}
    return parameters | {f"adapter.{k}": p for k, p in (adapter.parameters if adapter else {}).items()}


def prune(output_dir: str | Path, step: int, limit: int | None) -> None:
    """Remove all checkpoints up to a step but the `limit` newest of them; later ones are another run's."""
    there = [p for p in _there(Path(output_dir)) if _step(p) <= step]
    for folder in there[:-limit] if limit else ():
        shutil.rmtree(folder)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _there(output_dir: Path) -> list[Path]:
    """A run's checkpoints by their steps."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=_step)


def find_checkpoint(output_dir: str | Path, which: str | Path) -> Path | None:
    """The folder to go on from; None if "latest" is asked for and there is none yet.

    Raises:
        OSError: for a named checkpoint that is not there.
    """
    output_dir = Path(output_dir)
    if which == "latest":
        return next(reversed(_there(output_dir)), None)
    for folder in (Path(which), output_dir / which):
        if (folder / STATE).is_file():
            return folder
    raise OSError(f"{which} is not a checkpoint: a folder with {STATE} is expected, here or in {output_dir}.")


def load(
    folder: Path,
    concepts: Sequence[TrainableConcept],
    optimizers: Sequence[torch.optim.Optimizer],
    adapter: Adapter | None,
    settings: dict[str, Any],
) -> int:
    """Put what a checkpoint holds in place and return its step.

    Raises:
        ValueError: where the run was another one, naming the settings that differ.
    """
    with safe_open(folder / STATE, framework="pt") as f:
        metadata, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    before = json.loads(metadata["settings"])
    differing = sorted(k for k in settings.keys() | before.keys() if settings.get(k) != before.get(k))
    if differing:
        raise ValueError(f"{folder} was written with other settings: {', '.join(differing)}. Use those, or start anew.")
    with torch.no_grad():
        for name, parameter in _trained(concepts, adapter).items():
            parameter.copy_(tensors.pop(name))
    states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in optimizers]
    for name, value in tensors.items():
        _, number, index, key = name.split(".", 3)
        states[int(number)].setdefault(int(index), {})[key] = value
    for optimizer, state in zip(optimizers, states):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"])
