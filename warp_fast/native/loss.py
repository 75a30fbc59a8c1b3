"""The statistics of the loss and their gradient by warp_fast._C, on CPU.

Logits are taken as they are. What the forward pass knows of a row goes to the backward pass as
eight fp64 numbers (`LossState` in csrc/cpu.h). fp64 inputs are served by the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from warp_fast._loss_rows import (
    EXACT_CODES,
    STATE,
    check_ids,
    layout,
    place_of,
    with_unit_stride,
)
from warp_fast._table import CODE, copied_back
from warp_fast.native._addresses import extension
from warp_fast.native._state import by_row, coefficients_of, new_state
from warp_fast.reference import loss as reference

Matrix = tuple[int, int, int, int, int]
NO_MATRIX: Matrix = (0, 0, 1, 0, CODE[torch.float32])


def token_stats_cpp(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    anchor_logits: Tensor | None,
    temperature: float,
    softcap: float | None,
    exact_kl: str,
    entropy: bool,
) -> tuple[Tensor, ...]:
    """Statistics of rows of logits, and the [N, 8] state; see `token_stats_reference`.

    Traffic: reads each kept row of both once.
    """
    if reference.compute_dtype(logits, anchor_logits) == torch.float64:
        wide = reference.token_stats_reference(
            logits, token_ids, mask, anchor_logits, temperature, softcap, exact_kl, entropy
        )
        return *wide, wide[0].new_zeros(len(token_ids), STATE)
    rows = mask.nonzero()[:, 0]
    check_ids(token_ids, rows, logits.shape[-1])
    head = Head(temperature, softcap, exact_kl)
    state = new_state(rows)
    anchor = None if anchor_logits is None else with_unit_stride(anchor_logits)
    head.stats(with_unit_stride(logits), anchor, token_ids[rows], state, entropy, index=rows)
    return by_row(state, rows, len(token_ids), anchor is not None, exact_kl, entropy)


def token_stats_backward_cpp(
    upstream: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    anchor_logits: Tensor | None,
    temperature: float,
    softcap: float | None,
    exact_kl: str,
    state: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`token_stats_backward_reference`; without the state of the forward pass it is made again.

    Traffic: reads each row with a gradient once (exact KL: of the anchor too) and writes it once.
    """
    arguments = (logits, token_ids, anchor_logits, temperature, softcap, exact_kl)
    if upstream.dtype == torch.float64:
        return reference.token_stats_backward_reference(upstream, *arguments, None, out)
    used = upstream.any(1)
    if state is None:
        state = token_stats_cpp(logits, token_ids, used, *arguments[2:], True)[-1]
    rows = used.nonzero()[:, 0]
    dlogits = torch.empty_like(logits) if out is None else out
    written = with_unit_stride(dlogits)
    anchor = None
    if anchor_logits is not None and exact_kl:
        anchor = with_unit_stride(anchor_logits)
    Head(temperature, softcap, exact_kl).gradient(
        with_unit_stride(logits),
        anchor,
        token_ids[rows],
        coefficients_of(state[rows], upstream[rows], exact_kl, temperature),
        written,
        index=rows,
    )
    written[place_of(written, (~used).nonzero()[:, 0])] = 0
    copied_back([dlogits], [written])
    return dlogits


@dataclass(frozen=True)
class Head:
    """What every call of the kernels on one head has in common."""

    temperature: float
    softcap: float | None
    exact_kl: str

    def stats(
        self,
        logits: Tensor,
        anchor: Tensor | None,
        token_ids: Tensor,
        state: Tensor,
        entropy: bool,
        first: int = 0,
        index: Tensor | None = None,
    ) -> None:
        """Add columns `first` and on to the state of each row."""
        extension().loss_stats(
            self._shared(logits, anchor, token_ids, first, index),
            state.data_ptr(),
            entropy,
            EXACT_CODES[self.exact_kl] if anchor is not None else 0,
        )

    def gradient(
        self,
        logits: Tensor,
        anchor: Tensor | None,
        token_ids: Tensor,
        coefficients: Tensor,
        gradient: Tensor,
        first: int = 0,
        index: Tensor | None = None,
    ) -> None:
        extension().loss_gradient(
            self._shared(logits, anchor, token_ids, first, index),
            matrix(gradient),
            coefficients.data_ptr(),
        )

    def _shared(
        self,
        logits: Tensor,
        anchor: Tensor | None,
        token_ids: Tensor,
        first: int,
        index: Tensor | None,
    ) -> tuple[Matrix | int | float, ...]:
        return (
            matrix(logits),
            NO_MATRIX if anchor is None else matrix(anchor),
            0 if index is None else index.data_ptr(),
            token_ids.data_ptr(),
            len(token_ids),
            logits.shape[-1],
            first,
            self.softcap or 0.0,
            self.temperature,
            torch.get_num_threads(),
        )


def matrix(rows: Tensor) -> Matrix:
    return rows.data_ptr(), *layout(rows), CODE[rows.dtype]
