"""Read torch's pickles (`.pt`, `.bin`) for their tensors alone, which must not be much larger than their file."""

import os
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

SAFE_TORCH = "2.10.0"
MAX_GROWTH = 4  # times the file's size: a tensor under two names, or in two layouts, is stored once
LEGACY_PICKLES = 5  # in a file of torch before 1.6; raw numbers follow

# What dense tensors in dicts need, as pickles name it. torch's own list for `weights_only` is longer: some of it makes sparse,
# quantized or meta tensors, and `bytearray(10**10)` makes 10 GB of zeros.
_STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
ALLOWED_NAMES = {f"torch {kind}Storage" for kind in _STORAGES} | {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
    # the files of the first textual inversion: a module, and a set in it
    "torch.nn.modules.container ParameterDict",
    "__builtin__ set",
}


def read_pickle(path: Path) -> Any:
    """Return what a pickle holds, without running code in it.

    Args:
        path: a file that `torch.save` wrote.

    Returns:
        A tensor or a dict, usually. Modules in it are dicts of their parameters.

    Raises:
        ValueError: if torch is too old to do this safely, if the file is damaged or holds more than dense tensors, or if its
            contents take more than `MAX_GROWTH` times the memory that the file takes on the disk.
    """
    if TorchVersion(torch.__version__) < SAFE_TORCH:
        raise ValueError(
            f"{path} is a pickle, which is read only with torch 2.10 or newer: in torch {torch.__version__} it could run code "
            "or corrupt memory (CVE-2025-32434, CVE-2026-24747). Upgrade torch, or convert the file elsewhere by `dti convert`."
        )
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            needed = _unpacked_size(file)
            saved = _load(file) if needed <= MAX_GROWTH * size else None
            needed = max(needed, _size_of_tensors(saved))
        except Exception as error:  # damaged bytes lead to errors of many kinds, OSError among them
            raise ValueError(f"{path} is damaged, or a pickle of more than tensors, which is not read.") from error
    if needed > MAX_GROWTH * size:
        raise ValueError(
            f"{path} has {size} bytes and would take {needed} in memory: tensors must be stored in full, not compressed, "
            "expanded or shared. Save them anew as safetensors where the file comes from."
        )
    return saved


def _is_zip(file: IO[bytes]) -> bool:
    file.seek(0)
    return file.read(4) == b"PK\x03\x04"  # as torch does it: a pickle may end like an archive


def _unpacked_size(file: IO[bytes]) -> int:
    """Return the number of bytes in an archive after decompression; 0 for a file that is not an archive."""
    if not _is_zip(file):
        return 0
    with zipfile.ZipFile(file) as archive:
        return sum(info.file_size for info in archive.infolist())


def _load(file: IO[bytes]) -> Any:
    """Return what a file holds, after a look at all names in its pickles."""
    if _is_zip(file):
        with zipfile.ZipFile(file) as archive:
            # torch takes the name in any case, so there must be only one such.
            (name,) = (name for name in archive.namelist() if name.lower().endswith("data.pkl"))
            with archive.open(name) as pickle:
                _check_names(pickle)
    else:
        file.seek(0)
        for _ in range(LEGACY_PICKLES):
            _check_names(file)
    file.seek(0)
    with torch.serialization.safe_globals([torch.nn.ParameterDict]):
        # An open file, not a path: torch goes by a path's suffix.
        saved = _as_dict(torch.load(file, map_location="cpu", weights_only=True))
    return {key: _as_dict(value) for key, value in saved.items()} if isinstance(saved, dict) else saved


def _check_names(pickle: IO[bytes]) -> None:
    """Check the names in a pickle, up to its end. Other ways to name something are refused by torch."""
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name == "GLOBAL" and argument not in ALLOWED_NAMES:
            raise ValueError(f"it names {argument}")


def _as_dict(value: Any) -> Any:
    """Return a mapping or a module of parameters as a plain dict, because pickles can replace attributes of other objects."""
    if isinstance(value, torch.nn.ParameterDict):
        return dict(value.named_parameters(recurse=False))
    return dict(value) if isinstance(value, Mapping) else value


def _size_of_tensors(saved: Any) -> int:
    """Return the bytes of all tensors where a concept may have them, each counted in full."""
    values = list(saved.values()) if isinstance(saved, dict) else [saved]
    for value in list(values):
        if isinstance(value, dict):
            values += value.values()
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
