"""The statistics of the loss and their gradient by warp_fast._C, on CPU.

Logits are taken as they are. What the forward pass knows of a row goes to the backward pass as
eight fp64 numbers (`LossState` in csrc/cpu.h). fp64 inputs are served by the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from warp_fast.kernels._table import CODE
from warp_fast.native._addresses import extension
from warp_fast.reference import loss as reference

STATE = 8
_EXACT = {"": 0, "reverse": 1, "forward": 2}
Matrix = tuple[int, int, int]


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
    reference._check_ids(token_ids, rows, logits.shape[1])
    head = Head(temperature, softcap, exact_kl)
    state = new_state(rows)
    anchor = None if anchor_logits is None else _with_unit_stride(anchor_logits)
    head.stats(_with_unit_stride(logits), anchor, token_ids[rows], state, entropy, index=rows)
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
) -> Tensor:
    """dlogits [N, V] from upstream [N, 3]; without the state of the forward pass it is made again.

    Traffic: reads each row with a gradient once (exact KL: of the anchor too) and writes it once.
    """
    arguments = (logits, token_ids, anchor_logits, temperature, softcap, exact_kl)
    if upstream.dtype == torch.float64:
        return reference.token_stats_backward_reference(upstream, *arguments)
    used = upstream.any(1)
    if state is None:
        state = token_stats_cpp(logits, token_ids, used, *arguments[2:], True)[-1]
    rows = used.nonzero()[:, 0]
    dlogits = torch.empty_like(logits)
    written = _with_unit_stride(dlogits)
    written[~used] = 0
    anchor = None
    if anchor_logits is not None and exact_kl:
        anchor = _with_unit_stride(anchor_logits)
    Head(temperature, softcap, exact_kl).gradient(
        _with_unit_stride(logits),
        anchor,
        token_ids[rows],
        coefficients_of(state[rows], upstream[rows], exact_kl, temperature),
        written,
        index=rows,
    )
    return dlogits if written is dlogits else dlogits.copy_(written)


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
            *self._shared(logits, anchor, token_ids, first, index),
            state.data_ptr(),
            entropy,
            _EXACT[self.exact_kl] if anchor is not None else 0,
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
            *self._shared(logits, anchor, token_ids, first, index),
            _matrix(gradient),
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
            _matrix(logits),
            (0, 0, CODE[torch.float32]) if anchor is None else _matrix(anchor),
            0 if index is None else index.data_ptr(),
            token_ids.data_ptr(),
            len(token_ids),
            logits.shape[1],
            first,
            self.softcap or 0.0,
            self.temperature,
            torch.get_num_threads(),
        )


def _matrix(rows: Tensor) -> Matrix:
    return rows.data_ptr(), rows.stride(0), CODE[rows.dtype]


def _with_unit_stride(rows: Tensor) -> Tensor:
    """The same rows, each contiguous."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def new_state(rows: Tensor) -> Tensor:
    """[n, 8] before any column."""
    state = torch.zeros(len(rows), STATE, dtype=torch.float64)
    state[:, :: STATE // 2] = -torch.inf
    return state


def statistics_of(state: Tensor, anchored: bool, exact_kl: str, entropy: bool) -> Tensor:
    """[4, n] of the rows of a state, as in `Stats`."""
    top, total, picked, moment, anchor_top, anchor_total, anchor_picked, cross = state.unbind(1)
    lse, anchor_lse = top + total.log(), anchor_top + anchor_total.log()
    found = torch.zeros(4, len(state))
    found[0] = ((picked - top) - total.log()).clamp(max=0)
    if entropy:
        found[1] = (total.log() - moment / total).clamp(min=0)
    if anchored:
        found[2] = ((anchor_picked - anchor_top) - anchor_total.log()).clamp(max=0)
    if anchored and exact_kl == "reverse":
        found[3] = (cross / total - (lse - anchor_lse)).clamp(min=0)
    elif anchored and exact_kl == "forward":
        found[3] = (cross / anchor_total - (anchor_lse - lse)).clamp(min=0)
    return found


def by_row(
    state: Tensor, rows: Tensor, count: int, anchored: bool, exact_kl: str, entropy: bool
) -> tuple[Tensor, ...]:
    """The statistics and the state of all rows, 0 where there is none."""
    found, saved = torch.zeros(4, count), torch.zeros(count, STATE, dtype=torch.float64)
    found[:, rows], saved[rows] = statistics_of(state, anchored, exact_kl, entropy), state
    return *(row.clone() for row in found), saved


def coefficients_of(state: Tensor, upstream: Tensor, exact_kl: str, temperature: float) -> Tensor:
    """[n, 7] of `LossCoefficient` in csrc/cpu.h: du = p (A + B (u - max) + C (u - v)) - Q q."""
    dlogprobs, dentropy, dkl = upstream.double().T / temperature
    top, total, _, moment, anchor_top, anchor_total, _, cross = state.unbind(1)
    zero = torch.zeros_like(total)
    a, b, c, q = dentropy * moment / total - dlogprobs, -dentropy, zero, zero
    if exact_kl == "reverse":
        a, c = a - dkl * cross / total, dkl
    elif exact_kl == "forward":
        a, q = a + dkl, dkl / anchor_total
    columns = [top, a / total, b / total, c / total, anchor_top, q, dlogprobs]
    return torch.stack(columns, 1).float()
