"""The solve of SLERP in Triton: coefficients from Gram matrices that never leave the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from warp_fast._table import on_device
from warp_fast.reference.slerp import SIN_FLOOR

_SCAN = tl.constexpr(256)
_FLOOR = tl.constexpr(SIN_FLOOR)


@triton.jit
def _sine_cosine(x):
    """Of 0 <= x <= pi/2 in fp64, by their series; the library's sine keeps a stack for huge x."""
    square = x * x
    sine = x
    cosine = x * 0.0 + 1.0
    odd = sine
    even = cosine
    for i in tl.static_range(1, 12):
        even = even * (square * (-1.0 / ((2 * i - 1) * (2 * i))))
        odd = odd * (square * (-1.0 / ((2 * i) * (2 * i + 1))))
        cosine += even
        sine += odd
    return sine, cosine


@triton.jit
def _half_angle(cosine):
    """Half the angle of a cosine, by steps of x + sin(half - x): each leaves error^3 / 6."""
    y = tl.sqrt((1.0 - cosine) / 2)
    x = tl.sqrt((1.0 + cosine) / 2)
    half = y
    for _ in tl.static_range(3):
        sine, cosine = _sine_cosine(half)
        half += y * cosine - x * sine
    return half


@triton.jit
def _factors(cosine, count):
    """sin((1 - r) angle) / sin(angle), sin(r angle) / sin(angle), r = 1 / count; if linear."""
    sine = tl.sqrt((1.0 - cosine) * (1.0 + cosine))
    flat = sine < tl.full([], _FLOOR, tl.float64)  # a number alone would be rounded to fp32
    part, rest = _sine_cosine(2 * _half_angle(cosine) / count)
    length = tl.where(flat, 1.0, sine)
    kept = tl.where(flat, 1.0 - 1.0 / count, (sine * rest - cosine * part) / length)
    added = tl.where(flat, 1.0 / count, part / length)
    return kept, added, flat


@triton.jit
def _refusal(gram, segments, policies):
    """0, or NaN where any <delta, delta> is not finite: one shows all NaN and inf of its delta."""
    found = tl.zeros([_SCAN], tl.float64)
    for start in range(0, segments * policies, _SCAN):
        offs = start + tl.arange(0, _SCAN)
        squares = gram + offs.to(tl.int64) * policies + offs % policies
        value = tl.load(squares, mask=offs < segments * policies, other=0.0)
        found = tl.where(tl.abs(value) < float("inf"), found, float("nan"))
    return tl.sum(found, axis=0)


@triton.jit(do_not_specialize=["segments", "policies"])
def _solve_kernel(
    gram,  # [S, M, M] fp64
    coefficients,  # [S, M] fp64
    linear,  # [S] bool
    segments,  # S
    policies,  # M
    SIZE: tl.constexpr,  # the power of two from M on
):
    """The recursion of `slerp_coefficients_reference`, one segment per program."""
    segment = tl.program_id(0).to(tl.int64)
    policy = tl.arange(0, SIZE)
    there = policy < policies
    products = tl.load(
        gram + (segment * policies + policy[:, None]) * policies + policy[None, :],
        mask=there[:, None] & there[None, :],
        other=0.0,
    )
    found = tl.where(policy == 0, 1.0, 0.0).to(tl.float64)
    flats = segment < 0
    count = tl.full([], 1.0, tl.float64)
    for m in range(1, policies):
        column = tl.sum(tl.where((policy == m)[None, :], products, 0.0), axis=1)
        own = tl.sum(tl.where(policy == m, column, 0.0), axis=0)
        terms = found[:, None] * products * found[None, :]
        square = tl.sum(tl.sum(terms, axis=1), axis=0)
        size = tl.sum(tl.sum(tl.abs(terms), axis=1), axis=0)
        # so much cancelled that rounding is all there is
        square = tl.where(square > size * (_FLOOR * _FLOOR), square, 0.0)
        lengths = tl.sqrt(square) * tl.sqrt(own)
        cosine = tl.sum(found * column, axis=0) / tl.where(lengths > 0, lengths, 1.0)
        cosine = tl.where(lengths > 0, tl.minimum(tl.maximum(cosine, -1.0), 1.0), 1.0)
        count += 1.0
        kept, added, flat = _factors(cosine, count)
        found = tl.where(policy == m, added, found * kept)
        flats = flats | flat
    found += _refusal(gram, segments, policies)
    tl.store(coefficients + segment * policies + policy, found, mask=there)
    tl.store(linear + segment, flats)


def slerp_coefficients_triton(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of slerp_M, and where the linear rule was taken; see the reference.

    Shapes: gram [S, M, M] fp64. Returns [S, M] fp64 and [S] bool, on its device; no host sync.
    """
    segments, policies = gram.shape[:2]
    coefficients = gram.new_empty((segments, policies))
    linear = gram.new_empty(segments, dtype=torch.bool)
    with on_device(gram):
        if segments:
            _solve_kernel[(segments,)](
                gram.contiguous(),
                coefficients,
                linear,
                segments,
                policies,
                SIZE=triton.next_power_of_2(policies),
                num_warps=1,
                enable_fp_fusion=False,
            )
    return coefficients, linear
