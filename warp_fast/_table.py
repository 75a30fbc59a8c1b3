"""Pointer tables: how one launch finds the tensors of a list.

A table in device memory has one row per entry (a run of elements of one tensor), and a map says
which entry each program works on.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

LANES = 8  # elements: 16 bytes of bf16; runs of 2- and 4-byte elements this long are whole vectors
_ALIGNMENT = 16  # bytes of the widest load
_KEPT = 32 << 20  # bytes of tables; past that those used longest ago go

# the numbers of csrc/codes.h
CODE = {
    torch.bfloat16: 0,
    torch.float16: 1,
    torch.float32: 2,
    torch.float64: 3,
    torch.int16: 4,
}
FULL, SPLIT, STOCHASTIC = range(3)  # storages of an EMA


class Entry(NamedTuple):
    """Elements [offset, offset + size) of tensor number `tensor`, in `blocks` blocks.

    `row` counts the blocks of the entries before it, over all launches.
    """

    tensor: int
    offset: int
    size: int
    codes: tuple[int, ...]
    aligned: bool
    blocks: int
    row: int


class Launch(NamedTuple):
    """The entries of one combination of dtypes and alignment, as a kernel reads them.

    Shapes: table [entries, 3 + C] int64, block_entry [blocks] int32, both on the device.
    """

    codes: tuple[int, ...]
    aligned: bool
    table: Tensor
    block_entry: Tensor

    @property
    def heavy(self) -> bool:
        """Whether elements take more registers: each its own address, or fp64 values."""
        return not self.aligned or CODE[torch.float64] in self.codes


def packed(codes: Sequence[int]) -> int:
    """Dtype codes as one constexpr: 3 bits each, the first lowest."""
    return sum(code << 3 * i for i, code in enumerate(codes))


def entries_of(
    columns: Sequence[Sequence[Tensor]], block: int, order: Sequence[int]
) -> list[Entry]:
    """Cut the tensors into entries, tensors in the given order; empty ones have none.

    A tensor that starts on 16 bytes in every column gives one entry of whole vectors and one of the
    up to 7 elements left; any other gives one unaligned entry.
    """
    found: list[Entry] = []
    row = 0
    for t in order:
        tensors = [column[t] for column in columns]
        size = tensors[0].numel()
        if any(tensor.numel() != size for tensor in tensors):
            raise ValueError(f"tensor {t} must have one size; got {[x.numel() for x in tensors]}")
        codes = tuple(CODE[tensor.dtype] for tensor in tensors)
        aligned = all(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in tensors)
        whole = size // LANES * LANES if aligned else 0
        for offset, length in ((0, whole), (whole, size - whole)):
            if length > 0:
                blocks = -(-length // block)
                found.append(Entry(t, offset, length, codes, length == whole, blocks, row))
                row += blocks
    return found


def launches_of(
    columns: Sequence[Sequence[Tensor]],
    entries: Sequence[Entry],
    payload: Callable[[Entry], int],
) -> list[Launch]:
    """Build the tables, one per combination of dtypes and alignment, on the device."""
    device = columns[0][0].device
    groups: dict[tuple[tuple[int, ...], bool], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.codes, entry.aligned), []).append(entry)
    launches = []
    for (codes, aligned), members in groups.items():
        rows, counts, first = [], [], 0
        for entry in members:
            tensors = [column[entry.tensor] for column in columns]
            addresses = [x.data_ptr() + entry.offset * x.element_size() for x in tensors]
            rows.append([entry.size, first, payload(entry), *addresses])
            counts.append(entry.blocks)
            first += entry.blocks
        numbers = torch.arange(len(members), dtype=torch.int32, device="cpu")
        block_entry = numbers.repeat_interleave(torch.tensor(counts, device="cpu"))
        table = torch.tensor(rows, dtype=torch.int64, device="cpu")
        launches.append(Launch(codes, aligned, *_uploaded(device, table, block_entry)))
    return launches


def _uploaded(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Copies that are there for every stream, made beside what is queued: a Gram pass, perhaps."""
    if device.type != "cuda":
        return [x.to(device) for x in tensors]
    with torch.cuda.stream(side_stream(device)):
        return [x.to(device) for x in tensors]


class TableCache:
    """Tables by value: the key holds every address, size and dtype that the table was built from.

    So a tensor that moved, was resized, or was freed and replaced gives another key, and equal keys
    need the same table whoever owns the memory. Bounded. A table that a CUDA graph was captured
    with is kept for the life of the process, since replays read it.
    """

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[Any, ...], object] = OrderedDict()
        self._bytes = 0
        self._last: object = None  # of the last call, which is the last to go
        self._captured: dict[object, object] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tables)

    def get(
        self, columns: Sequence[Sequence[Tensor]], extra: object, build: Callable[[], Any]
    ) -> Any:
        """The cached result of `build` for these tensors; `extra` is what else it depends on."""
        device = columns[0][0].device
        tensors = [tensor for column in columns for tensor in column]
        key = (
            device,
            extra,
            tuple([x.data_ptr() for x in tensors]),
            tuple([x.numel() for x in tensors]),
            tuple([x.dtype for x in tensors]),
        )
        with self._lock:
            return self._found(key, build)

    def _found(self, key: tuple[Any, ...], build: Callable[[], Any]) -> Any:
        capturing = key[0].type == "cuda" and torch.cuda.is_current_stream_capturing()
        found = self._tables.get(key)
        if found is None:
            found = self._captured.get(key)
        elif found is not self._last:
            self._tables.move_to_end(key)
        if found is None:
            if capturing:
                raise RuntimeError(
                    "the tensors of a captured call must have been passed to a call before the "
                    "capture, where their pointer table is copied to the device, and not be "
                    "strided: those are copied to another place in each call"
                )
            found = self._tables[key] = build()
            self._bytes += _bytes_of(found)
            self._forget()
        if capturing:
            self._captured[key] = found
        self._last = found
        return found

    def _forget(self) -> None:
        """Let go of what is too much; the last one stays."""
        while self._bytes > _KEPT and len(self._tables) > 1:
            (device, *_), gone = self._tables.popitem(last=False)
            self._bytes -= _bytes_of(gone)
            if device.type == "cuda":
                # kernels of any stream may still read it
                torch.cuda.synchronize(device)


def _bytes_of(found: object) -> int:
    """Of all tensors in what a `build` made."""
    if isinstance(found, Tensor):
        return found.nbytes
    return sum(map(_bytes_of, found)) if isinstance(found, tuple | list) else 0


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """For small copies beside what is queued; one, since each keeps memory of its own."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the device of the tensor current: Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def copied_back(originals: Sequence[Tensor], used: Sequence[Tensor]) -> None:
    """Write the contiguous stand-ins of strided tensors back to them."""
    for original, stand_in in zip(originals, used, strict=True):
        if stand_in is not original:
            original.copy_(stand_in)


def by_column(tensors: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """Contiguous tensors, `count` to a column: init, a policy, or the outputs of one eta."""
    whole = [x.contiguous() for x in tensors]
    return [whole[at : at + count] for at in range(0, len(whole), count)]


def by_segment(segment: list[int]) -> list[int]:
    """Tensor numbers ordered by segment, so that the chunks of a segment are neighbours."""
    return sorted(range(len(segment)), key=segment.__getitem__)


def ema_launches(
    tables: TableCache, columns: list[list[Tensor]], block: int, first_index: list[int]
) -> list[Launch]:
    """The launches of an EMA update; their payload is the index of an entry's first element."""

    def build() -> list[Launch]:
        entries = entries_of(columns, block, range(len(columns[0])))
        return launches_of(columns, entries, lambda e: first_index[e.tensor] + e.offset)

    found: list[Launch] = tables.get(columns, tuple(first_index), build)
    return found


def gram_launches(
    columns: Sequence[Sequence[Tensor]], chunk: int, segment: list[int], count: int
) -> tuple[list[Launch], Tensor, int]:
    """(launches, [count + 1] rows at which each segment begins, number of rows) of a Gram pass."""
    entries = entries_of(columns, chunk, by_segment(segment))
    in_segment = [0] * (count + 1)
    for entry in entries:
        in_segment[segment[entry.tensor] + 1] += entry.blocks
    bounds = torch.tensor(in_segment, device="cpu").cumsum(0)
    launches = launches_of(columns, entries, lambda entry: entry.row)
    return launches, _uploaded(columns[0][0].device, bounds)[0], int(bounds[-1])


def chosen(weights: Tensor, rows: Sequence[int]) -> Tensor:
    """The rows [K, S, M] of one pass; an index would have to travel to the device first."""
    every = len(rows) == weights.shape[0]
    return weights.contiguous() if every else torch.stack([weights[k] for k in rows])


def apply_launches(
    tables: TableCache,
    read: list[list[Tensor]],
    results: Sequence[list[Tensor]],
    block: int,
    segment: list[int],
) -> list[tuple[list[int], list[Launch]]]:
    """(row numbers, launches) of an apply pass: rows of outputs with the same dtypes share one.

    The launches run backward: what the Gram pass read last is still in L2.
    """
    groups: dict[tuple[torch.dtype, ...], list[int]] = {}
    for k, result in enumerate(results):
        groups.setdefault(tuple([x.dtype for x in result]), []).append(k)
    passes = []
    for rows in groups.values():
        columns = [*read, *(results[k] for k in rows)]

        def build(columns: list[list[Tensor]] = columns) -> list[Launch]:
            entries = entries_of(columns, block, by_segment(segment))
            return launches_of(columns, entries, lambda entry: segment[entry.tensor])[::-1]

        passes.append((rows, tables.get(columns, tuple(segment), build)))
    return passes
