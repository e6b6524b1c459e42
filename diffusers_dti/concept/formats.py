"""Read and write files of concepts.

A file of ours holds one tensor, scale · direction, which stock diffusers reads. Its header keeps the scale apart, so that
direction and scale come back as they were. Files of other programs are recognized by their content (`third_party`).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..atomic import atomic_files
from ..parsing import parse_json
from . import third_party
from .checks import check_header, check_scale
from .concept import Concept
from .pickles import read_pickle
from .registry import COMPONENTS
from .sorted_file import save_file

VERSION = 1
STEM, SUFFIX = "learned_embeds", ".safetensors"


class StoredConcept(NamedTuple):
    """What a file or a state dict says about a concept, its rows unchanged bit for bit.

    Args:
        placeholder: the placeholder, or None if the source does not name one.
        rows: (n, d) float32 by component.
        scales: (n,) by component; only our own files have them.
        metadata: JSON values.
        save: the save that a file of ours belongs to; None for other sources.
        components: all components of that save.
    """

    placeholder: str | None
    rows: dict[str, Tensor]
    scales: dict[str, Tensor]
    metadata: dict[str, Any]
    save: str | None = None
    components: frozenset[str] = frozenset()


def file_name(component: str, suffix: str = SUFFIX) -> str:
    """Name a component's file: `learned_embeds.safetensors`, `learned_embeds_2.safetensors`, and so on."""
    return STEM + component.removeprefix("text_encoder") + suffix


def component_of(name: str) -> str:
    """Return the component that a file name stands for; "text_encoder" for names of other programs."""
    for component in COMPONENTS:
        if name == file_name(component, Path(name).suffix):
            return component
    return COMPONENTS[0]


# ------------------------------------------------------------------------------------------------------------- writing
def write_concept(folder: str | Path, concept: Concept) -> None:
    """Write a concept into a folder; see `write`."""
    write(folder, concept.placeholder_token, concept.embeddings, concept.scales, concept.metadata)


def write(
    folder: str | Path,
    placeholder: str,
    rows: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """Write rows into a folder, one file for each component. They replace the folder's earlier concept as a whole.

    Args:
        folder: created if needed.
        placeholder: the name of the tensor in each file.
        rows: (n, d) by component.
        scales: the norms of the rows, (n,) by component.
        metadata: JSON values for every file's header.

    Raises:
        ValueError: if a component has no file, or the metadata could not be read again.
    """
    folder, unknown = Path(folder), sorted(set(rows) - set(COMPONENTS))
    if unknown:
        raise ValueError(f"Concepts for {', '.join(unknown)} cannot be saved, only those for {', '.join(COMPONENTS)}.")
    try:
        check_header(metadata)
    except ValueError as error:
        raise ValueError(f"The metadata of {placeholder} cannot be saved: {error!s}.") from error
    files = {}
    # A process that is killed between two renames leaves files of two saves. Each file says which one it is of.
    whole = {"save": _digest(placeholder, rows, scales, metadata), "components": sorted(rows)}
    for component, own in rows.items():
        header = {**metadata, "component": component, "scale": scales[component].tolist(), **whole}
        files[folder / file_name(component)] = {placeholder: own}, header
    write_files(files)
    for component in set(COMPONENTS) - set(rows):
        (folder / file_name(component)).unlink(missing_ok=True)


def _digest(placeholder: str, rows: Mapping[str, Tensor], scales: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Return a name for a save: the same for the same concept, so that its files are the same, byte for byte."""
    own = [[c, rows[c].detach().float().cpu().tolist(), scales[c].tolist()] for c in sorted(rows)]
    parts = [placeholder, json.dumps(metadata, sort_keys=True), own]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def write_files(files: Mapping[Path, tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> None:
    """Write safetensors files, all of them before any takes its place.

    Args:
        files: the tensors by name and the header of each file. The header becomes the JSON under "dti".
    """
    with atomic_files(files) as temporary:
        for path, (tensors, header) in zip(temporary, files.values(), strict=True):
            plain = {name: rows.detach().float().cpu().contiguous() for name, rows in tensors.items()}
            save_file(plain, path, {"format": "pt", "dti": json.dumps({"version": VERSION, **header})})


# ------------------------------------------------------------------------------------------------------------- reading
def placeholder_of(path: Path) -> str | None:
    """Return the placeholder in a file that this package wrote, or None for another file: its name says nothing."""
    try:
        with safe_open(path, framework="pt") as f:
            header = _parse_header(path, (f.metadata() or {})["dti"])
            return header.get("placeholder_token") or next(iter(f.keys()), None)
    except (SafetensorError, KeyError, ValueError):
        return None


def read(path: Path, placeholder: str | None = None, allow_pickle: bool = False) -> StoredConcept:
    """Read a file of ours or of another program.

    Args:
        path: the file.
        placeholder: which concept to read from a file with several.
        allow_pickle: read pickles as well, for their tensors alone.

    Raises:
        ValueError: if the file is a pickle without `allow_pickle`, is not a textual inversion, has a newer version, or has a
            header that disagrees with its tensor by more than 1e-4.
    """
    tensors, metadata = _read_tensors(path, allow_pickle)
    header = _parse_header(path, metadata["dti"]) if "dti" in metadata else {}
    if "component" in header:
        if len(tensors) != 1:
            raise ValueError(f"{path} must hold one tensor, named after its placeholder; it holds {sorted(tensors)!s:.200}.")
        ((word, tensor),) = tensors.items()
        component = header.pop("component")
        try:
            rows = third_party.as_rows(tensor)
            scale = check_scale(header.pop("scale", None), torch.linalg.vector_norm(rows, dim=-1))
        except (ValueError, OverflowError) as error:  # a whole number may be too large for any float
            raise ValueError(f"{path} has a header that cannot be used: {error!s}.") from error
        whole = header.pop("components", [])
        if not isinstance(whole, list) or not set(map(str, whole)) <= set(COMPONENTS):
            raise ValueError(f"{path} has a damaged header: its components are {whole!r:.80}.")
        save = str(header.pop("save", "")) or None
        return StoredConcept(word, {component: rows}, {component: scale}, header, save, frozenset(whole))
    word = header.pop("placeholder_token", None)  # in files that we wrote for other programs
    try:
        stored = from_tensors(tensors, placeholder, component_of(path.name))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    # Without a name inside the file its own name counts, as in A1111 and ComfyUI.
    word = word or stored.placeholder or (None if path.stem.startswith(STEM) else path.stem)
    return stored._replace(placeholder=word, metadata=header | stored.metadata)


def from_tensors(tensors: Any, placeholder: str | None = None, default: str = COMPONENTS[0]) -> StoredConcept:
    """Read a concept from what another program's file holds.

    Args:
        tensors: a tensor, or a mapping from names to tensors.
        placeholder: which concept to read, if there are several.
        default: the component of rows that name no encoder.

    Returns:
        The concept. The metadata's "encoders" has the key of each component's encoder, None if the file does not name it;
        loading finds the encoder in the pipeline by it.

    Raises:
        ValueError: if the tensors are not a textual inversion, or hold several and `placeholder` is none of them.
    """
    concepts = third_party.parse_state_dict(tensors)
    if len(concepts) > 1 and placeholder not in concepts:
        raise ValueError(
            f"it holds {', '.join(map(str, concepts)):.200}: say which with `token` (`placeholder_token`, `--placeholder`)"
        )
    word = placeholder if placeholder in concepts else next(iter(concepts))
    parts = concepts[word]
    encoders = third_party.assign_components(parts, default)
    return StoredConcept(word, {c: parts[key] for c, key in encoders.items()}, {}, {"encoders": encoders})


def _read_tensors(path: Path, allow_pickle: bool) -> tuple[Any, dict[str, str]]:
    """Return what a file holds, and the metadata of a safetensors file."""
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file starts with the length of its header; a pickle starts with its version, or as a zip archive.
    if start[8:] != b"{" and start.startswith((b"\x80", b"PK")):
        if not allow_pickle:
            raise ValueError(
                f"{path} is a pickle, which is read only with `allow_pickle=True` (`--allow_pickle`), and then for its tensors "
                "alone: code in it is never run."
            )
        return read_pickle(path), {}
    try:
        with safe_open(path, framework="pt") as f:
            bundled = [k for k in f.keys() if k.startswith(third_party.BUNDLE_PREFIX)]
            # A LoRA may bundle concepts: then its own weights, which can be large, are not read.
            return {k: f.get_tensor(k) for k in bundled or f.keys()}, f.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {str(error)!r:.200}") from error


def _parse_header(path: Path, text: str) -> dict[str, Any]:
    """Return the header in a file's metadata, checked, without its version."""
    try:
        header: dict[str, Any] = parse_json(text)
        version = header.pop("version")
        if type(version) is not int:
            raise ValueError(f"its version is {version!r:.80}")
        if version > VERSION:
            raise ValueError(f"its version is {version!r:.80}, and this package reads {VERSION}: update diffusers-dti")
        is_ours = "component" in header or "placeholder_token" not in header
        if is_ours and header["component"] not in COMPONENTS:
            raise ValueError(f"its component is {header['component']!r:.80}, not one of {', '.join(COMPONENTS)}")
        check_header(header)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} has a header that cannot be used: {error!s}.") from error
    return header
