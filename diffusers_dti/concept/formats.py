"""Files: ours, one tensor, scale · direction, that stock diffusers reads, with direction and scale kept apart in its header;
and everyone else's, recognised by what is in them (`foreign`)."""

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import third_party
from .registry import COMPONENTS

VERSION = 1
STEM, SUFFIX = "learned_embeds", ".safetensors"


class StoredConcept(NamedTuple):
    """What a file or a state dict says of a concept; the rows are as they stand there, to the bit."""

    placeholder: str | None
    rows: dict[str, Tensor]  # (n, d) float32 by component
    scales: dict[str, Tensor]  # (n,), of our own files alone
    metadata: dict[str, Any]


def file_name(component: str, suffix: str = SUFFIX) -> str:
    """`learned_embeds.safetensors` for "text_encoder", `learned_embeds_2.safetensors` for "text_encoder_2", and so on."""
    return STEM + component.removeprefix("text_encoder") + suffix


def component_of(name: str) -> str:
    """The component that a file's name stands for, as above; "text_encoder" for names of other kinds."""
    return next((c for c in COMPONENTS if file_name(c, Path(name).suffix) == name), COMPONENTS[0])


def write(folder: Path, placeholder: str, embeddings: Mapping[str, Tensor], headers: Mapping[str, dict[str, Any]]) -> None:
    """Write each component's (n, d) under the name `placeholder`; its header becomes the JSON under "dti".

    All files are written before any takes its place, and then those of components that the concept lacks are removed.
    """
    if unknown := sorted(set(embeddings) - set(COMPONENTS)):
        raise ValueError(f"Concepts of {', '.join(unknown)} have no file; there are those of {', '.join(COMPONENTS)}.")
    write_files({folder / file_name(c): ({placeholder: rows}, headers[c]) for c, rows in embeddings.items()})
    for component in set(COMPONENTS) - set(embeddings):
        (folder / file_name(component)).unlink(missing_ok=True)


def write_files(files: Mapping[Path, tuple[Mapping[str, Tensor], dict[str, Any]]]) -> None:
    """Write tensors with their header, file by file, all of them before any takes its place."""
    written: dict[Path, str] = {}
    try:
        for path, (tensors, header) in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, written[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            os.close(handle)
            metadata = {"format": "pt", "dti": json.dumps({"version": VERSION, **header})}
            plain = {name: rows.detach().float().cpu().contiguous() for name, rows in tensors.items()}
            save_file(plain, written[path], metadata=metadata)
            os.chmod(written[path], 0o666 & ~_umask())  # mkstemp's files are private
        while written:
            path, temporary = next(iter(written.items()))
            os.replace(temporary, path)
            del written[path]
    finally:
        for temporary in written.values():
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read(path: Path, placeholder: str | None = None, allow_pickle: bool = False) -> StoredConcept:
    """What a file holds. Of a file with several concepts, `placeholder` says which one.

    Raises:
        ValueError: for a pickle without `allow_pickle`, a file that is no textual inversion, is of a newer version, or has a
            header that disagrees with its tensor by more than 1e-4.
    """
    tensors, metadata = _tensors(path, allow_pickle)
    header = _header(path, metadata["dti"]) if "dti" in metadata else {}
    if "component" in header:
        if len(tensors) != 1:
            raise ValueError(f"{path} must hold one tensor, named after its placeholder; it holds {sorted(tensors)}.")
        ((word, rows),) = tensors.items()
        rows, component = torch.atleast_2d(rows).float(), header.pop("component")
        scale = _checked_scale(path, header.pop("scale", None), torch.linalg.vector_norm(rows, dim=-1))
        return StoredConcept(word, {component: rows}, {component: scale}, header)
    word = header.pop("placeholder_token", None)  # what we wrote for other programs
    try:
        contents = from_tensors(tensors, placeholder, component_of(path.name))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    # without a name inside, the file's own, as A1111 and ComfyUI take it
    word = word or contents.placeholder or (None if path.stem.startswith(STEM) else path.stem)
    return contents._replace(placeholder=word, metadata=header | contents.metadata)


def from_tensors(tensors: Any, placeholder: str | None = None, default: str = COMPONENTS[0]) -> StoredConcept:
    """The same for what another program's file holds; rows for no encoder in particular are for the component `default`.

    The metadata's "encoders" has the key of each encoder, None where the file has none: loading finds the place by it.
    """
    concepts = third_party.parse_state_dict(tensors)
    if len(concepts) > 1 and placeholder not in concepts:
        raise ValueError(
            f"it holds {', '.join(map(str, concepts))}: say which with `token` (`placeholder_token`, `--placeholder`)"
        )
    word = placeholder if placeholder in concepts else next(iter(concepts))
    parts = concepts[word]
    encoders = third_party.assign_components(parts, default)
    return StoredConcept(word, {c: parts[k] for c, k in encoders.items()}, {}, {"encoders": encoders})


def _tensors(path: Path, allow_pickle: bool) -> tuple[Any, dict[str, str]]:
    """What a file holds, and the metadata of a safetensors file."""
    with path.open("rb") as file:
        start = file.read(9)
    # a safetensors file starts with the length of its header, a pickle with its version, or as a zip archive
    if start[8:] != b"{" and start.startswith((b"\x80", b"PK")):
        if not allow_pickle:
            raise ValueError(
                f"{path} is a pickle, which is read only with `allow_pickle=True` (`--allow_pickle`), and then for its tensors "
                "alone: code in it is never run."
            )
        # torch 2.4 has none; the first textual inversion's files hold this module, which is a dict
        allowed = getattr(torch.serialization, "safe_globals", lambda names: nullcontext())
        try:
            with allowed([torch.nn.ParameterDict]), path.open("rb") as file:  # torch goes by a path's ending
                return torch.load(file, map_location="cpu", weights_only=True), {}
        except Exception as error:  # whatever torn bytes lead to
            if isinstance(error, OSError):
                raise
            raise ValueError(f"{path} is torn, or a pickle of more than tensors, which is not read.") from error
    try:
        with safe_open(path, framework="pt") as f:
            names = [k for k in f.keys() if k.startswith(third_party.BUNDLE_PREFIX)] or f.keys()  # without the LoRA around them
            return {k: f.get_tensor(k) for k in names}, f.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _header(path: Path, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
        version = header.pop("version")
        if not isinstance(version, int):
            raise ValueError(f"its version is {version!r}")
        if version > VERSION:
            raise ValueError(f"it is of version {version}, this package reads {VERSION}: update diffusers-dti")
        if "placeholder_token" not in header and header["component"] not in COMPONENTS:
            raise ValueError(f"there is no component {header['component']!r}, only {', '.join(COMPONENTS)}")
        if not isinstance(header.get("placeholder_token", ""), str):
            raise ValueError("its placeholder must be a word")
        if not all(isinstance(key, str | None) for key in header.get("encoders", {}).values()):
            raise ValueError("its encoders must be keys by component")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} has a header that cannot be used: {error!s}.") from error
    return header


def _checked_scale(path: Path, value: Any, norms: Tensor) -> Tensor:
    try:
        scale = torch.tensor(value, dtype=torch.float32)
        # `not <=` catches NaN as well
        if scale.shape != norms.shape or not ((norms - scale).abs() <= 1e-4 * scale).all():
            raise ValueError(f"its scales {scale.tolist()} are not the norms of the rows, {norms.tolist()}")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} has a header that cannot be used: {error!s}.") from error
    return scale
