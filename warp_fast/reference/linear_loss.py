"""The statistics of the loss, their gradient and the loss from hidden states, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from warp_fast._loss_checks import Terms
from warp_fast._loss_rows import check_ids
from warp_fast._objective import Tokens, exact_kl_of, objective, slopes, with_given_anchor
from warp_fast._precision import as_given
from warp_fast.reference.loss import (
    Stats,
    _pieces,
    compute_dtype,
    token_stats_backward_reference,
    token_stats_reference,
)


class Heads(NamedTuple):
    """Hidden states [N, D] and head weights [V, D] of policy and anchor, and what scores are."""

    hidden: Tensor
    weight: Tensor
    anchor_hidden: Tensor | None
    anchor_weight: Tensor | None
    temperature: float
    softcap: float | None

    def at(self, rows: Tensor) -> Heads:
        """Those of some of the rows."""
        anchor = None if self.anchor_hidden is None else self.anchor_hidden[rows]
        return self._replace(hidden=self.hidden[rows], anchor_hidden=anchor)

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(*self[:4])


class LinearLoss(NamedTuple):
    """What the ops of the loss give.

    Attributes:
        total: () Z times the loss.
        logprobs, entropy, anchor_logprobs, kl: as in `Stats`, without what the caller gave.
        state: [N, some] fp64, what the backward pass of the statistics takes.
        slopes: [N, 3] the derivatives of total in logprobs, entropy and kl.
        dhidden, dweight: those in hidden and weight, not yet rounded to the dtypes of these; empty
            where they are not needed.
    """

    total: Tensor
    logprobs: Tensor
    entropy: Tensor
    anchor_logprobs: Tensor
    kl: Tensor
    state: Tensor
    slopes: Tensor
    dhidden: Tensor
    dweight: Tensor


def linear_token_stats_reference(
    heads: Heads, token_ids: Tensor, mask: Tensor, exact_kl: str, entropy: bool
) -> Stats:
    """`token_stats_reference` of hidden @ weight.T, a chunk of rows at a time.

    Shapes: token_ids, mask [N].
    """
    hidden, weight, anchor_hidden, anchor_weight, temperature, softcap = heads
    dtype = heads.compute_dtype
    found = [torch.zeros(len(token_ids), dtype=dtype, device=hidden.device) for _ in range(4)]
    rows = mask.nonzero()[:, 0]
    check_ids(token_ids, rows, weight.shape[0])
    with as_given(hidden.device.type):
        head = weight.to(dtype).T
        anchor_head = None if anchor_weight is None else anchor_weight.to(dtype).T
        for piece in _pieces(rows, weight.shape[0]):
            logits = hidden[piece].to(dtype) @ head
            anchor = None
            if anchor_hidden is not None and anchor_head is not None:
                anchor = anchor_hidden[piece].to(dtype) @ anchor_head
            kept = torch.ones_like(piece, dtype=torch.bool)
            parts = token_stats_reference(
                logits, token_ids[piece], kept, anchor, temperature, softcap, exact_kl, entropy
            )
            for out, part in zip(found, parts, strict=True):
                out[piece] = part
    return Stats(*found)


def linear_token_stats_backward_reference(
    upstream: Tensor,
    heads: Heads,
    token_ids: Tensor,
    exact_kl: str,
    needs: tuple[bool, bool],
    state: Tensor | None = None,
    host_mask: Tensor | None = None,
    weight_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(dhidden [N, D], dweight [V, D]) from upstream [N, 3], summed in its dtype.

    What is not needed comes empty. weight_dtype: that of the dweight returned, if another. state,
    host_mask: of other backends.
    """
    hidden, weight, anchor_hidden, anchor_weight, temperature, softcap = heads
    needs_hidden, needs_weight = needs
    dtype = upstream.dtype
    dhidden, dweight = (
        torch.zeros_like(part, dtype=dtype) if need else part.new_empty(0, dtype=dtype)
        for part, need in zip(heads[:2], needs, strict=True)
    )
    with as_given(hidden.device.type):
        head = weight.to(dtype)
        anchor_head = None if anchor_weight is None else anchor_weight.to(dtype).T
        for piece in _pieces(upstream.any(1).nonzero()[:, 0], weight.shape[0]):
            states = hidden[piece].to(dtype)
            anchor = None
            if anchor_hidden is not None and anchor_head is not None and exact_kl:
                anchor = anchor_hidden[piece].to(dtype) @ anchor_head
            dlogits = token_stats_backward_reference(
                upstream[piece],
                states @ head.T,
                token_ids[piece],
                anchor,
                temperature,
                softcap,
                exact_kl,
            )
            if needs_hidden:
                dhidden[piece] = dlogits @ head
            if needs_weight:
                dweight.addmm_(dlogits.T, states)
    return dhidden, dweight.to(weight_dtype or dtype)


def linear_loss_reference(
    heads: Heads, tokens: Tokens, terms: Terms, entropy: bool, needs: tuple[bool, bool]
) -> LinearLoss:
    """`warp_fast.linear_warp_loss` times its normalizer, and its gradients."""
    exact_kl = exact_kl_of(terms.kl)
    found = linear_token_stats_reference(heads, tokens.token_ids, tokens.mask, exact_kl, entropy)
    stats = with_given_anchor(found, terms)
    upstream = slopes(tokens, stats, terms)
    made = linear_token_stats_backward_reference(upstream, heads, tokens.token_ids, exact_kl, needs)
    state = upstream.new_empty((len(upstream), 0), dtype=torch.float64)
    return LinearLoss(objective(tokens, stats, terms), *found, state, upstream, *made)
