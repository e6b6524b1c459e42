"""The file: one tensor, scale · direction, that stock diffusers reads, with direction and scale kept apart in its header."""

import json
import os
import tempfile
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


def write(path: Path, placeholder: str, embeddings: Tensor, header: dict[str, Any]) -> None:
    """Write `embeddings` (n, d) under the name `placeholder`; `header` becomes the JSON under "dti". Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "dti": json.dumps({"version": VERSION, **header})}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file({placeholder: embeddings.detach().float().cpu().contiguous()}, temporary, metadata=metadata)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


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
    header = json.loads(metadata["dti"]) if "dti" in metadata else None
    if header is not None:
        if header["version"] > VERSION:
            raise ValueError(f"{path} is of version {header['version']}, this package reads {VERSION}: update diffusers-dti.")
        scale = torch.tensor(header["scale"])
        norms = torch.linalg.vector_norm(embeddings, dim=-1)
        if scale.shape != norms.shape or ((norms - scale).abs() > 1e-4 * scale.clamp_min(1)).any():
            raise ValueError(f"{path}: the header's scales {scale.tolist()} are not the norms of its rows, {norms.tolist()}.")
    return placeholder, embeddings, header
