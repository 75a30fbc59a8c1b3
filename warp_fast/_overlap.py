"""Tensors that an op writes share no bytes with its other arguments, nor with themselves."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def byte_range(tensor: Tensor) -> tuple[int, int]:
    """First and one-past-last byte address that the tensor spans."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():  # as is one without elements
        return start, start + tensor.nbytes
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def steps_over(reach: int, dimensions: Iterable[tuple[int, int]]) -> bool:
    """Whether each dimension, (step, count), steps over all that those before it reach."""
    for step, count in dimensions:
        if count > 1 and step < reach:
            return False
        reach += step * (count - 1)
    return True


def is_apart(tensor: Tensor) -> bool:
    """Whether no two of its elements are in one place; False where that is hard to tell."""
    if tensor.is_contiguous():
        return True
    return steps_over(1, sorted(zip(tensor.stride(), tensor.shape, strict=True)))


class _Range(NamedTuple):
    """Bytes [start, stop) of tensor number `position` of those that are written, or read."""

    start: int
    stop: int
    written: bool
    position: int
    dtype: torch.dtype


def _in_place(a: _Range, b: _Range) -> bool:
    return a.written != b.written and a._replace(written=b.written) == b


def refuse_overlap(written: Sequence[Tensor], read: Sequence[Tensor], *, same: bool) -> None:
    """Raise ValueError where a written tensor may share bytes with another one or within itself,
    or is of inference mode and the call is not.

    Tensors are taken to be all from their first byte to their last.
    same: allow read[i] to occupy exactly the bytes of written[i] (elementwise in-place).
    """
    # called for every update: mostly all are contiguous, and nothing touches anything
    everything = [*written, *read]
    if any([x.is_inference() for x in written]) and not torch.is_inference_mode_enabled():
        raise ValueError(
            "a tensor of inference mode cannot be written outside of it; give a clone of it"
        )
    if all([x.is_contiguous() for x in everything]):
        starts = [x.data_ptr() for x in everything]
        stops = map(operator.add, starts, [x.nbytes for x in everything])
        spans = sorted(zip(starts, stops, strict=True))
        if all([stop <= start for (_, stop), (start, _) in itertools.pairwise(spans)]):
            return
    if odd := [tensor for tensor in written if not is_apart(tensor)]:
        raise ValueError(
            "a tensor that is written must have each element in a place of its own; got shape "
            f"{tuple(odd[0].shape)} and strides {odd[0].stride()}"
        )
    ranges = [_Range(*byte_range(t), True, i, t.dtype) for i, t in enumerate(written)]
    ranges += [_Range(*byte_range(t), False, i, t.dtype) for i, t in enumerate(read)]
    open_ranges: list[_Range] = []
    for current in sorted(ranges, key=lambda r: r[:2]):
        if current.start == current.stop:
            continue
        open_ranges = [other for other in open_ranges if other.stop > current.start]
        for other in open_ranges:
            if (current.written or other.written) and not (same and _in_place(current, other)):
                stop = min(current.stop, other.stop)
                raise ValueError(
                    "a tensor that is written must not share memory with another argument, nor "
                    f"interleave with it; bytes {current.start:#x}..{stop:#x} are "
                    "inside two of them (tied weights are passed once)"
                )
        open_ranges.append(current)
