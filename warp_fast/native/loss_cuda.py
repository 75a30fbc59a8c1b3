"""The statistics of the loss and their gradient by the CUDA kernels of warp_fast._C, from logits.

A cluster of blocks takes a row (csrc/loss.cu). The state of a row is that of kernels/_rows.py. fp64
inputs are served by the reference, hidden states by Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warp_fast.kernels._table import CODE, on_device
from warp_fast.native._addresses import addresses, extension
from warp_fast.native._state import STATE
from warp_fast.native.loss import EXACT_CODES, matrix, with_unit_stride
from warp_fast.reference import loss as reference

_NO_MATRIX = (0, 0, CODE[torch.float32])


def token_stats_cuda(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    anchor_logits: Tensor | None,
    temperature: float,
    softcap: float | None,
    exact_kl: str,
    entropy: bool,
) -> tuple[Tensor, ...]:
    """`token_stats_reference` and the [N, 8] state for the gradient, without waiting for the GPU.

    Traffic: reads each kept row of both once.
    """
    if reference.compute_dtype(logits, anchor_logits) == torch.float64:
        wide = reference.token_stats_reference(
            logits, token_ids, mask, anchor_logits, temperature, softcap, exact_kl, entropy
        )
        return *wide, wide[0].new_zeros(len(token_ids), STATE)
    found = [logits.new_empty(len(token_ids), dtype=torch.float32) for _ in range(4)]
    state = logits.new_empty((len(token_ids), STATE), dtype=torch.float64)
    kept = mask.contiguous().view(torch.uint8)
    with on_device(logits):
        rows = _Rows(logits, anchor_logits, token_ids, temperature, softcap, exact_kl)
        extension().loss_stats_cuda(
            *rows.arguments, kept.data_ptr(), entropy, addresses(found), state.data_ptr(), _stream()
        )
    return *found, state


def token_stats_backward_cuda(
    upstream: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    anchor_logits: Tensor | None,
    temperature: float,
    softcap: float | None,
    exact_kl: str,
    state: Tensor | None = None,
) -> Tensor:
    """`token_stats_backward_reference`, without waiting for the GPU.

    state: as the forward pass found it, with entropy if that has a gradient; else found in the same
        launch, for which the policy stays in shared memory as far as it fits.
    Traffic: reads logits (for an exact KL the anchor too, and without a state twice) and writes as
        much, once; of a row whose upstream is 0 only the writing.
    """
    if upstream.dtype == torch.float64:
        return reference.token_stats_backward_reference(
            upstream, logits, token_ids, anchor_logits, temperature, softcap, exact_kl
        )
    anchor = anchor_logits if exact_kl else None
    dlogits = torch.empty_like(logits)
    out = with_unit_stride(dlogits)
    upstream = upstream.contiguous()
    state = None if state is None else state.contiguous()
    with on_device(logits):
        rows = _Rows(logits, anchor, token_ids, temperature, softcap, exact_kl)
        extension().loss_gradient_cuda(
            *rows.arguments,
            upstream.data_ptr(),
            0 if state is None else state.data_ptr(),
            matrix(out),
            _stream(),
        )
    return dlogits if out is dlogits else dlogits.copy_(out)


class _Rows:
    """What both launches are about; keeps the copies of what the kernels cannot address."""

    def __init__(
        self,
        logits: Tensor,
        anchor: Tensor | None,
        token_ids: Tensor,
        temperature: float,
        softcap: float | None,
        exact_kl: str,
    ) -> None:
        self.logits, self.token_ids = with_unit_stride(logits), token_ids.contiguous()
        self.anchor = None if anchor is None else with_unit_stride(anchor)
        self.arguments: tuple[Any, ...] = (
            matrix(self.logits),
            _NO_MATRIX if self.anchor is None else matrix(self.anchor),
            self.token_ids.data_ptr(),
            *logits.shape,
            softcap or 0.0,
            temperature,
            0 if anchor is None else EXACT_CODES[exact_kl],
        )


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream
