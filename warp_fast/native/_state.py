"""The state of rows of logits, and what it says of them.

What csrc/loss.cpp knows of a row once it has seen all columns: eight fp64 numbers (`LossState` in
csrc/cpu.h). The sums leave out the sampled token: beside one of almost all probability the others
would be rounded away, and with them the digits of its log-prob and of its gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from warp_fast._loss_rows import STATE


def new_state(rows: Tensor) -> Tensor:
    """[n, 8] before any column."""
    state = torch.zeros(len(rows), STATE, dtype=torch.float64)
    state[:, :: STATE // 2] = -torch.inf
    return state


class _Side(NamedTuple):
    """The softmax of rows, [n] each: its maximum, its sum over all tokens and what is in it."""

    top: Tensor
    total: Tensor
    log_total: Tensor
    others: Tensor  # share of the sum
    token: Tensor  # share of the sampled token
    scale: Tensor  # of the sums of the state

    @staticmethod
    def of(top: Tensor, rest: Tensor, picked: Tensor) -> _Side:
        most = torch.maximum(top, picked)
        scale = torch.where(rest == 0, 0, (top - most).exp())
        others, token = rest * scale, (picked - most).exp()
        total = others + token
        # of a sampled token of almost all probability, log(total) would lose the others
        log_total = torch.where(picked == most, others.log1p(), total.log())
        return _Side(most, total, log_total, others / total, token / total, scale)

    def mean(self, of_others: Tensor, of_token: Tensor) -> Tensor:
        """Under this softmax, from the sum over the other tokens and the value of the sampled."""
        others = torch.where(self.scale == 0, 0, of_others * self.scale / self.total)
        return others + torch.where(self.token == 0, 0, self.token * of_token)


class _Whole:
    """The state of rows with the sampled token in it.

    Attributes:
        below, apart: u - max and u - v of the sampled token.
        moment, cross: the means of u - max, and of u - v (v - u under the anchor, if forward).
    """

    def __init__(self, state: Tensor, exact_kl: str) -> None:
        top, rest, picked, moment, anchor_top, anchor_rest, anchor_picked, cross = state.unbind(1)
        self.policy = _Side.of(top, rest, picked)
        self.anchor = _Side.of(anchor_top, anchor_rest, anchor_picked)
        self.below, self.apart = picked - self.policy.top, picked - anchor_picked
        self.anchor_below = anchor_picked - self.anchor.top
        raised = torch.where(rest == 0, 0, rest * (top - self.policy.top))
        self.moment = self.policy.mean(moment + raised, self.below)
        if exact_kl == "forward":
            self.cross = self.anchor.mean(cross, -self.apart)
        else:
            self.cross = self.policy.mean(cross, self.apart)


def statistics_of(state: Tensor, anchored: bool, exact_kl: str, entropy: bool) -> Tensor:
    """[4, n] of the rows of a state, as in `Stats`."""
    row = _Whole(state, exact_kl)
    policy, anchor = row.policy, row.anchor
    found = torch.zeros(4, len(state), dtype=torch.float32)
    found[0] = (row.below - policy.log_total).clamp(max=0)
    if entropy:
        found[1] = (policy.log_total - row.moment).clamp(min=0)
    if not anchored:
        return found
    found[2] = (row.anchor_below - anchor.log_total).clamp(max=0)
    apart = (policy.top - anchor.top) + (policy.log_total - anchor.log_total)
    if exact_kl == "reverse":
        found[3] = (row.cross - apart).clamp(min=0)
    elif exact_kl == "forward":
        found[3] = (row.cross + apart).clamp(min=0)
    return found


def by_row(
    state: Tensor, rows: Tensor, count: int, anchored: bool, exact_kl: str, entropy: bool
) -> tuple[Tensor, ...]:
    """The statistics and the state of all rows, 0 where there is none."""
    found = torch.zeros(4, count, dtype=torch.float32)
    saved = torch.zeros(count, STATE, dtype=torch.float64)
    found[:, rows], saved[rows] = statistics_of(state, anchored, exact_kl, entropy), state
    return *(row.clone() for row in found), saved


def coefficients_of(state: Tensor, upstream: Tensor, exact_kl: str, temperature: float) -> Tensor:
    """[n, 7] of `LossCoefficient` in csrc/cpu.h: du = p (A + B (u - max) + C (u - v)) - Q q."""
    dlogprobs, dentropy, dkl = upstream.double().T / temperature
    row = _Whole(state, exact_kl)
    policy, anchor = row.policy, row.anchor
    zero = torch.zeros_like(dkl)
    a, b, c, q = dentropy * row.moment, -dentropy, zero, zero
    if exact_kl == "reverse":
        a, c = a - dkl * row.cross, dkl
    elif exact_kl == "forward":
        a, q = a + dkl, dkl
    # of the sampled token, with 1 - p from the others
    slope = a + b * row.below
    if exact_kl == "reverse":
        slope = slope + c * row.apart
    token = torch.where(policy.token == 0, 0, policy.token * slope) + dlogprobs * policy.others
    if exact_kl == "forward":
        token = token - q * anchor.token
    columns = [policy.top, *((x / policy.total) for x in (a - dlogprobs, b, c))]
    columns += [anchor.top, q / anchor.total, token]
    return torch.stack(columns, 1).float()
