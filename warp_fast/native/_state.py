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
        apart: u - v of the sampled token.
        moment: the mean of u - max.
    """

    def __init__(self, state: Tensor) -> None:
        top, rest, picked, moment, *anchor, anchor_picked, self._cross = state.unbind(1)
        self.policy, self._of_anchor = _Side.of(top, rest, picked), (*anchor, anchor_picked)
        self.below, self.apart = picked - self.policy.top, picked - anchor_picked
        raised = torch.where(rest == 0, 0, rest * (top - self.policy.top))
        self.moment = self.policy.mean(moment + raised, self.below)

    @cached_property
    def anchor(self) -> _Side:
        return _Side.of(*self._of_anchor)

    @property
    def anchor_below(self) -> Tensor:
        return self._of_anchor[2] - self.anchor.top

    def cross(self, exact_kl: str) -> Tensor:
        """The mean of u - v under the policy or, where forward, of v - u under the anchor."""
        if exact_kl == "forward":
            return self.anchor.mean(self._cross, -self.apart)
        return self.policy.mean(self._cross, self.apart)


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
    apart = (policy.top - anchor.top) + (policy.log_total - anchor.log_total)
    if exact_kl == "reverse":
        found[3] = (row.cross(exact_kl) - apart).clamp(min=0)
    elif exact_kl == "forward":
        found[3] = (row.cross(exact_kl) + apart).clamp(min=0)
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
    row = _Whole(state)
    policy, zero = row.policy, torch.zeros_like(dkl)
    a, b, c, q, anchor_top = dentropy * row.moment, -dentropy, zero, zero, zero
    if exact_kl == "reverse":
        # a KL that nobody asks the gradient of may be infinite
        a, c = a - torch.where(dkl == 0, 0, dkl * row.cross(exact_kl)), dkl
    elif exact_kl == "forward":
        a, q, anchor_top = a + dkl, dkl / row.anchor.total, row.anchor.top
    # of the sampled token, with 1 - p from the others
    slope = a + b * row.below
    if exact_kl == "reverse":
        slope = slope + torch.where(c == 0, 0, c * row.apart)
    token = torch.where(policy.token == 0, 0, policy.token * slope) + dlogprobs * policy.others
    if exact_kl == "forward":
        token = token - dkl * row.anchor.token
    columns = [policy.top, *((x / policy.total) for x in (a - dlogprobs, b, c))]
    return torch.stack([*columns, anchor_top, q, token], 1).float()
