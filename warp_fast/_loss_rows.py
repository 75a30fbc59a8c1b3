"""What the backends of the losses agree on about rows of logits."""

from __future__ import annotations

from torch import Tensor

STATE = 8  # columns of what a kernel knows of a row after the forward pass (csrc/cpu.h, rows.cuh)
EXACT_CODES = {"": 0, "reverse": 1, "forward": 2}  # csrc/loss.h


def with_unit_stride(rows: Tensor) -> Tensor:
    """The same rows, each contiguous."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def check_ids(token_ids: Tensor, rows: Tensor, vocabulary: int) -> None:
    """The ids of these rows are in the vocabulary."""
    picked = token_ids[rows]
    wrong = (picked < 0) | (picked >= vocabulary)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"token_ids must be in [0, {vocabulary}); row {int(rows[at])} has {int(picked[at])}"
        )
