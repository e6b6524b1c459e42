"""Checkpoints of a run: the concepts so far, which can be loaded, and what the optimizers need to continue."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..atomic import atomic_folder
from ..concept.inversion import DirectionalInversion
from ..parsing import parse_json
from .adapter import Adapter
from .seeds import SAMPLES_VERSION
from .trainable import TrainableConcept

logger = logging.get_logger(__name__)

STATE = "training_state.safetensors"


def concept_folders(folder: str | Path, placeholders: Sequence[str]) -> list[Path]:
    """Return where concepts are saved: one in the folder itself, several in a folder each, named after their placeholders."""
    if len(placeholders) == 1:
        return [Path(folder)]
    names: list[str] = []
    for number, placeholder in enumerate(placeholders):
        name = re.sub(r"\W", "", placeholder) or str(number)
        names.append(f"{name}-{number}" if name in names else name)
    return [Path(folder) / name for name in names]


def save_concepts(folder: str | Path, concepts: Sequence[DirectionalInversion]) -> None:
    """Write concepts into their `concept_folders`."""
    folders = concept_folders(folder, [concept.placeholder_token for concept in concepts])
    for own, concept in zip(folders, concepts):
        concept.save_pretrained(own)


def warn_if_replaced(output_dir: Path, placeholders: Sequence[str]) -> None:
    """Warn that a run from the start will replace what an earlier one has left in its folder."""
    found = [path.name for path in _checkpoints(output_dir)]
    for folder in concept_folders(output_dir, placeholders):
        found += [str(path.relative_to(output_dir)) for path in sorted(folder.glob("learned_embeds*.safetensors"))]
    if found:
        logger.warning(
            f"{output_dir} has an earlier run's {', '.join(found)}: this one starts anew. It replaces the concept when it has "
            "ended, and the checkpoints of the same steps. To keep them, stop, and choose another `output_dir`; to go on from "
            'the last checkpoint, use resume_from_checkpoint="latest".'
        )


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

    Raises:
        OSError: if it cannot be written, or another program's folder has its name.
    """
    folder = output_dir / f"checkpoint-{step}"
    if folder.exists() and not _is_ours(folder):
        raise OSError(f"{folder} is another program's, and is not replaced: choose another `output_dir`.")
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


def _is_ours(folder: Path) -> bool:
    """Return whether this package wrote a folder: other trainers call theirs checkpoint-100 as well."""
    return (folder / STATE).is_file()


def _checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints in a folder, in the order of their steps."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal() and _is_ours(p)]
    return sorted(found, key=_step)


def find_checkpoint(output_dir: Path, which: str | Path) -> Path | None:
    """Find the checkpoint to resume from.

    Args:
        output_dir: the folder of the run.
        which: "latest", or a folder, also by its name in `output_dir`.

    Returns:
        Its folder, or None for "latest" if the run has no checkpoint yet. A checkpoint that cannot be read is skipped.

    Raises:
        OSError: if there is no such checkpoint.
    """
    if which == "latest":
        for folder in reversed(_checkpoints(output_dir)):
            try:
                _read(folder)
            except ValueError as error:
                logger.warning(f"{error} It is passed over.")
            else:
                return folder
        return None
    for folder in (Path(which), output_dir / which):
        if _is_ours(folder):
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
    return _read(folder)[2]


def _read(folder: Path) -> tuple[int, dict[str, str], dict[str, Any], dict[str, Tensor]]:
    """Read a checkpoint's state.

    Returns:
        The number of steps done, the metadata, the settings in it, and the tensors.

    Raises:
        ValueError: if it is torn, or not what this package writes.
    """
    try:
        with safe_open(folder / STATE, framework="pt") as f:
            metadata, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
        step, settings = int(metadata["step"]), parse_json(metadata["settings"])
        if step < 0 or not isinstance(settings, dict):
            raise ValueError(f"it says that it is at step {step}")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} cannot be resumed, {STATE} is damaged: {str(error)!r:.200}.") from error
    return step, metadata, settings, tensors


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
            samples, or damaged.
    """
    step, metadata, before, tensors = _read(folder)
    if metadata.get("samples_version") != str(SAMPLES_VERSION):  # checkpoints of version 1 do not say so
        raise ValueError(
            f"{folder} was written by another version of diffusers-dti, which trained on other samples of the same photos, so "
            "its run cannot be continued here. Start anew, without `resume_from_checkpoint` or in another `output_dir`. The "
            "checkpoint itself can still be loaded as a concept."
        )
    differing = sorted(k for k in settings.keys() | before.keys() if settings.get(k) != before.get(k))
    if differing:
        raise ValueError(f"{folder} was written with other settings: {', '.join(differing)}. Use those, or start anew.")
    parameters = _parameters(concepts, adapter)
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    found = {name: tensor.shape for name, tensor in tensors.items() if not name.startswith("optimizer.")}
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    try:
        for name in tensors.keys() - found.keys():
            _, number, index, key = name.split(".", 3)
            states[int(number)].setdefault(int(index), {})[key] = tensors[name]
    except (ValueError, IndexError):
        found = {}
    # The token's optimizer comes first, and has a state for every row since the first step.
    rows = sum(len(group["params"]) for group in optimizers[0].param_groups)
    if found != shapes or len(states[0]) != rows:
        raise ValueError(f"{folder} cannot be resumed: it does not hold what this run trains.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    for optimizer, state in zip(optimizers, states):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step
