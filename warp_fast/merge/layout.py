"""Where every tensor lies in the safetensors files of an output; known before any data."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch

from warp_fast.merge.checkpoint import DTYPES

MAX_FILE_BYTES = 5_000_000_000  # larger outputs are split, as transformers does
_ALIGNMENT = 64  # of the first tensor, so that readers can map the file
_CODES = {dtype: code for code, dtype in DTYPES.items()}

NamedShape = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file: its header, and the first byte of each of its tensors."""

    name: str
    header: bytes
    starts: dict[str, int]
    size: int


def output_files(tensors: list[NamedShape]) -> list[OutputFile]:
    """Split tensors into files of at most MAX_FILE_BYTES, in the given order."""
    groups: list[list[NamedShape]] = [[]]
    room = MAX_FILE_BYTES
    for tensor in tensors:
        if _nbytes(tensor) > room and groups[-1]:
            groups.append([])
            room = MAX_FILE_BYTES
        groups[-1].append(tensor)
        room -= _nbytes(tensor)
    if len(groups) == 1:
        return [_output_file("model.safetensors", groups[0])]
    return [
        _output_file(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group)
        for i, group in enumerate(groups, 1)
    ]


def index_json(files: list[OutputFile]) -> str:
    """The index that transformers reads beside more than one file."""
    total = sum(file.size - min(file.starts.values()) for file in files)
    weight_map = {name: file.name for file in files for name in file.starts}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


def _nbytes(tensor: NamedShape) -> int:
    return math.prod(tensor[2]) * tensor[1].itemsize


def _output_file(name: str, tensors: list[NamedShape]) -> OutputFile:
    # widest dtypes first keeps every tensor aligned to its own size
    ordered = sorted(tensors, key=lambda tensor: -tensor[1].itemsize)
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ends = [0]
    for key, dtype, shape in ordered:
        ends.append(ends[-1] + _nbytes((key, dtype, shape)))
        fields[key] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": ends[-2:]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    base = 8 + len(text)
    starts = {t[0]: base + at for t, at in zip(ordered, ends[:-1], strict=True)}
    return OutputFile(name, len(text).to_bytes(8, "little") + text, starts, base + ends[-1])
