"""Tensors of checkpoints as views of mapped files; nothing is copied, and pages are let go."""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import warnings
from collections.abc import Sequence
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


def prefetch(entry: Entry, start: int, stop: int) -> None:
    """Ask the kernel to read these elements from disk while something else runs."""
    if hasattr(os, "posix_fadvise"):
        size = entry.dtype.itemsize
        handle = os.open(entry.file, os.O_RDONLY)
        try:
            os.posix_fadvise(
                handle, entry.start + start * size, (stop - start) * size, os.POSIX_FADV_WILLNEED
            )
        finally:
            os.close(handle)
