"""The loss from logits whose gradient is made in the forward pass and written over them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._autograd import CreationMeta, _get_creation_meta

from warp_fast import _loss_ops, _stats_ops
from warp_fast._loss_checks import Terms
from warp_fast._loss_rows import rows_of
from warp_fast._objective import (
    Tokens,
    normalizer_of,
    objective,
    slopes,
    slopes_ahead,
    with_given_anchor,
)
from warp_fast._overlap import refuse_overlap, steps_over
from warp_fast.reference.loss import Stats, compute_dtype


def matrix_of(logits: Tensor, anchor: Tensor | None) -> Tensor:
    """The rows of the logits where they are; ValueError or TypeError if they cannot be written."""
    # a trace does not know what a view is of, so what follows is not checked there
    base = None if torch.compiler.is_compiling() else logits._base
    if logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "in_place writes over the logits; got a leaf that requires a gradient, or a view of "
            "one, which would be lost; leave in_place out"
        )
    if base is not None and _get_creation_meta(logits) != CreationMeta.DEFAULT:
        raise ValueError(
            "in_place needs logits that autograd lets be written; got one of several views that "
            "one op made (chunk, split, unbind); slice instead, or leave in_place out"
        )
    if logits.dtype == torch.float16:
        raise TypeError(
            "in_place rounds the gradient before a GradScaler can scale it, which float16 has no "
            "digits for; pass bfloat16 or float32 logits, or leave in_place out"
        )
    matrix = rows_of(logits.detach())
    if not _apart(matrix):
        raise ValueError(
            "in_place needs logits whose rows are contiguous and share no memory; got shape "
            f"{tuple(logits.shape)} and strides {logits.stride()}; leave in_place out"
        )
    if not torch.compiler.is_compiling():
        refuse_overlap([matrix], [] if anchor is None else [anchor], same=False)
    return matrix


def _apart(rows: Tensor) -> bool:
    """Whether each row is contiguous and meets no other."""
    *counts, size = rows.shape
    *steps, along = rows.stride()
    # time inside the batch, or the batch inside time
    dimensions = list(zip(steps, counts, strict=True))
    nested = steps_over(size, dimensions[::-1]) or steps_over(size, dimensions)
    return nested and (size == 1 or along == 1)


def loss_in_place(
    logits: Tensor,
    anchor: Tensor | None,
    tokens: Tokens,
    terms: Terms,
    head: tuple[float, float | None, str],
    normalizer: str | float | Tensor,
    entropy: bool,
    backend: str,
) -> tuple[Tensor, Stats]:
    """(the loss, its statistics without a gradient).

    Where the coefficients are known before the statistics are, a backend may have one pass for
    both (`TOKEN_FUSED`). head: temperature, softcap and exact KL.
    """
    with torch.no_grad():
        matrix, dtype = matrix_of(logits, anchor), compute_dtype(logits, anchor)
        z = normalizer_of(tokens, normalizer, dtype)
        ahead = slopes_ahead(tokens, terms, dtype)
        if ahead is not None and backend in _stats_ops.TOKEN_FUSED:
            fused = _stats_ops.TOKEN_FUSED[backend]
            found = fused(matrix, ahead / z, tokens.token_ids, tokens.mask, anchor, *head)
            stats = with_given_anchor(Stats(*found), terms)
        else:
            of_rows = _stats_ops.TOKEN_STATS[backend]
            *found, state = of_rows(matrix, tokens.token_ids, tokens.mask, anchor, *head, entropy)
            stats = with_given_anchor(Stats(*found), terms)
            upstream = slopes(tokens, stats, terms) / z
            compared = anchor if head[2] else None
            state = _stats_ops.kept_state(state)
            gradient = _stats_ops.TOKEN_GRADIENT[backend]
            gradient(matrix, upstream, tokens.token_ids, compared, *head, state)
        loss = objective(tokens, stats, terms) / z
    return _loss_ops.GIVEN_GRADIENT(loss, logits, matrix, backend), stats
