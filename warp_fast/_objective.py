"""The loss as a function of per-token statistics: one line of math per `kl`, on [N] vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from warp_fast import _loss_checks as checks
from warp_fast import _ops
from warp_fast.reference.loss import Stats

if TYPE_CHECKING:
    from warp_fast._loss_checks import Terms


@dataclass(frozen=True)
class Rows:
    """N tokens of B sequences, padded or packed, as flat vectors.

    Attributes:
        shape: of token_ids as given; [B, T] or [N].
        token_ids: [N] int64, 0 where masked.
        mask: [N] bool.
        sequence: [N] int64, the sequence of each token.
        ends: [B] int64, one past the last token of each sequence.
    """

    shape: torch.Size
    token_ids: Tensor
    mask: Tensor
    sequence: Tensor
    ends: Tensor

    @staticmethod
    def of(
        token_ids: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        shape: torch.Size,
        device: torch.device,
        name: str,
    ) -> Rows:
        """Read the layout; raises ValueError or TypeError on what does not fit."""
        checks.token_ids(token_ids, shape, device, name)
        checks.layout(shape, mask, cu_seqlens, device, name)
        index = torch.arange(token_ids.numel(), device=device)
        if cu_seqlens is None:
            length = max(1, shape[1])
            sequence = index // length
            ends = (torch.arange(shape[0], device=device) + 1) * shape[1]
        else:
            ends = cu_seqlens[1:].long()
            sequence = torch.searchsorted(ends, index, right=True)
        if mask is None:
            kept = torch.ones_like(index, dtype=torch.bool)
        else:
            kept = mask.reshape(-1) != 0
        ids = torch.where(kept, token_ids.reshape(-1).long(), 0)
        return Rows(shape, ids, kept, sequence, ends)

    @property
    def count(self) -> int:
        """B."""
        return self.ends.shape[0]

    def total(self, values: Tensor) -> Tensor:
        """[N]: the sum over the sequence of each token."""
        sums = values.new_zeros(self.count).index_add(0, self.sequence, values)
        return sums[self.sequence]

    def to_go(self, values: Tensor) -> Tensor:
        """[N]: the sum from each token to the end of its sequence."""
        found: Tensor = _ops.SUMS_TO_GO(values, self.sequence, self.shape[-1])
        return found


def objective(rows: Rows, stats: Stats, terms: Terms) -> tuple[Tensor, Tensor]:
    """(loss, kl per token) of `warp_fast.warp_loss`; kl is 0 where masked."""
    logp = stats.logprobs
    difference = logp - stats.anchor_logprobs
    weights = terms.advantages.to(logp.dtype)
    penalty = torch.zeros_like(logp)
    if terms.kl == "reward":
        kl = difference
        weights = weights - terms.beta * rows.total(difference.detach())
    elif terms.kl == "reward_to_go":
        kl = difference
        weights = weights - terms.beta * rows.to_go(difference.detach())
    elif terms.kl == "k2":
        kl = penalty = difference.square() / 2
    elif terms.kl == "k3":
        kl = penalty = torch.expm1(-difference) + difference
    elif terms.kl in checks.EXACT:
        kl = penalty = stats.kl
    else:
        kl = penalty
    weights = torch.where(rows.mask, weights, 0)
    per_token = terms.beta * penalty - _gain(logp, weights, terms)
    total = torch.where(rows.mask, per_token, 0).sum()
    return total / _normalizer(rows, terms, total.dtype), kl


def _gain(logp: Tensor, weights: Tensor, terms: Terms) -> Tensor:
    """What the policy gradient ascends: c log pi, or the (clipped) importance ratio times c."""
    if terms.old_logprobs is None:
        return weights * logp
    ratio = torch.exp(logp - terms.old_logprobs.to(logp.dtype))
    if terms.clip_range is None:
        return ratio * weights
    low, high = terms.clip_range
    return torch.minimum(ratio * weights, ratio.clamp(1 - low, 1 + high) * weights)


def _normalizer(rows: Rows, terms: Terms, dtype: torch.dtype) -> Tensor | float:
    """Numbers stay numbers: a trace would be tied to the value of one that is made a tensor."""
    if isinstance(terms.normalizer, Tensor):
        return terms.normalizer.to(dtype)
    if terms.normalizer == "token":
        return rows.mask.sum().clamp(min=1).to(dtype)
    if terms.normalizer == "sequence":
        return max(1, rows.count)
    return float(terms.normalizer)
