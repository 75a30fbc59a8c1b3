"""The statistics of the loss and their gradient by the CUDA kernels of warp_fast._C, from logits.

A cluster of blocks takes a row (csrc/loss.cu). The state of a row is that of kernels/_rows.py. fp64
inputs are served by the reference, which waits for the GPU, hidden states by Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warp_fast._loss_rows import EXACT_CODES, STATE, Found, with_unit_stride
from warp_fast._table import copied_back, on_device
from warp_fast.native._addresses import addresses, extension
from warp_fast.native.loss import NO_MATRIX, matrix
from warp_fast.reference import loss as reference


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
    found = Found.empty(logits, len(token_ids), torch.float32)
    with on_device(logits):
        rows = _Arguments(logits, anchor_logits, token_ids, temperature, softcap, exact_kl)
        kept = _bytes(mask)
        extension().loss_stats_cuda(
            rows.arguments, kept.data_ptr(), entropy, addresses(found), _stream()
        )
    return found


def token_stats_backward_cuda(
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
    """`token_stats_backward_reference`, without waiting for the GPU.

    state: as the forward pass found it, with entropy if that has a gradient; else found again.
    Traffic: reads logits (for an exact KL the anchor too) and writes as much, once; of a row whose
        upstream is 0 only the writing.
    """
    anchor, head = anchor_logits if exact_kl else None, (temperature, softcap, exact_kl)
    if upstream.dtype == torch.float64:
        return reference.token_stats_backward_reference(
            upstream, logits, token_ids, anchor, *head, None, out
        )
    if state is None:
        live = (upstream != 0).any(1)
        state = token_stats_cuda(logits, token_ids, live, anchor, *head, True)[4]
    dlogits = torch.empty_like(logits) if out is None else out
    upstream, state = upstream.contiguous(), state.contiguous()
    with on_device(logits):
        rows = _Arguments(logits, anchor, token_ids, *head)
        written = with_unit_stride(dlogits)
        extension().loss_gradient_cuda(
            rows.arguments, upstream.data_ptr(), state.data_ptr(), matrix(written), _stream()
        )
    copied_back([dlogits], [written])
    return dlogits


def token_stats_fused_cuda_(
    logits: Tensor,
    upstream: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    anchor_logits: Tensor | None,
    temperature: float,
    softcap: float | None,
    exact_kl: str,
) -> tuple[Tensor, ...]:
    """The statistics, entropy among them, and their gradient over the logits, in one launch.

    upstream: [N, 3], known before the statistics are.
    Traffic: reads policy and anchor once and writes the gradient, 6 bytes per bf16 logit: both
        stay in shared memory as far as they fit (rows of 256k do on Hopper).
    """
    if reference.compute_dtype(logits, anchor_logits) == torch.float64:
        rest = (anchor_logits, temperature, softcap, exact_kl)
        wide = reference.token_stats_reference(logits, token_ids, mask, *rest, True)
        reference.token_stats_backward_reference(upstream, logits, token_ids, *rest, out=logits)
        return wide
    found = Found.empty(logits, len(token_ids), torch.float32)
    upstream = upstream.contiguous()
    with on_device(logits):
        rows = _Arguments(logits, anchor_logits, token_ids, temperature, softcap, exact_kl)
        kept = _bytes(mask)
        extension().loss_fused_cuda(
            rows.arguments,
            kept.data_ptr(),
            upstream.data_ptr(),
            addresses(found),
            matrix(rows.logits),
            _stream(),
        )
    copied_back([logits], [rows.logits])
    return found[:4]


def scale_cuda_(values: Tensor, factor: Tensor) -> None:
    """values [N, V] *= factor, in place, without waiting for the GPU.

    Traffic: none where the factor is 1, else reads and writes the values.
    """
    if torch.float64 in (values.dtype, factor.dtype):
        return reference.scale_reference_(values, factor)
    rows = with_unit_stride(values)
    shape = rows.shape[:-1].numel(), rows.shape[-1]
    with on_device(values):
        extension().loss_scale_cuda(matrix(rows), *shape, factor.data_ptr(), _stream())
    copied_back([values], [rows])


def _bytes(mask: Tensor) -> Tensor:
    return mask.contiguous().view(torch.uint8)


class _Arguments:
    """The arguments that all launches share; keeps alive the copies that the kernels read."""

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
            NO_MATRIX if self.anchor is None else matrix(self.anchor),
            self.token_ids.data_ptr(),
            len(token_ids),
            logits.shape[-1],
            softcap or 0.0,
            temperature,
            0 if anchor is None else EXACT_CODES[exact_kl],
        )


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream
