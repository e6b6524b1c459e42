"""Find a concept (Hub id, folder, file or state dict) and read what is stored there, its rows unchanged bit for bit."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import EntryNotFoundError

from . import formats, hub, third_party
from .formats import StoredConcept
from .registry import COMPONENTS


def read_stored(
    source: str | Path | Mapping[str, Any],
    placeholder_token: str | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
    allow_pickle: bool = False,
    **hub_kwargs: Any,
) -> StoredConcept:
    """Read a concept's rows bit for bit as they are stored.

    For the arguments and errors, see `DirectionalInversion.from_pretrained`.

    Returns:
        What is stored. Its placeholder is None if neither the source nor `placeholder_token` names one.
    """
    if isinstance(source, Mapping):
        return _read_state_dict(source, placeholder_token)
    if not isinstance(source, str | Path):
        raise TypeError(f"One concept at a time, from a Hub id, a path or a state dict; got a {type(source).__name__}.")
    if hub.CREDENTIAL.match(str(source)):  # before it is sent in an address or repeated in a message
        raise ValueError("The source looks like a Hub credential: give a Hub id or a path, and the credential as `hf_token`.")
    subfolder = subfolder.strip("/") if subfolder else None
    files = _find_local_files(Path(source) / (subfolder or ""), weight_name)
    if files is None:
        files = _find_hub_files(str(source), weight_name, subfolder, allow_pickle, hub_kwargs)
    parts = [formats.read(path, placeholder_token, allow_pickle) for path in files]
    if weight_name is None:
        _check_save(source, parts)
    return _merge(source, parts, placeholder_token)


def describe_source(source: str | Path | Mapping[str, Any]) -> str:
    """Name a source for messages."""
    return "This state dict" if isinstance(source, Mapping) else str(source)


@contextmanager
def errors_named(source: str | Path | Mapping[str, Any]) -> Iterator[None]:
    """Name the source in a ValueError about what is stored there."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{describe_source(source)}: {error}") from error


def _read_state_dict(tensors: Mapping[str, Any], placeholder_token: str | None) -> StoredConcept:
    """Read a concept from rows by component, or from what another program's file holds."""
    try:
        if tensors and set(tensors) <= set(COMPONENTS):
            rows = {component: third_party.as_rows(own) for component, own in tensors.items()}
            return StoredConcept(placeholder_token, rows, {}, {})
        stored = formats.from_tensors(tensors, placeholder_token)
    except ValueError as error:
        raise ValueError(f"{describe_source(tensors)} cannot be used: {error}.") from error
    return stored._replace(placeholder=placeholder_token or stored.placeholder)


def _check_save(source: str | Path, parts: list[StoredConcept]) -> None:
    """Check that the files of a folder are one save, and all of it.

    Raises:
        ValueError: if they are not, as when a process was killed while it replaced them.
    """
    if len({part.save for part in parts}) > 1:
        raise ValueError(
            f"{source}: its files are of several saves, not of one. Save the concept there again, or read one file alone with "
            "`weight_name`."
        )
    missing = frozenset().union(*(part.components for part in parts)) - {name for part in parts for name in part.rows}
    if missing and not Path(source).is_file():  # a file of its own may be given
        names = ", ".join(formats.file_name(component) for component in sorted(missing))
        raise ValueError(f"{source} lacks {names}: save the concept there again, or read one file alone with `weight_name`.")


def _merge(source: str | Path, parts: list[StoredConcept], placeholder_token: str | None) -> StoredConcept:
    """Combine what the files of a concept hold, each for other text encoders."""
    whole = StoredConcept(placeholder_token, {}, {}, {})
    for part in parts:
        both = whole.rows.keys() & part.rows.keys()
        if both:
            raise ValueError(f"{source}: two of its files are for {', '.join(both)}.")
        metadata = whole.metadata | part.metadata
        encoders = whole.metadata.get("encoders", {}) | part.metadata.get("encoders", {})
        if encoders:
            metadata["encoders"] = encoders
        whole = StoredConcept(placeholder_token, whole.rows | part.rows, whole.scales | part.scales, metadata)
    placeholders = {part.placeholder for part in parts}
    if placeholder_token is None and len(placeholders) > 1:
        raise ValueError(
            f"{source}: its files name different placeholders, {placeholders!s:.200}: choose one with `placeholder_token`."
        )
    return whole._replace(placeholder=placeholder_token or placeholders.pop())


def _names(weight_name: str | None, suffix: str = formats.SUFFIX) -> list[str]:
    """List the file names that a concept may have."""
    return [weight_name] if weight_name else [formats.file_name(c, suffix) for c in COMPONENTS]


def _find_local_files(path: Path, weight_name: str | None) -> list[Path] | None:
    """Return the files of a path on disk, or None if the path does not exist.

    Raises:
        OSError: if a folder has no concept in it.
    """
    suffixes: tuple[str, ...] = (formats.SUFFIX, ".bin")
    if path.is_file():
        if weight_name or path.name != formats.file_name(COMPONENTS[0], path.suffix):
            return [path]
        # A concept's first file stands for the whole concept.
        path, suffixes = path.parent, (path.suffix,)
    if not path.is_dir():
        return None
    for suffix in suffixes:
        files = [path / name for name in _names(weight_name, suffix) if (path / name).is_file()]
        if files:
            return files
    inside = sorted({p.parent.name for p in path.glob(f"*/{formats.STEM}*{formats.SUFFIX}")})
    other = f" Concepts are in its folders {', '.join(inside)}." if inside else ""
    raise OSError(f"{path} has no {' or '.join(_names(weight_name))}; give the file's name with `weight_name`.{other}")


def _find_hub_files(
    repo_id: str, weight_name: str | None, subfolder: str | None, allow_pickle: bool, hub_kwargs: dict[str, Any]
) -> list[Path]:
    """Return the files of a repository, downloaded to the Hub's cache.

    Raises:
        OSError: if the repository has no concept, or the Hub refuses.
    """
    beside = sorted(path.parent.name for path in Path(repo_id).parent.glob(f"*/{formats.STEM}*{formats.SUFFIX}"))
    if beside:
        raise OSError(f"{repo_id} does not exist. Beside it there are {', '.join(dict.fromkeys(beside))}.")
    suffixes = (formats.SUFFIX, ".bin") if allow_pickle and not weight_name else (formats.SUFFIX,)
    folder = f"{subfolder}/" if subfolder else ""
    candidates = []
    for suffix in suffixes:
        candidates.append([folder + name for name in _names(weight_name, suffix)])
    try:
        return hub.download(repo_id, candidates, **hub_kwargs)
    except EntryNotFoundError as missing:
        raise OSError(
            f"{repo_id} has no {' or '.join(_names(weight_name))}. Files with other names need `weight_name`; pickles such as "
            "learned_embeds.bin are read only with `allow_pickle=True`."
        ) from missing
