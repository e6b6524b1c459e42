"""Damage valid input at random: bytes, JSON values, the headers of safetensors files, pickles."""

import copy
import io
import json
import struct

import torch

# What nobody means, and what other types can be mistaken for.
WEIRD = [
    None, True, False, 0, -1, 1, 1.5, 1e39, 1e-46, 10**400, -0.0, float("inf"), float("nan"), "", " ", "{}", "<a>", "a" * 5000,
    "\x1b[31mred", "two\nlines", "\ud800", "\x00", "../../x", "hf_" + "a" * 34, "１", "🐕", [], {}, [[]], [None], {"": {}},
    ["text_encoder"], {"a": 1}, [1.0] * 100, "1", "0.1", "nan", "true",
]  # fmt: skip


def damaged_bytes(data, rng):
    """Return bytes with a few of them cut, changed, repeated or put elsewhere."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        start, length = rng.randrange(len(data) + 1), rng.choice([1, 2, 8, 64, 1000])
        kind = rng.randrange(6)
        if kind == 0:
            del data[start:]
        elif kind == 1:
            del data[start : start + length]
        elif kind == 2:
            data[start:start] = rng.randbytes(length)
        elif kind == 3:
            data[start : start + length] = rng.randbytes(len(data[start : start + length]))
        elif kind == 4:
            data[start:start] = data[start : start + length]
        elif start < len(data):
            data[start] ^= 1 << rng.randrange(8)
    return bytes(data)


def damaged_value(value, rng, weird=WEIRD):
    """Return a JSON value with one of its parts replaced, left out or added."""
    value = copy.deepcopy(value)
    holders = [holder for holder in _containers(value) if holder]
    if not holders or rng.random() < 0.05:
        return rng.choice(weird)
    holder = rng.choice(holders)
    key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(rng.choice(weird))] = holder[key]
    elif kind == 2 and isinstance(holder, list):
        holder.extend(holder * rng.choice([1, 200]))
    else:
        holder[key] = rng.choice(weird)
    return value


def _containers(value):
    if isinstance(value, dict | list):
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from _containers(part)


def damaged_json(text, rng):
    """Return a JSON text as bytes with a value or some bytes damaged, in one encoding or another."""
    if rng.random() < 0.3:
        return damaged_bytes(text.encode(), rng)
    if rng.random() < 0.05:
        return rng.choice([b"[" * 100_000, b'{"a":' * 100_000])
    changed = json.dumps(damaged_value(json.loads(text), rng), ensure_ascii=rng.random() < 0.5)
    return changed.encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]), "replace")


def damaged_safetensors(data, rng):
    """Return a safetensors file with its bytes, its header, or the header of ours inside it damaged."""
    if rng.random() < 0.3:
        return damaged_bytes(data, rng)
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.get("__metadata__", {})
    if "dti" in metadata and rng.random() < 0.7:
        metadata["dti"] = damaged_json(metadata["dti"], rng).decode("utf-8", "replace")
    elif rng.random() < 0.2:
        (name,) = rng.sample([name for name in header if name != "__metadata__"], 1)
        header[name]["dtype"] = rng.choice(["F64", "F16", "BF16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "X"])
    else:
        header = damaged_value(header, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) + rng.choice([0, 0, 0, 0, 1, -1])) + text + rest


class Hostile:
    """Runs code when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


def hostile_pickle(rng, marker):
    """Return a pickle of torch of tensors of odd kinds, or of more than tensors."""
    rows = torch.randn(2, 16)
    odd = [
        rows, rows.half(), rows.bool(), rows.long(), rows.to(torch.complex64), rows.to_sparse(), rows[:, :0], rows[0, 0],
        rows * 0, torch.zeros(1).expand(2, 16), torch.zeros(1).expand(1000, 1000, 1000), rows / 0, rows.T,
        rows.clone().requires_grad_(),
        rows.to(torch.float8_e4m3fn), torch.quantize_per_tensor(rows.detach(), 0.1, 0, torch.qint8), rows.to("meta"),
        Hostile(marker), print, "text", None, 3, [rows], {"a": rows}, {"string_to_param": {"*": rows}}, {"clip_l": rows},
    ]  # fmt: skip
    value = rng.choice(odd)
    for _ in range(rng.choice([0, 1, 1, 2])):
        key = rng.choice(["<a>", "*", "string_to_param", "string_to_token", "clip_g", "clip_l", "emb_params", "", 7])
        value = {key: value, **({rng.choice(["name", "step", "clip_l"]): rng.choice(odd)} if rng.random() < 0.3 else {})}
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=rng.random() < 0.7)
    return damaged_bytes(file.getvalue(), rng) if rng.random() < 0.3 else file.getvalue()
