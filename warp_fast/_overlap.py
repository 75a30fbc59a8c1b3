"""Tensors that an op writes share no bytes with its other arguments."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor


def byte_range(tensor: Tensor) -> tuple[int, int]:
    """First and one-past-last byte address that the tensor spans."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():  # as is one without elements
        return start, start + tensor.nbytes
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def refuse_overlap(written: Sequence[Tensor], read: Sequence[Tensor], *, same: bool) -> None:
    """Raise ValueError where a written tensor shares bytes with another written or read one.

    same: allow read[i] to occupy exactly the bytes of written[i] (elementwise in-place).
    """
    # called for every update: mostly nothing touches anything
    spans = sorted([byte_range(tensor) for tensor in (*written, *read)])
    if all(before[1] <= after[0] for before, after in itertools.pairwise(spans)):
        return
    # (start, stop, whether written, position, dtype)
    ranges = [(*byte_range(t), True, i, t.dtype) for i, t in enumerate(written)]
    ranges += [(*byte_range(t), False, i, t.dtype) for i, t in enumerate(read)]
    ranges.sort(key=_START)
    open_ranges: list[_Range] = []
    for current in ranges:
        start = current[0]
        if start == current[1]:
            continue
        open_ranges = [other for other in open_ranges if other[1] > start]
        for other in open_ranges:
            if (current[2] or other[2]) and not (same and _in_place(current, other)):
                raise ValueError(
                    "a tensor that is written must not share memory with another argument; bytes "
                    f"{start:#x}..{min(current[1], other[1]):#x} are in two of them (tied weights "
                    "are passed once)"
                )
        open_ranges.append(current)


_Range: TypeAlias = tuple[int, int, bool, int, torch.dtype]
_START = operator.itemgetter(0, 1)


def _in_place(a: _Range, b: _Range) -> bool:
    return a[:2] == b[:2] and a[2] != b[2] and a[3:] == b[3:]
