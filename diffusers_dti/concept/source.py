"""Where concepts are read from: folders, files, state dicts, the Hub; their rows as they stand there, to the bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import formats, hub


def read_stored(
    source: str | Path | Mapping[str, Any],
    placeholder_token: str | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
    allow_pickle: bool = False,
    **hub_kwargs: Any,
) -> formats.StoredConcept:
    """The rows of a concept as they stand in its files, to the bit; see `DirectionalInversion.from_pretrained`."""
    if isinstance(source, Mapping):
        if source and set(source) <= set(formats.COMPONENTS):
            return formats.StoredConcept(placeholder_token, dict(source), {}, {})
        try:
            read = formats.from_tensors(source, placeholder_token)
        except ValueError as error:
            raise ValueError(f"{describe_source(source)} cannot be used: {error}.") from error
        return read._replace(placeholder=placeholder_token or read.placeholder)
    if not isinstance(source, str | Path):
        raise TypeError(f"One concept at a time, from a Hub id, a path or a state dict; got a {type(source).__name__}.")
    subfolder = subfolder and subfolder.strip("/")
    files = _local_files(Path(source) / (subfolder or ""), weight_name)
    if files is None:
        files = _hub_files(str(source), weight_name, subfolder, allow_pickle, hub_kwargs)
    whole = formats.StoredConcept(placeholder_token, {}, {}, {})
    names = set()
    for path in files:
        read = formats.read(path, placeholder_token, allow_pickle)
        if both := whole.rows.keys() & read.rows.keys():
            raise ValueError(f"{source}: two of its files are for {', '.join(both)}.")
        names.add(read.placeholder)
        encoders = whole.metadata.get("encoders", {}) | read.metadata.get("encoders", {})
        metadata = whole.metadata | read.metadata | ({"encoders": encoders} if encoders else {})
        whole = formats.StoredConcept(placeholder_token, whole.rows | read.rows, whole.scales | read.scales, metadata)
    if placeholder_token is None and len(names) > 1:
        raise ValueError(f"{source}: its files name different placeholders, {names}: say which with `placeholder_token`.")
    return whole._replace(placeholder=placeholder_token or names.pop())


def describe_source(source: Any) -> str:
    """What messages call a source."""
    return "This state dict" if isinstance(source, Mapping) else str(source)


def _names(weight_name: str | None, suffix: str = formats.SUFFIX) -> list[str]:
    return [weight_name] if weight_name else [formats.file_name(c, suffix) for c in formats.COMPONENTS]


def _local_files(path: Path, weight_name: str | None) -> list[Path] | None:
    """Files on disk, or None where nothing of that name is on disk."""
    suffixes = (formats.SUFFIX, ".bin")
    if path.is_file():
        if weight_name or path.name != formats.file_name(formats.COMPONENTS[0], path.suffix):
            return [path]
        path, suffixes = path.parent, (path.suffix,)  # a concept's first file stands for the whole of it
    if not path.is_dir():
        return None
    for suffix in suffixes:
        if files := [path / n for n in _names(weight_name, suffix) if (path / n).is_file()]:
            return files
    inside = sorted({p.parent.name for p in path.glob(f"*/{formats.STEM}*{formats.SUFFIX}")})
    other = f" Concepts are in its folders {', '.join(inside)}." if inside else ""
    raise OSError(f"{path} has no {' or '.join(_names(weight_name))}; give the file's name with `weight_name`.{other}")


def _hub_files(
    repo_id: str, weight_name: str | None, subfolder: str | None, allow_pickle: bool, hub_kwargs: dict[str, Any]
) -> list[Path]:
    """Files in the Hub's cache, downloaded where they are not: all of one commit."""
    from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    offline = hub_kwargs.get("local_files_only") or constants.HF_HUB_OFFLINE
    files, missing, commit = [], None, None
    try:
        for suffix in (formats.SUFFIX, ".bin") if allow_pickle and not weight_name else (formats.SUFFIX,):
            for name in [f"{subfolder}/{n}" if subfolder else n for n in _names(weight_name, suffix)]:
                if commit and try_to_load_from_cache(repo_id, name, hub_kwargs.get("cache_dir"), commit) is _CACHED_NO_EXIST:
                    continue  # for a commit that is known for good, also while the Hub is out of order
                try:
                    with hub.hub_errors(repo_id):
                        files.append(Path(hf_hub_download(repo_id, name, **hub_kwargs)))
                except EntryNotFoundError as error:
                    missing = error
                    continue
                snapshot = files[-1].parents[name.count("/")]
                if snapshot.parent.name == "snapshots":  # not with `local_dir`
                    commit = snapshot.name
                    hub_kwargs = hub_kwargs | {"revision": commit}
            if files:
                return files
    except HFValidationError as error:
        raise OSError(f"{repo_id} is neither a file or folder here nor a repository id on the Hub.") from error
    if offline and isinstance(missing, LocalEntryNotFoundError):
        raise OSError(f"{repo_id} is not in the cache, and the Hub is not to be asked: load it once online.") from missing
    raise OSError(
        f"{repo_id} has no {' or '.join(_names(weight_name))}. Files of other names are given with `weight_name`; pickles such "
        "as learned_embeds.bin are read only with `allow_pickle=True`."
    ) from missing
