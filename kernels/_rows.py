"""The kernels of the loss: sums over pieces of a row, what they give for the row, the gradient.

u = score of the policy, v = score of the anchor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from warp_fast import _loss_rows
from warp_fast.kernels._common import rounded
from warp_fast.kernels._scores import (
    base_shift,
    exponential,
    merged,
    number,
    picked_score,
    raised,
    scores,
    slope,
    weighed,
    with_token,
)

LANES = tl.constexpr(8)  # 16 bytes of bf16, which one thread sums on its own
REVERSE = tl.constexpr(_loss_rows.EXACT_CODES["reverse"])
FORWARD = tl.constexpr(_loss_rows.EXACT_CODES["forward"])

# fields of a piece: largest u and sum of exp, without the sampled token; sum of exp * (u -
# largest); the first two of the anchor; sum of exp * (u - v - shift)
FIELDS = tl.constexpr(6)
# state of a row, in fp64: largest u, 1 / sum of exp, mean of u - largest, probability of the other
# tokens; the first two of the anchor; the shift, and the mean of u - v - shift
STATE = tl.constexpr(_loss_rows.STATE)
# log-prob of the sampled token below which its odds may not fit: exp(60) times a weight does
FAR = tl.constexpr(-60.0)


@triton.jit
def eights(number, EIGHTS: tl.constexpr):
    """The number. EIGHTS: it is a multiple of 8, which the compiler then knows."""
    if EIGHTS:
        number = number // 8 * 8
    return number


@triton.jit
def row_at(matrix, n, run, stride, jump, EIGHTS: tl.constexpr = False):
    """Where row n, an int64 below 2^31, begins; see `layout` in warp_fast/_loss_rows.py."""
    runs = (n.to(tl.int32) // run).to(tl.int64)
    return matrix + n * eights(stride, EIGHTS) + runs * eights(jump, EIGHTS)


@triton.jit
def _place(token, size):
    """A token's place in its row, in 32 bits; -1 for one outside the vocabulary."""
    return tl.where((token >= 0) & (token < size), token, -1).to(tl.int32)


@triton.jit
def _clear(row, first, end, size, lanes, CODE: tl.constexpr, VECTORS: tl.constexpr):
    """0 in [first, end) of a row."""
    zero = tl.zeros([VECTORS, LANES], tl.float32)
    for begin in range(first, end, VECTORS * LANES):
        offs = begin + lanes
        tl.store(row + offs, rounded(zero, CODE), mask=offs < size)


@triton.jit(do_not_specialize=["run"])
def sums_kernel(
    logits,  # rows of V, where `row_at` says
    anchor,
    token_ids,  # [N] int64
    kept,  # [N] uint8
    sums,  # [N, PIECES, FIELDS]
    odds,  # [N, V]
    run,
    stride,
    jump,
    anchor_stride,
    anchor_jump,
    size,  # V
    inner: tl.float64,
    outer: tl.float64,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ANCHOR: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXACT: tl.constexpr,
    ODDS: tl.constexpr,  # dtype code of the odds; -1 without them
    WIDE: tl.constexpr,
    VECTORS: tl.constexpr,
    EIGHTS: tl.constexpr,  # whether strides, jumps and size are multiples of 8
):
    """Sums over one piece of one row, and the odds, p_v / p_token times the slope of the score.

    A row that is not kept costs nothing but odds of 0.
    Traffic: reads each kept row of logits and anchor once; writes the odds.
    """
    size = eights(size, EIGHTS)
    pid = tl.program_id(0).to(tl.int64)
    n = pid // PIECES
    lanes = tl.arange(0, VECTORS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    first = (pid % PIECES).to(tl.int32) * PIECE
    end = tl.minimum(first + PIECE, size)
    odds_row = odds + n * size
    if tl.load(kept + n) == 0:
        if ODDS >= 0:
            _clear(odds_row, first, end, size, lanes, ODDS, VECTORS)
        return
    row = row_at(logits, n, run, stride, jump, EIGHTS)
    anchor_row = row_at(anchor, n, run, anchor_stride, anchor_jump, EIGHTS)
    token = tl.load(token_ids + n)
    picked = picked_score(row, token, size, inner, outer, SOFTCAP, WIDE)
    shift = 0.0
    if EXACT:
        shift = base_shift(
            picked,
            picked_score(anchor_row, token, size, inner, outer, SOFTCAP, WIDE),
        )
    sampled = _place(token, size)
    total = tl.zeros([VECTORS], tl.float64 if WIDE else tl.float32)
    weighted, apart, anchor_total = total, total, total
    top = total - float("inf")
    anchor_top = top

    for begin in range(first, end, VECTORS * LANES):
        offs = begin + lanes
        stop = begin + VECTORS * LANES
        # where some do not count in the sums
        partial = (stop > size) | ((begin <= sampled) & (sampled < stop))
        z = tl.load(row + offs, mask=offs < size, other=0.0)
        u = scores(z, inner, outer, SOFTCAP, WIDE)
        if ANCHOR:
            w = tl.load(anchor_row + offs, mask=offs < size, other=0.0)
            v = scores(w, inner, outer, SOFTCAP, WIDE)
        if partial:
            others = (offs < size) & (offs != sampled)
            u = tl.where(others, u, float("-inf"))
            if ANCHOR:
                v = tl.where(others, v, float("-inf"))
        old = top
        top, base, scale = raised(old, u)
        u_low = u - base[:, None]
        e = exponential(u_low)
        if ENTROPY:
            lowered = weighted + tl.where(total > 0, total * (old - base), 0.0)
            weighted = lowered * scale + tl.sum(tl.where(e > 0, e * u_low, 0.0), axis=1)
        total = total * scale + tl.sum(e, axis=1)
        if ODDS >= 0:
            near = exponential(u - picked) * slope(z, inner, outer, SOFTCAP, WIDE)
            tl.store(odds_row + offs, rounded(near, ODDS), mask=offs < size)
        if ANCHOR:
            anchor_top, base, anchor_scale = raised(anchor_top, v)
            anchor_e = exponential(v - base[:, None])
            anchor_total = anchor_total * anchor_scale + tl.sum(anchor_e, axis=1)
            if EXACT == REVERSE:
                apart = weighed(apart, scale) + tl.sum(weighed(u - v - shift, e), axis=1)
            elif EXACT == FORWARD:
                difference = weighed(u - v - shift, anchor_e)
                apart = weighed(apart, anchor_scale) + tl.sum(difference, axis=1)

    place = sums + pid * FIELDS
    most, scale, total, weighted = merged(top, total, weighted)
    tl.store(place, most)
    tl.store(place + 1, total)
    tl.store(place + 2, weighted)
    if ANCHOR:
        most, anchor_scale, total, _ = merged(anchor_top, anchor_total, anchor_total)
        tl.store(place + 3, most)
        tl.store(place + 4, total)
        if EXACT == FORWARD:
            scale = anchor_scale
        tl.store(place + 5, tl.sum(weighed(apart, scale), axis=0))


@triton.jit
def _pieces(place, inside):
    """A field of each piece in fp64: largest score, and the sum after it."""
    top = tl.load(place, mask=inside, other=float("-inf")).to(tl.float64)
    return top, tl.load(place + 1, mask=inside, other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=["run"])
def row_kernel(
    logits,
    anchor,
    token_ids,
    kept,
    sums,  # [N, PIECES, FIELDS]
    logprobs,  # [N], as the other statistics
    entropies,
    anchor_logprobs,
    kls,
    state,  # [N, STATE] fp64
    odds,  # [N, V], of the sampled token here
    factors,  # [N]
    run,
    stride,
    jump,
    anchor_stride,
    anchor_jump,
    size,
    inner: tl.float64,
    outer: tl.float64,
    PIECES: tl.constexpr,
    PADDED: tl.constexpr,  # PIECES, up to a power of two
    SOFTCAP: tl.constexpr,
    ANCHOR: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXACT: tl.constexpr,
    ODDS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One row from its pieces, in fp64; 0 of a row that is not kept.

    The gradient of its log-prob is factor * odds. A factor of 1 says that the odds do not fit.
    """
    n = tl.program_id(0).to(tl.int64)
    logp = tl.full([], 0.0, tl.float64)
    entropy, logq, kl, shift, mean = logp, logp, logp, logp, logp
    most, share, low, rest, anchor_most, anchor_share = logp, logp, logp, logp, logp, logp
    factor = logp
    if tl.load(kept + n) != 0:
        token = tl.load(token_ids + n)
        row = row_at(logits, n, run, stride, jump)
        picked = picked_score(row, token, size, inner, outer, SOFTCAP, WIDE)
        k = tl.arange(0, PADDED)
        place, inside = sums + (n * PIECES + k) * FIELDS, k < PIECES
        top, total = _pieces(place, inside)
        weighted = tl.load(place + 2, mask=inside, other=0.0).to(tl.float64)
        piece_top, scale, total, weighted = merged(top, total, weighted)
        own_u = picked.to(tl.float64)
        most, others, own, all_, weighted = with_token(piece_top, total, weighted, own_u)
        logp = -((most - own_u) + tl.log(all_))
        share, low, rest = 1.0 / all_, weighted / all_, others / all_
        if ODDS >= 0:
            factor = tl.where(logp < FAR, 1.0, -own / all_)
            known = (token >= 0) & (token < size)
            z = tl.load(row + token, mask=known, other=float("nan"))
            of_token = -(others / own) * slope(z, inner, outer, SOFTCAP, WIDE)
            tl.store(odds + n * size + token, rounded(of_token, ODDS), mask=known)
        if ENTROPY:
            entropy = tl.log(all_) - low
        if ANCHOR:
            anchor_row = row_at(anchor, n, run, anchor_stride, anchor_jump)
            anchor_picked = picked_score(anchor_row, token, size, inner, outer, SOFTCAP, WIDE)
            anchor_top, total = _pieces(place + 3, inside)
            anchor_piece_top, anchor_scale, total, _ = merged(anchor_top, total, total)
            own_v = anchor_picked.to(tl.float64)
            anchor_most, _, anchor_own, anchor_all, _ = with_token(
                anchor_piece_top, total, total, own_v
            )
            logq = -((anchor_most - own_v) + tl.log(anchor_all))
            anchor_share = 1.0 / anchor_all
            if EXACT:
                if EXACT == FORWARD:
                    scale, own, whole = anchor_scale, anchor_own, anchor_all
                    raise_ = tl.exp(anchor_piece_top - anchor_most)
                else:
                    whole = all_
                    raise_ = tl.exp(piece_top - most)
                shift = base_shift(picked, anchor_picked).to(tl.float64)
                each = tl.load(place + 5, mask=inside, other=0.0).to(tl.float64)
                mean = weighed(tl.sum(weighed(each, scale), axis=0), raise_)
                # the shift is the sampled token's own difference, rounded, unless that is infinite;
                # in the gradient, which rounds as well, the token's own is 0
                own_apart = own_u - own_v
                counted = tl.abs(own_apart) < float("inf")
                mean += tl.where(counted, 0.0, weighed(own_apart, own))
                rest_apart = weighed(tl.where(counted, own_apart - shift, 0.0), own) / whole
                mean = mean / whole
                normalizers = (most - anchor_most - shift) + (tl.log(all_) - tl.log(anchor_all))
                kl = mean + rest_apart - normalizers
                if EXACT == FORWARD:
                    kl = -kl
                kl = tl.where(kl < 0, 0.0, kl)
    tl.store(logprobs + n, logp)
    tl.store(entropies + n, entropy)
    tl.store(anchor_logprobs + n, logq)
    tl.store(kls + n, kl)
    if ODDS >= 0:
        tl.store(factors + n, factor)
    place = state + n * STATE
    tl.store(place, most)
    tl.store(place + 1, share)
    tl.store(place + 2, low)
    tl.store(place + 3, rest)
    tl.store(place + 4, anchor_most)
    tl.store(place + 5, anchor_share)
    tl.store(place + 6, shift)
    tl.store(place + 7, mean)


@triton.jit(do_not_specialize=["run"])
def gradient_kernel(
    upstream,  # [N, 3] of logprobs, entropy, kl
    logits,
    anchor,
    token_ids,
    kept,  # [N] uint8: 1 for a gradient, 0 for one of 0, 2 for what is there already
    state,  # [N, STATE] fp64
    out,  # may be logits
    run,
    stride,
    jump,
    anchor_stride,
    anchor_jump,
    out_stride,
    out_jump,
    size,
    inner: tl.float64,
    outer: tl.float64,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
    CODE: tl.constexpr,
    VECTORS: tl.constexpr,
    EIGHTS: tl.constexpr,
):
    """d(upstream . statistics)/d(logits) over one piece of one row.

    Traffic: reads logits, and for an exact KL the anchor; writes out.
    """
    size = eights(size, EIGHTS)
    pid = tl.program_id(0).to(tl.int64)
    n = pid // PIECES
    row = row_at(logits, n, run, stride, jump, EIGHTS)
    anchor_row = row_at(anchor, n, run, anchor_stride, anchor_jump, EIGHTS)
    out_row = row_at(out, n, run, out_stride, out_jump, EIGHTS)
    lanes = tl.arange(0, VECTORS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    first = (pid % PIECES).to(tl.int32) * PIECE
    end = tl.minimum(first + PIECE, size)
    what = tl.load(kept + n)
    if what != 1:
        if what == 0:
            _clear(out_row, first, end, size, lanes, CODE, VECTORS)
        return
    sampled = _place(tl.load(token_ids + n), size)
    dlogp, dentropy = tl.load(upstream + n * 3), tl.load(upstream + n * 3 + 1)
    dkl = tl.load(upstream + n * 3 + 2)
    fine: tl.constexpr = tl.float64 if WIDE else tl.float32
    place = state + n * STATE
    most, share = tl.load(place).to(fine), tl.load(place + 1).to(fine)
    low, rest = tl.load(place + 2).to(fine), tl.load(place + 3).to(fine)
    anchor_most, anchor_share = tl.load(place + 4).to(fine), tl.load(place + 5).to(fine)
    apart = (tl.load(place + 6) + tl.load(place + 7)).to(fine)
    if not SOFTCAP:
        # the slope is one number
        whole = number(outer, WIDE)
        dlogp, dentropy, dkl = dlogp * whole, dentropy * whole, dkl * whole
    of_others, of_token = -dlogp * share, dlogp * rest
    of_entropy, of_kl, of_anchor = dentropy * share, dkl * share, dkl * anchor_share
    compared = tl.where(dkl != 0, size, 0)  # else the KL may be infinite
    for begin in range(first, end, VECTORS * LANES):
        offs = begin + lanes
        z = tl.load(row + offs, mask=offs < size, other=0.0)
        if EXACT:
            w = tl.load(anchor_row + offs, mask=offs < compared, other=0.0)
        u = scores(z, inner, outer, SOFTCAP, WIDE)
        e = exponential(u - most)
        du = of_others * e
        if (begin <= sampled) & (sampled < begin + VECTORS * LANES):
            du = tl.where(offs == sampled, of_token, du)
        if dentropy != 0:
            du -= of_entropy * weighed(u - most - low, e)
        if EXACT:
            if dkl != 0:
                v = scores(w, inner, outer, SOFTCAP, WIDE)
                if EXACT == REVERSE:
                    du += of_kl * weighed(u - v - apart, e)
                else:
                    du += of_kl * e - of_anchor * exponential(v - anchor_most)
        if SOFTCAP:
            du *= slope(z, inner, outer, SOFTCAP, WIDE)
        tl.store(out_row + offs, rounded(du, CODE), mask=offs < size)
