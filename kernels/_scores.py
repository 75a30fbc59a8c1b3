"""Scores of logits and sums of their exponentials, as the kernels of the loss share them.

A sum of exponentials is kept relative to the largest score that went into it, and without the
sampled token: with it added in fp64 a log-probability is never positive and keeps its digits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from warp_fast.kernels._common import INTERPRETED

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def number(value, WIDE: tl.constexpr):
    """An fp64 argument in the dtype of the computation; the interpreter has a Python float."""
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    if INTERPRETED:
        cast = tl.full([], value, dtype)
    else:
        cast = value.to(dtype)
    return cast


@triton.jit
def exponential(x):
    """exp, in fp32 as two instructions: 0 where it is below 2^-126."""
    if x.dtype == tl.float64:
        found = tl.exp(x)
    else:
        found = tl.exp2(x * _LOG2_E)
    return found


@triton.jit
def _quotient(a, b):
    """a / b, in fp32 to 2 ulp as two instructions; b is within 2^+-126."""
    if INTERPRETED or b.dtype == tl.float64:
        found = a / b
    else:
        found = libdevice.fast_dividef(a, b)
    return found


@triton.jit
def _tanh(x):
    """tanh to some ulp of its value: a short odd polynomial (Cephes) where 1 - t would cancel."""
    t = exponential(-2.0 * tl.abs(x))
    far = _quotient(1.0 - t, 1.0 + t)
    found = tl.where(x < 0, -far, far)
    if x.dtype == tl.float32:
        s = x * x
        series = tl.fma(s, -5.70498872745e-3, 2.06390887954e-2)
        series = tl.fma(series, s, -5.37397155531e-2)
        series = tl.fma(series, s, 1.33314422036e-1)
        series = tl.fma(series, s, -3.33332819422e-1)
        found = tl.where(tl.abs(x) < 0.625, tl.fma(x * s, series, x), found)
    return found


@triton.jit
def scores(z, inner, outer, SOFTCAP: tl.constexpr, WIDE: tl.constexpr):
    """outer * tanh(inner * z), or without a softcap outer * z."""
    z = z.to(tl.float64 if WIDE else tl.float32)
    if SOFTCAP:
        u = _tanh(z * number(inner, WIDE)) * number(outer, WIDE)
    else:
        u = z * number(outer, WIDE)
    return u


@triton.jit
def slope(z, inner, outer, SOFTCAP: tl.constexpr, WIDE: tl.constexpr):
    """Derivative of the score: 1 - tanh^2 without its cancellation."""
    if SOFTCAP:
        x = z.to(tl.float64 if WIDE else tl.float32) * number(inner, WIDE)
        t = exponential(-2.0 * tl.abs(x))
        part = _quotient(1.0, 1.0 + t)
        found = t * part * part * number(4 * inner * outer, WIDE)
    else:
        found = number(outer, WIDE)
    return found


@triton.jit
def picked_score(row, token, size, inner, outer, SOFTCAP: tl.constexpr, WIDE: tl.constexpr):
    """Score of the sampled token; NaN for one outside the vocabulary."""
    known = (token >= 0) & (token < size)
    return scores(tl.load(row + token, mask=known, other=float("nan")), inner, outer, SOFTCAP, WIDE)


@triton.jit
def base_shift(picked, anchor_picked):
    """A difference of scores near the others, which are summed relative to it."""
    difference = picked - anchor_picked
    return tl.where(tl.abs(difference) < float("inf"), difference, 0.0)


@triton.jit
def weighed(values, weight):
    """values * weight with inf * 0 = 0."""
    return tl.where(weight > 0, values * weight, 0.0)


@triton.jit
def raised(top, u):
    """The largest score of each vector with those of u; what to subtract, finite; the factor for
    sums relative to the old one."""
    most = tl.maximum(top, tl.max(u, axis=1))
    base = tl.where(most == float("-inf"), 0.0, most)
    return most, base, exponential(top - base)


@triton.jit
def merged(top, total, weighted):
    """Sums of several parts as one: its largest score, the factor of each part, and both sums."""
    most = tl.max(top, axis=0)
    base = tl.where(most == float("-inf"), 0.0, most)
    scale = exponential(top - base)
    lowered = weighted + tl.where(total > 0, total * (top - base), 0.0)
    return most, scale, tl.sum(total * scale, axis=0), tl.sum(lowered * scale, axis=0)


@triton.jit
def with_token(top, total, weighted, picked):
    """The whole row from its other tokens and the sampled one.

    Returns the largest score, the sums of exp over the others, of the sampled token and of all, and
    the sum of exp * (score - largest).
    """
    most = tl.maximum(top, picked)
    own = tl.exp(picked - most)
    scale = tl.exp(top - most)
    others = tl.where(total == 0, 0.0, total * scale)
    weighted = tl.where(total == 0, 0.0, (weighted + total * (top - most)) * scale)
    weighted += tl.where(own == 0, 0.0, own * (picked - most))
    return most, others, own, others + own, weighted
