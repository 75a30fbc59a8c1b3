"""What the backends of the losses agree on about rows of logits.

Rows are [N, V], or [B, T, V] where their batches do not follow one another evenly, as in a slice in
time: copying them would cost more than the op.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STATE = 8  # columns of what a kernel knows of a row after the forward pass (csrc/cpu.h, rows.cuh)
EXACT_CODES = {"": 0, "reverse": 1, "forward": 2}  # csrc/loss.h


class Found(NamedTuple):
    """Stats of [N], and the state [N, STATE or 0] in fp64 that the gradient of these rows takes."""

    logprobs: Tensor
    entropy: Tensor
    anchor_logprobs: Tensor
    kl: Tensor
    state: Tensor

    @staticmethod
    def empty(like: Tensor, count: int, dtype: torch.dtype, columns: int = STATE) -> Found:
        """Of `count` rows; columns: of the state, which some backends do without."""
        stats = [like.new_empty(count, dtype=dtype) for _ in range(4)]
        return Found._make([*stats, like.new_empty((count, columns), dtype=torch.float64)])

    def at(self, part: slice) -> Found:
        """Those of some of the rows, in place."""
        return Found(*[values[part] for values in self])


def rows_of(logits: Tensor) -> Tensor:
    """[..., V] as rows, without a copy where three dimensions do."""
    if logits.dim() == 3 and logits.stride(0) != logits.shape[1] * logits.stride(1):
        return logits
    return logits.reshape(-1, logits.shape[-1])


def layout(rows: Tensor) -> tuple[int, int, int]:
    """(stride, run, jump): row n begins n * stride + n // run * jump elements after the first."""
    stride = rows.stride(-2)
    if rows.dim() == 2:
        return stride, 1, 0
    run = rows.shape[1]
    return stride, max(run, 1), rows.stride(0) - run * stride


def place_of(rows: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    """Where the rows of these numbers are in their tensor."""
    place: tuple[Tensor, ...] = torch.unravel_index(index, rows.shape[:-1])
    return place


def with_unit_stride(rows: Tensor) -> Tensor:
    """The same rows, each contiguous."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def check_ids(token_ids: Tensor, rows: Tensor, vocabulary: int) -> None:
    """The ids of these rows are in the vocabulary."""
    picked = token_ids[rows]
    wrong = (picked < 0) | (picked >= vocabulary)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"token_ids must be in [0, {vocabulary}); row {int(rows[at])} has {int(picked[at])}"
        )
