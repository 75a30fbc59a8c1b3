"""The loss from logits whose gradient is made in the forward pass and written over them."""

from __future__ import annotations

import torch
from torch import Tensor

from warp_fast import _loss_ops, _stats_ops
from warp_fast._loss_checks import Terms
from warp_fast._objective import (
    Rows,
    exact_kl_of,
    normalizer_of,
    objective,
    slopes,
    slopes_ahead,
    with_given_anchor,
)
from warp_fast._overlap import refuse_overlap
from warp_fast.reference.loss import Stats, compute_dtype


def matrix_of(logits: Tensor, anchor: Tensor | None) -> Tensor:
    """[N, V] of the memory of the logits; ValueError or TypeError where that cannot be written."""
    base = None if torch.compiler.is_compiling() else logits._base
    if logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "in_place writes over the logits; got a leaf that requires a gradient, or a view of "
            "one, which would be lost; leave in_place out"
        )
    if logits.dtype == torch.float16:
        raise TypeError(
            "in_place rounds the gradient before a GradScaler can scale it, which float16 has no "
            "digits for; pass bfloat16 or float32 logits, or leave in_place out"
        )
    matrix = _rows_of(logits)
    if matrix is None:
        raise ValueError(
            "in_place needs logits whose rows lie evenly, one after the other, in memory; got "
            f"shape {tuple(logits.shape)} and strides {logits.stride()}; mask tokens rather than "
            "slice them off, or leave in_place out"
        )
    if not torch.compiler.is_compiling():
        refuse_overlap([matrix], [] if anchor is None else [anchor], same=False)
    return matrix


def _rows_of(logits: Tensor) -> Tensor | None:
    """[N, V] without a copy, if there is one in which no row meets another."""
    try:
        rows = logits.detach().view(-1, logits.shape[-1])
    except RuntimeError:
        return None
    (count, size), (across, along) = rows.shape, rows.stride()
    return rows if (size == 1 or along == 1) and (count <= 1 or across >= size) else None


def loss_in_place(
    logits: Tensor,
    anchor: Tensor | None,
    rows: Rows,
    terms: Terms,
    head: tuple[float, float | None],
    normalizer: str | float | Tensor,
    entropy: bool,
    backend: str,
) -> tuple[Tensor, Stats]:
    """(the loss, its statistics without a gradient).

    Where the coefficients are known before the statistics are, a backend may have one pass for
    both (`TOKEN_FUSED`).
    """
    with torch.no_grad():
        matrix, dtype = matrix_of(logits, anchor), compute_dtype(logits, anchor)
        z = normalizer_of(rows, normalizer, dtype)
        scores = (*head, exact_kl_of(terms.kl))
        ahead = slopes_ahead(rows, terms, dtype)
        if ahead is not None and backend in _stats_ops.TOKEN_FUSED:
            fused = _stats_ops.TOKEN_FUSED[backend]
            found = fused(matrix, ahead / z, rows.token_ids, rows.mask, anchor, *scores)
            stats = with_given_anchor(Stats(*found), terms)
        else:
            of_rows = _stats_ops.TOKEN_STATS[backend]
            *found, state = of_rows(matrix, rows.token_ids, rows.mask, anchor, *scores, entropy)
            stats = with_given_anchor(Stats(*found), terms)
            upstream = slopes(rows, stats, terms) / z
            compared = anchor if scores[2] else None
            state = _stats_ops.kept_state(state)
            gradient = _stats_ops.TOKEN_GRADIENT[backend]
            gradient(matrix, upstream, rows.token_ids, compared, *scores, state)
        loss = objective(rows, stats, terms) / z
    return _loss_ops.GIVEN_GRADIENT(loss, logits, matrix, backend), stats
