"""Tensors of checkpoints as views of mapped files; nothing is copied, and pages are let go."""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from warp_fast.merge.checkpoint import Checkpoint, Entry

_POPULATE_READ = 22  # Linux 5.14; the mmap module has no name for it
_APART = 2 << 20  # bytes between two files in memory


class MappedFiles:
    """Read-only views of tensors in mapped files; what was read is let go at `release`."""

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._bytes: dict[Path, Tensor] = {}
        # files of equal size would lie at like addresses, whose lines push each other out of the
        # L1 cache of some processors: the Gram then reads at a third of its speed
        self._between: list[mmap.mmap] = []
        for path in sorted({e.file for c in checkpoints for e in c.entries.values()}):
            with open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[path] = mapped
            self._between.append(mmap.mmap(-1, _APART))
            with warnings.catch_warnings():
                # torch warns that the buffer is read-only; nothing here writes to it
                warnings.simplefilter("ignore")
                self._bytes[path] = torch.frombuffer(mapped, dtype=torch.uint8)

    def view(self, entry: Entry, start: int, stop: int) -> Tensor:
        """Elements start to stop of a tensor, flat."""
        size = entry.dtype.itemsize
        first = entry.start + start * size
        self._populate(entry, first, (stop - start) * size)
        raw = self._bytes[entry.file][first : first + (stop - start) * size]
        # a view must be aligned in memory; files with mixed dtypes need not be
        return (raw if first % size == 0 else raw.clone()).view(entry.dtype)

    def _populate(self, entry: Entry, first: int, length: int) -> None:
        """Map the pages in one call: a fault for each costs as much as the arithmetic."""
        if sys.platform != "linux":
            return
        begin = first // mmap.PAGESIZE * mmap.PAGESIZE
        # older kernels do not know it; then the pages are mapped as they are touched
        with contextlib.suppress(OSError):
            self._maps[entry.file].madvise(_POPULATE_READ, begin, first + length - begin)

    def content(self, entry: Entry) -> memoryview:
        """The bytes of a whole tensor."""
        return memoryview(self._maps[entry.file])[entry.start : entry.start + entry.nbytes]

    def release(self) -> None:
        """Drop the mapped pages from this process; they stay in the page cache."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)


def prefetch(parts: Iterable[tuple[Entry, int, int]]) -> None:
    """Ask the kernel to read elements from disk while something else runs."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path, first, end in _joined(parts):
        handle = os.open(path, os.O_RDONLY)
        try:
            if not _cached(handle, first, end):
                os.posix_fadvise(handle, first, end - first, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)


def _joined(parts: Iterable[tuple[Entry, int, int]]) -> list[tuple[Path, int, int]]:
    """Bytes from first to end of files; what touches is one."""
    joined: list[tuple[Path, int, int]] = []
    for entry, start, stop in parts:
        size = entry.dtype.itemsize
        first, end = entry.start + start * size, entry.start + stop * size
        if joined and joined[-1][0] == entry.file and joined[-1][2] == first:
            first = joined.pop()[1]
        joined.append((entry.file, first, end))
    return joined


def _cached(handle: int, first: int, end: int) -> bool:
    """Whether both ends are in the page cache, and likely all; asking for more costs time."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        return all(os.preadv(handle, [bytearray(1)], at, os.RWF_NOWAIT) for at in (first, end - 1))
    except OSError:  # not without waiting, or not on this file system
        return False
