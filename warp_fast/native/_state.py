"""The state of rows of logits, and what it says of them.

What csrc/loss.cpp knows of a row once it has seen all columns: eight fp64 numbers (`LossState` in
csrc/cpu.h). The sums leave out the sampled token: beside one of almost all probability the others
would be rounded away, and with them the digits of its log-prob and of its gradient.
"""

from __future__ import annotations

from functools import cached_property
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
    """The state of rows with the sampled token in it; what nobody asks for is not worked out.

    Attributes:
        below, anchor_below: u - max of the sampled token, and v - max.
        base, anchor_base: maxima without the sampled token, 0 for -inf; the cross sum is of scores
            below them.
        apart: u - v of the sampled token.
        moment: the mean of u - max.
    """

    def __init__(self, state: Tensor) -> None:
        top, rest, picked, moment, *anchor, anchor_picked, self._cross = state.unbind(1)
        self.policy, self._of_anchor = _Side.of(top, rest, picked), (*anchor, anchor_picked)
        self.below, self.apart = picked - self.policy.top, picked - anchor_picked
        self.base, self.anchor_base = (torch.where(x == -torch.inf, 0, x) for x in (top, anchor[0]))
        raised = torch.where(rest == 0, 0, rest * (top - self.policy.top))
        self.moment = self.policy.mean(moment + raised, self.below)

    @cached_property
    def anchor(self) -> _Side:
        return _Side.of(*self._of_anchor)

    @property
    def anchor_below(self) -> Tensor:
        return self._of_anchor[2] - self.anchor.top

    def cross(self, exact_kl: str, shift: Tensor) -> Tensor:
        """The mean of u - v - shift under the policy, or where forward under the anchor."""
        left_out = self.base - self.anchor_base
        if exact_kl == "forward":
            mean = -self.anchor.mean(self._cross, left_out - self.apart)
        else:
            mean = self.policy.mean(self._cross, self.apart - left_out)
        return mean + (left_out - shift)


def statistics_of(state: Tensor, anchored: bool, exact_kl: str, entropy: bool) -> Tensor:
    """[4, n] of the rows of a state, as in `Stats`."""
    row = _Whole(state)
    policy = row.policy
    found = torch.zeros(4, len(state), dtype=torch.float32)
    found[0] = (row.below - policy.log_total).clamp(max=0)
    if entropy:
        found[1] = (policy.log_total - row.moment).clamp(min=0)
    if not anchored:
        return found
    anchor = row.anchor
    found[2] = (row.anchor_below - anchor.log_total).clamp(max=0)
    if exact_kl:
        cross = row.cross(exact_kl, policy.top - anchor.top)
        kl = cross - (policy.log_total - anchor.log_total)
        found[3] = (kl if exact_kl == "reverse" else -kl).clamp(min=0)
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
    """[n, 8] of `LossCoefficient` in csrc/cpu.h; u and v are below their shifts there."""
    dlogprobs, dentropy, dkl = upstream.double().T / temperature
    row = _Whole(state)
    policy, zero = row.policy, torch.zeros_like(dkl)
    a, b, c, q = dentropy * row.moment, -dentropy, zero, zero
    rounded, anchor_shift = zero, zero
    slope = a + b * row.below  # of the sampled token
    if exact_kl == "reverse":
        # below what the cross sum was: rounded alike, so that what cancels does
        anchor_shift, apart = row.anchor_base, policy.top - row.anchor_base
        # a KL that nobody asks the gradient of may be infinite
        mean = torch.where(dkl == 0, 0, row.cross(exact_kl, apart))
        slope = slope + torch.where(dkl == 0, 0, dkl * (row.apart - apart - mean))
        # off before anything is multiplied: what is left to round is small where it matters
        rounded = mean.float().double()
        a, c = a + dkl * torch.where(mean.isfinite(), rounded - mean, 0), dkl
    elif exact_kl == "forward":
        a, slope = a + dkl, slope + dkl
        q = torch.where(dkl == 0, 0, dkl / row.anchor.total)
        anchor_shift = row.anchor.top
    # with 1 - p from the others
    token = torch.where(policy.token == 0, 0, policy.token * slope) + dlogprobs * policy.others
    if exact_kl == "forward":
        token = token - torch.where(dkl == 0, 0, dkl * row.anchor.token)
    columns = [policy.top, *((x / policy.total) for x in (a - dlogprobs, b, c))]
    return torch.stack([*columns, rounded, anchor_shift, q, token], 1).float()
