"""Gram matrix, SLERP coefficients and their application, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHUNK = 1 << 20  # elements of a task vector held in fp64 at a time
SIN_FLOOR = 1e-6  # below it two task vectors count as parallel or antiparallel


def _delta(policy: Tensor, init: Tensor) -> Tensor:
    """policy - init, exact in fp32 for bf16 weights; fp64 when either side is."""
    dtype = torch.promote_types(torch.promote_types(policy.dtype, init.dtype), torch.float32)
    return policy.to(dtype) - init.to(dtype)


def gram_reference(
    init: list[Tensor], policies: list[Tensor], segment: list[int], count: int
) -> Tensor:
    """G[s, i, j] = sum over the tensors of segment s of <delta_i, delta_j>, in fp64.

    Shapes: init T tensors; policies M * T tensors, policy-major; segment T segment numbers below
    count. Returns [count, M, M] on the device of init.
    """
    runs = len(policies) // len(init)
    gram = torch.zeros(count, runs, runs, dtype=torch.float64, device=init[0].device)
    for t, start in enumerate(init):
        start = start.reshape(-1)
        ends = [policies[m * len(init) + t].reshape(-1) for m in range(runs)]
        for at in range(0, start.numel(), _CHUNK):
            piece = slice(at, at + _CHUNK)
            deltas = torch.stack([_delta(end[piece], start[piece]).double() for end in ends])
            gram[segment[t]] += deltas @ deltas.T
    # a matrix product rounds (i, j) and (j, i) apart
    return (gram + gram.transpose(1, 2)) / 2


def slerp_coefficients_reference(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of slerp_M = slerp(slerp_{M-1}, delta_M, 1/M), solved on the Gram matrix alone.

    Shapes: gram [S, M, M] fp64. Returns coefficients [S, M], and the bool [S] that marks where a
    pair was zero, parallel or antiparallel (its step took the linear rule). All coefficients are
    NaN where any gram holds NaN or inf.
    """
    runs = gram.shape[1]
    coefficients = torch.zeros_like(gram[:, 0])
    linear = torch.zeros_like(gram[:, 0, 0], dtype=torch.bool)
    coefficients[:, :1] = 1.0
    for m in range(1, runs):
        rate = 1.0 / (m + 1)
        dot = (coefficients * gram[:, :, m]).sum(1)
        norm = _lengths(coefficients, gram)
        cosine = (dot / (norm * gram[:, m, m].sqrt())).nan_to_num(1.0, 1.0, -1.0).clamp(-1, 1)
        sine = ((1 - cosine) * (1 + cosine)).sqrt()
        angle = torch.atan2(sine, cosine)
        flat = sine < SIN_FLOOR
        kept = torch.where(flat, 1 - rate, ((1 - rate) * angle).sin() / sine)
        added = torch.where(flat, rate, (rate * angle).sin() / sine)
        coefficients *= kept[:, None]
        coefficients[:, m] = added
        linear |= flat
    return torch.where(gram.isfinite().all(), coefficients, torch.nan), linear


def _lengths(coefficients: Tensor, gram: Tensor) -> Tensor:
    """[S] lengths of sum_m c_m delta_m; 0 where so much cancels that rounding is all there is."""
    terms = coefficients[:, :, None] * gram * coefficients[:, None, :]
    squares, floor = terms.sum((1, 2)), SIN_FLOOR**2 * terms.abs().sum((1, 2))
    return torch.where(squares > floor, squares, 0).sqrt()


def slerp_apply_reference_(
    out: list[Tensor],
    init: list[Tensor],
    policies: list[Tensor],
    coefficients: Tensor,
    segment: list[int],
) -> None:
    """out_k = init + sum_m coefficients[k, s, m] * (policy_m - init), for all rows k.

    Shapes: out K * T tensors, row-major; coefficients [K, S, M] fp64. out may be init when K = 1.
    Rows of NaN, which is how a solve refuses, write nothing.
    """
    count = len(init)
    table = coefficients.tolist()
    for t, start in enumerate(init):
        deltas = [_delta(end, start) for end in policies[t::count]]
        for k, row in enumerate(table):
            if math.isnan(row[segment[t]][0]):
                continue
            total = start.to(deltas[0].dtype)
            for weight, delta in zip(row[segment[t]], deltas, strict=True):
                total = total + weight * delta
            out[k * count + t].copy_(total)
