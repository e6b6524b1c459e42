"""The file: one tensor, scale · direction, that stock diffusers reads, with direction and scale kept apart in its header."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = 1
STEM, SUFFIX = "learned_embeds", ".safetensors"
COMPONENTS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def file_name(component: str) -> str:
    """`learned_embeds.safetensors` for "text_encoder", `learned_embeds_2.safetensors` for "text_encoder_2", and so on."""
    return STEM + component.removeprefix("text_encoder") + SUFFIX


def component_of(name: str) -> str:
    """The component that a file's name stands for, as above; "text_encoder" for names of other kinds."""
    return next((c for c in COMPONENTS if file_name(c) == name), COMPONENTS[0])


def write(folder: Path, placeholder: str, embeddings: Mapping[str, Tensor], headers: Mapping[str, dict[str, Any]]) -> None:
    """Write each component's (n, d) under the name `placeholder`; its header becomes the JSON under "dti".

    All files are written before any takes its place, and then those of components that the concept lacks are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[Path, str] = {}
    try:
        for component, rows in embeddings.items():
            path = folder / file_name(component)
            handle, written[path] = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
            os.close(handle)
            metadata = {"format": "pt", "dti": json.dumps({"version": VERSION, **headers[component]})}
            save_file({placeholder: rows.detach().float().cpu().contiguous()}, written[path], metadata=metadata)
            os.chmod(written[path], 0o666 & ~_umask())  # mkstemp's files are private
        while written:
            path, temporary = next(iter(written.items()))
            os.replace(temporary, path)
            del written[path]
    finally:
        for temporary in written.values():
            os.unlink(temporary)
    for component in set(COMPONENTS) - set(embeddings):
        (folder / file_name(component)).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read(path: Path) -> tuple[str, Tensor, dict[str, Any] | None]:
    """The placeholder, the embeddings (n, d) float32, and our header, None in other programs' files.

    Raises:
        ValueError: for a file that is no safetensors file, holds other than one tensor, is of a newer version, or has a
            header that disagrees with its tensor by more than 1e-4.
    """
    if path.suffix in (".bin", ".pt", ".pth"):
        raise ValueError(f"{path} is a pickle, which can run code when it is read. Convert it to safetensors first.")
    try:
        with safe_open(path, framework="pt") as f:
            tensors, metadata = {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if len(tensors) != 1:
        raise ValueError(f"{path} must hold one tensor, named after its placeholder; it holds {sorted(tensors)}.")
    ((placeholder, embeddings),) = tensors.items()
    embeddings = torch.atleast_2d(embeddings).float()
    header = _header(path, metadata["dti"], torch.linalg.vector_norm(embeddings, dim=-1)) if "dti" in metadata else None
    return placeholder, embeddings, header


def _header(path: Path, text: str, norms: Tensor) -> dict[str, Any]:
    try:
        header = json.loads(text)
        version, component, scale = header["version"], header["component"], torch.tensor(header["scale"], dtype=torch.float32)
        if version > VERSION:
            raise ValueError(f"it is of version {version}, this package reads {VERSION}: update diffusers-dti")
        if component not in COMPONENTS:
            raise ValueError(f"there is no component {component!r}, only {', '.join(COMPONENTS)}")
        # `not <=` catches NaN as well
        if scale.shape != norms.shape or not ((norms - scale).abs() <= 1e-4 * scale).all():
            raise ValueError(f"its scales {scale.tolist()} are not the norms of the rows, {norms.tolist()}")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} has a header that cannot be used: {error!s}.") from error
    return header
