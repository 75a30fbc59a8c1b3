"""Checkpoint directories of safetensors files: their headers, read and checked without trust."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or merged; the message names the file or the tensor."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `start` is its first byte in `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """Headers of a checkpoint directory; `role` names it in messages ("init", "policy 1")."""

    role: str
    path: Path
    config: dict[str, Any]
    entries: dict[str, Entry]

    def __str__(self) -> str:
        return f"{self.role} ({self.path})"

    @property
    def names(self) -> list[str]:
        """Names in the order of the data on disk."""
        return sorted(self.entries, key=lambda n: (self.entries[n].file, self.entries[n].start, n))


def open_checkpoint(path: Path, role: str) -> Checkpoint:
    """Read the headers of a checkpoint directory, and no data.

    Raises:
        CheckpointError: no such directory, no safetensors, or a file that is truncated or corrupt.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{role}: {path} is not a directory; a model of the hub must be downloaded first "
            f"(hf download {path} --local-dir DIR)"
        )
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if single.is_file():  # as transformers reads it, whatever index a checkpoint before left
        entries = read_header(single)
    elif index.is_file():
        entries = _sharded(index)
    else:
        raise CheckpointError(f"{role}: {_why_unreadable(path)}")
    if not entries:
        raise CheckpointError(f"{role}: {path} holds no tensors")
    config = path / "config.json"
    return Checkpoint(role, path, _read_object(config) if config.is_file() else {}, entries)


def _why_unreadable(path: Path) -> str:
    if any(path.glob("adapter_model.*")):
        return f"{path} is an adapter; merge it into its model first (peft: merge_and_unload)"
    if any(path.glob("*.bin")) or any(path.glob("*.pt")):
        return (
            f"{path} holds pickled weights only; save it again with transformers "
            "(AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)) to get safetensors"
        )
    return f"{path} holds neither model.safetensors nor model.safetensors.index.json"


def _sharded(index: Path) -> dict[str, Entry]:
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    headers = {}
    for name in sorted({str(file) for file in weight_map.values()}):
        file = index.parent / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, but {index.name} lists it")
        headers[name] = read_header(file)
    for tensor, name in weight_map.items():
        if tensor not in headers[name]:
            raise CheckpointError(
                f"{index.parent / name} lacks {tensor}, which the index puts there"
            )
    listed = {tensor: headers[name][tensor] for tensor, name in weight_map.items()}
    unlisted = sorted({tensor for header in headers.values() for tensor in header} - listed.keys())
    if unlisted:
        raise CheckpointError(f"{index} does not list {unlisted[:5]}, which its files hold")
    return listed


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, checked against the size of the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise CheckpointError(f"{path} is a git-lfs pointer, not the file; run git lfs pull")
        if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{path} is truncated or corrupt: {size} bytes, header {length}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {n: _entry(path, n, f, 8 + length) for n, f in header.items()}
        except CheckpointError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} has a corrupt header: {error!r}") from None
    _check_extent(path, entries, 8 + length, size)
    return entries


def _entry(path: Path, name: str, fields: dict[str, Any], base: int) -> Entry:
    code, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    if code not in DTYPES:
        raise CheckpointError(
            f"{path}: {name} is {code}, which cannot be merged, only {', '.join(DTYPES)}; merge "
            "the full-precision weights"
        )
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"shape {shape} and data_offsets {[begin, end]} must be counts")
    entry = Entry(path, DTYPES[code], tuple(shape), base + begin)
    if end - begin != entry.nbytes:
        raise ValueError(f"{code} {shape} takes {entry.nbytes} bytes, not {end - begin}")
    return entry


def _check_extent(path: Path, entries: dict[str, Entry], base: int, size: int) -> None:
    """The tensors must fill the file without gaps or overlaps."""
    end = base
    for name, entry in sorted(entries.items(), key=lambda e: (e[1].start, e[1].nbytes)):
        if entry.start != end:
            raise CheckpointError(f"{path} is corrupt: {name} starts at {entry.start}, not {end}")
        end += entry.nbytes
    if end != size:
        raise CheckpointError(
            f"{path} is truncated or corrupt: its tensors end at byte {end}, the file at {size}"
        )
