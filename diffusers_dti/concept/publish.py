"""Push a concept to the Hub as one commit: files, adapter, samples and model card."""

import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from PIL import Image

from . import formats
from .concept import Concept
from .hub import REPO_ID, checked_token, hub_errors
from .model_card import IMAGES, model_card
from .registry import COMPONENTS

SampleImages = Sequence[Image.Image | tuple[str, Image.Image]]


class Adapter(Protocol):
    """Weights that were trained together with a concept, such as a LoRA."""

    def save(self, folder: str | Path) -> None:
        """Write the weights into a folder."""


def push(
    concept: Concept,
    repo_id: str,
    *,
    images: SampleImages | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    adapter: Adapter | None = None,
    angle: float | None = None,
) -> CommitInfo:
    """Create the repository if needed and commit a concept's files, samples and card.

    For all other arguments, the result and the errors, see `DirectionalInversion.push_to_hub`.

    Args:
        adapter: what was trained together with the concept.
        angle: the angle to the initializer in degrees, averaged over the vectors.
    """
    samples = _check_samples(images or ())
    api = HfApi(token=checked_token(token))
    with tempfile.TemporaryDirectory() as temporary:
        folder, root = Path(temporary), PurePosixPath(subfolder or "")
        concept = _without_local_base(concept)
        formats.write_concept(folder, concept)
        if adapter is not None:
            adapter.save(folder)
        _write_images(folder / IMAGES, [image for _, image in samples])
        with hub_errors(repo_id):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if _is_new_branch(revision) and not create_pr:
                api.create_branch(repo_id, branch=str(revision), exist_ok=True)
            existing = api.list_repo_files(repo_id, revision=revision)
        prompts = [prompt for prompt, _ in samples]
        card = model_card(concept, repo_id, prompts, license, subfolder, adapter is not None, angle)
        card.save(folder / "README.md")
        # One commit, unlike `upload_folder`, which may need several and deletes by patterns of names: nobody must be able to
        # load half of a concept, or halves of two.
        with hub_errors(repo_id):
            return api.create_commit(
                repo_id,
                _operations(folder, root, existing),
                commit_message=commit_message or f"Upload {concept.placeholder_token}",
                revision=revision,
                create_pr=create_pr,
            )


def _check_samples(images: Iterable[Any]) -> list[tuple[str | None, Image.Image]]:
    """Return samples as pairs of a prompt and an image, or raise a TypeError."""
    samples: list[tuple[str | None, Image.Image]] = []
    for sample in images:
        prompt, image = sample if isinstance(sample, tuple) else (None, sample)
        if not isinstance(prompt, str | None) or not isinstance(image, Image.Image):
            raise TypeError(f"`images` takes PIL images, or pairs of a prompt and an image; got {type(image).__name__}.")
        samples.append((prompt, image))
    return samples


def _without_local_base(concept: Concept) -> Concept:
    """Drop a base model that is a folder of this machine, whose path is nobody else's business."""
    base = str(concept.metadata.get("base_model") or "")
    if REPO_ID.fullmatch(base) or not set(base) & set("/\\"):
        return concept
    return replace(concept, metadata={k: v for k, v in concept.metadata.items() if k != "base_model"})


def _write_images(folder: Path, images: Iterable[Image.Image]) -> None:
    """Write pixels alone as 0.png, 1.png, and so on."""
    for number, image in enumerate(images):
        folder.mkdir(exist_ok=True)
        pixels = image.convert("RGB")
        # PIL also writes what `info` holds: a camera's time and place (EXIF), a color profile. Programs keep prompts in it.
        pixels.info = {}
        pixels.save(folder / f"{number}.png")


def _is_new_branch(revision: str | None) -> bool:
    """Return whether a revision names a branch that may have to be created."""
    return revision is not None and revision != "main" and not revision.startswith("refs/")


def _operations(folder: Path, root: PurePosixPath, existing: Iterable[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """List what replaces an earlier concept: its surplus files are deleted, all files of `folder` are added below `root`."""
    files = {str(root / p.relative_to(folder).as_posix()): p for p in sorted(folder.rglob("*")) if p.is_file()}
    # An adapter is not deleted: only a trainer knows whether a new one replaces it.
    concept_files = {str(root / formats.file_name(component)) for component in COMPONENTS}
    sample_file = re.compile(re.escape(str(root / IMAGES)) + r"/\d+\.png")
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for path in existing:
        if path not in files and (path in concept_files or sample_file.fullmatch(path)):
            operations.append(CommitOperationDelete(path))
    for path, file in files.items():
        operations.append(CommitOperationAdd(path, file))
    return operations
