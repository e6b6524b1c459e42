"""Write safetensors files that are always the same for the same contents."""

import json
from pathlib import Path

from safetensors.torch import save
from torch import Tensor


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file with a sorted header, always the same: safetensors itself orders metadata at random."""
    made = save(tensors, metadata)
    length = int.from_bytes(made[:8], "little")
    header = json.dumps(json.loads(made[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + made[8 + length :])
