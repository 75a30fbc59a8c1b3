"""The statistics of sampled tokens and their gradient from hidden states and a head.

Per chunk of rows: logits in fp32 from one GEMM, the kernels of `loss.py` on them, and in the
backward pass two more GEMMs. No GEMM is told on the host how many rows a mask keeps, which would
wait for the GPU: a masked row costs its share of the GEMMs, though no pass over its logits, and
what it holds is never read into a result. Callers who pack their sequences pay for no such row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from warp_fast.kernels.loss import Found, Rows, check_on_host, row_gradient, row_statistics
from warp_fast.reference.loss import compute_dtype

# The gradient of the weight is read and written in fp32 once per chunk: at 2048 rows this is a
# tenth of the time of the GEMMs, whatever V and D are. The logits of a chunk take 2 GiB at 256k.
_ROWS = 2048

_HALF = (torch.bfloat16, torch.float16)


def _operands(states: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both as a GEMM with a result in `dtype` takes them: 16-bit on a GPU, else in `dtype`."""
    if states.is_cuda and dtype == torch.float32:
        if states.dtype == weight.dtype and states.dtype in _HALF:
            return states, weight
    return states.to(dtype), weight.to(dtype)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, summed and returned in `dtype`."""
    if left.dtype == dtype:
        return torch.mm(left, right)
    return torch.mm(left, right, out_dtype=dtype)


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in the dtype of total."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(at, min(at + _ROWS, count)) for at in range(0, count, _ROWS))


class _Heads:
    """Policy and anchor: makes the logits of a chunk of rows."""

    def __init__(
        self,
        policy: tuple[Tensor, Tensor],
        anchor: tuple[Tensor | None, Tensor | None],
        token_ids: Tensor,
        kept: Tensor,
        head: tuple[float, float | None, str],
        dtype: torch.dtype,
    ) -> None:
        hidden, weight = anchor
        self.dtype = dtype
        self.policy = _operands(*policy, dtype)
        self.anchor = None
        if hidden is not None and weight is not None:
            self.anchor = _operands(hidden, weight, dtype)
        self.token_ids, self.kept, self.head = token_ids, kept, head

    def rows(self, chunk: slice) -> Rows:
        anchor = None if self.anchor is None else self._logits(self.anchor, chunk)
        logits = self._logits(self.policy, chunk)
        return Rows.of(logits, anchor, self.token_ids[chunk], self.kept[chunk], self.head)

    def _logits(self, operands: tuple[Tensor, Tensor], chunk: slice) -> Tensor:
        return _product(operands[0][chunk], operands[1].T, self.dtype)


def linear_token_stats_triton(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    anchor_hidden: Tensor | None,
    anchor_weight: Tensor | None,
    temperature: float,
    softcap: float | None,
    exact_kl: str,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`linear_token_stats_reference` and the state for the gradient, without waiting for the GPU.

    Traffic: 2 N V D flops for each head; writes and reads fp32 logits, a chunk of rows at a time.
    """
    check_on_host(token_ids, mask, weight.shape[0])
    dtype = compute_dtype(hidden, weight, anchor_hidden, anchor_weight)
    out = Found.empty(hidden, len(token_ids), dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        heads = _Heads(
            (hidden, weight),
            (anchor_hidden, anchor_weight),
            token_ids,
            mask,
            (temperature, softcap, exact_kl),
            dtype,
        )
        for chunk in _chunks(len(token_ids)):
            row_statistics(heads.rows(chunk), Found(*[part[chunk] for part in out]), entropy)
    return out


def _logits_gradient(rows: Rows, state: Tensor, upstream: Tensor, bf16: bool) -> Tensor:
    """dlogits of a chunk in bf16, or in place of its logits."""
    out = torch.empty_like(rows.logits, dtype=torch.bfloat16) if bf16 else rows.logits
    row_gradient(rows, state.contiguous(), upstream.contiguous(), out)
    return out


def linear_token_stats_backward_triton(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    anchor_hidden: Tensor | None,
    anchor_weight: Tensor | None,
    temperature: float,
    softcap: float | None,
    exact_kl: str,
    needs_hidden: bool,
    needs_weight: bool,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_token_stats_backward_reference`, without waiting for the GPU.

    state: as the forward pass found it, with entropy if that has a gradient; else found again.
    Traffic: 2 N V D flops for each head, and 2 N V D for each gradient.
    Numerics: the gradient of the logits is rounded to bf16 where hidden and weight are bf16, and
        else stays fp32 (so do its GEMMs, which for fp16 are slow: fp16 would lose small gradients).
        dweight is summed in fp32 over all rows.
    """
    dtype = upstream.dtype
    dhidden = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=dtype) if needs_weight else weight.new_empty(0)
    kept = (upstream != 0).any(1)
    anchor = (anchor_hidden, anchor_weight) if exact_kl else (None, None)
    head = (temperature, softcap, exact_kl)
    if state is None:
        state = linear_token_stats_triton(hidden, weight, token_ids, kept, *anchor, *head, True)[4]
    with torch.autocast(hidden.device.type, enabled=False):
        heads = _Heads((hidden, weight), anchor, token_ids, kept, head, dtype)
        bf16 = dtype == torch.float32 and hidden.dtype == weight.dtype == torch.bfloat16
        # in bf16 on a GPU alone, but rounded alike everywhere
        operand = heads.policy[0].dtype if bf16 else dtype
        states, matrix = (x.to(operand) for x in heads.policy)
        for chunk in _chunks(len(token_ids)):
            dlogits = _logits_gradient(heads.rows(chunk), state[chunk], upstream[chunk], bf16)
            dlogits = dlogits.to(operand)
            left = kept[chunk, None]
            if needs_hidden:
                found = _product(dlogits, matrix, dtype)
                dhidden[chunk] = torch.where(left, found, 0).to(hidden.dtype)
            if needs_weight:
                # 0 * NaN of a row without a gradient must not reach the sum
                _accumulate(dweight, dlogits.T, torch.where(left, states[chunk], 0))
    return dhidden, dweight.to(weight.dtype)
