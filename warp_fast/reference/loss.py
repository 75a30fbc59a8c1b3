"""Statistics of the sampled tokens under a policy head, and their gradient, in plain PyTorch.

Row n holds logits z_n; u = softcap * tanh(z / softcap) / temperature, p = softmax(u), and for the
anchor likewise v and q. Rows outside the mask cost nothing, give 0 and get zero gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from warp_fast._loss_rows import check_ids, place_of

_CHUNK = 1 << 24  # logits alive at a time: 64 MiB in fp32


class Stats(NamedTuple):
    """Per row, fp32 (fp64 for fp64 inputs), nats; 0 where masked or not asked for."""

    logprobs: Tensor
    entropy: Tensor
    anchor_logprobs: Tensor
    kl: Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp32, or fp64 when an input is."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def scores(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Scaled logits u: softcap first, then temperature."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def _expectation(probabilities: Tensor, values: Tensor) -> Tensor:
    """sum_j p_j x_j with 0 * inf = 0."""
    return (probabilities * values).masked_fill(probabilities == 0, 0).sum(-1)


def _row_stats(
    logp: Tensor, token_ids: Tensor, logq: Tensor | None, exact_kl: str, entropy: bool
) -> list[Tensor]:
    """The four statistics from log-softmax rows [n, V] of policy and anchor."""
    zero = logp.new_zeros(len(logp))
    pick = token_ids[:, None]
    found = [logp.gather(1, pick)[:, 0].clamp(max=0), zero, zero, zero]
    if entropy:
        found[1] = -_expectation(logp.exp(), logp)
    if logq is not None:
        found[2] = logq.gather(1, pick)[:, 0].clamp(max=0)
        if exact_kl == "reverse":
            found[3] = _expectation(logp.exp(), logp - logq)
        elif exact_kl == "forward":
            found[3] = _expectation(logq.exp(), logq - logp)
    return found


def _row_gradient(
    logp: Tensor, token_ids: Tensor, logq: Tensor | None, exact_kl: str, upstream: Tensor
) -> Tensor:
    """d(upstream . stats)/du for rows [n, V]; upstream [n, 3] is of logprobs, entropy and kl."""
    p = logp.exp()
    dlogp, dentropy, dkl = upstream.T[:, :, None].unbind()
    du = -dlogp * p
    du.scatter_add_(1, token_ids[:, None], dlogp)
    if dentropy.any():
        entropy = -_expectation(p, logp)[:, None]
        du -= dentropy * torch.where(p > 0, p * (logp + entropy), 0)
    if logq is not None and exact_kl == "reverse":
        kl = _expectation(p, logp - logq)[:, None]
        # a KL that nobody asks the gradient of may be infinite
        du += torch.where((p > 0) & (dkl != 0), dkl * p * (logp - logq - kl), 0)
    elif logq is not None and exact_kl == "forward":
        du += torch.where(dkl != 0, dkl * (p - logq.exp()), 0)
    return du


def _through_head(du: Tensor, logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """dz from du: the slope of softcap and temperature."""
    if softcap is not None:
        du = du * (1 - torch.tanh(logits / softcap).square())
    return du / temperature


def _pieces(rows: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    return torch.split(rows, max(1, _CHUNK // vocabulary))


def token_stats_reference(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    anchor_logits: Tensor | None,
    temperature: float,
    softcap: float | None,
    exact_kl: str,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of rows of logits.

    Shapes: logits, anchor_logits [N, V], or [B, T, V] of N = B T rows; token_ids, mask [N].
    exact_kl is "reverse", "forward" or "". Returns Stats of [N].
    Traffic: reads each kept row of both.
    """
    dtype = compute_dtype(logits, anchor_logits)
    found = [torch.zeros(len(token_ids), dtype=dtype, device=logits.device) for _ in range(4)]
    rows = mask.nonzero()[:, 0]
    check_ids(token_ids, rows, logits.shape[-1])
    for piece in _pieces(rows, logits.shape[-1]):
        z = logits[place_of(logits, piece)]
        logp = scores(z.to(dtype), temperature, softcap).log_softmax(-1)
        logq = None
        if anchor_logits is not None:
            w = anchor_logits[place_of(anchor_logits, piece)]
            logq = scores(w.to(dtype), temperature, softcap).log_softmax(-1)
        for out, part in zip(
            found, _row_stats(logp, token_ids[piece], logq, exact_kl, entropy), strict=True
        ):
            out[piece] = part
    return Stats(*found)


def token_stats_backward_reference(
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
    """dlogits, like logits, from upstream [N, 3]; a row whose upstream is 0 gets exactly 0.

    state: of other backends; the inputs are enough here.
    out: what to write them to, which may be the logits; None makes a tensor.
    """
    dlogits = torch.empty_like(logits) if out is None else out
    live = upstream.any(1)
    for piece in _pieces(live.nonzero()[:, 0], logits.shape[-1]):
        place = place_of(logits, piece)
        z = logits[place].to(upstream.dtype)
        logp = scores(z, temperature, softcap).log_softmax(-1)
        logq = None
        if anchor_logits is not None and exact_kl:
            w = anchor_logits[place_of(anchor_logits, piece)].to(upstream.dtype)
            logq = scores(w, temperature, softcap).log_softmax(-1)
        du = _row_gradient(logp, token_ids[piece], logq, exact_kl, upstream[piece])
        dlogits[place] = _through_head(du, z, temperature, softcap).to(logits.dtype)
    dlogits[place_of(dlogits, (~live).nonzero()[:, 0])] = 0
    return dlogits


def scale_reference_(values: Tensor, factor: Tensor) -> None:
    """values *= factor, in place. Traffic: none on the CPU where the factor is 1."""
    if factor.is_cuda or factor != 1:
        values.mul_(factor)


def scaled_reference(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """values * factor, rounded once to dtype."""
    return torch.mul(values, factor, out=torch.empty_like(values, dtype=dtype))


def sequence_sums_reference(values: Tensor, sequence: Tensor, count: int) -> Tensor:
    """[count]: the sum of each sequence, in fp64 between, and in the same order every time.

    Shapes: values [N]; sequence [N], rising, says whose a token is.
    """
    bounds = torch.searchsorted(sequence, torch.arange(count + 1, device=values.device))
    sums = torch.segment_reduce(values.double(), "sum", offsets=bounds, unsafe=True)
    return sums.to(values.dtype)


def sums_to_go_reference(values: Tensor, sequence: Tensor, longest: int) -> Tensor:
    """[N]: the sum from each token to the last one of its sequence, in fp64 between.

    Shapes: values [N]; sequence [N], rising, says whose a token is; none has more than `longest`.
    """
    # sums over the whole batch would carry an inf, and the rounding of a 1e30, to other sequences
    sums = values.to(torch.float64, copy=True)
    reach = 1
    while reach < longest:
        same = sequence[reach:] == sequence[:-reach]
        sums[:-reach] += torch.where(same, sums[reach:], 0)
        reach *= 2
    return sums.to(values.dtype)
