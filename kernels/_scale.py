"""The kernels that multiply a gradient which is there already: rows in place, or into a new one."""

from __future__ import annotations

import triton
import triton.language as tl

from warp_fast.kernels._common import rounded
from warp_fast.kernels._rows import LANES, eights, row_at


@triton.jit
def scaled_kernel(values, out, factor, size, CODE: tl.constexpr, BLOCK: tl.constexpr):
    """out = values * factor, rounded once to the dtype of CODE; both contiguous, `size` elements.

    Traffic: reads values, writes out.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values + offs, mask=offs < size, other=0.0, eviction_policy="evict_first")
    tl.store(out + offs, rounded(x * tl.load(factor).to(x.dtype), CODE), mask=offs < size)


@triton.jit(do_not_specialize=["run"])
def scale_kernel(
    values,
    factor,
    run,
    stride,
    jump,
    size,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    CODE: tl.constexpr,
    VECTORS: tl.constexpr,
    EIGHTS: tl.constexpr,
):
    """values *= factor over one piece of one row. Traffic: none where the factor is 1."""
    by = tl.load(factor)
    if by != 1:
        size = eights(size, EIGHTS)
        pid = tl.program_id(0).to(tl.int64)
        row = row_at(values, pid // PIECES, run, stride, jump, EIGHTS)
        lanes = tl.arange(0, VECTORS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        first = (pid % PIECES).to(tl.int32) * PIECE
        end = tl.minimum(first + PIECE, size)
        for begin in range(first, end, VECTORS * LANES):
            offs = begin + lanes
            z = tl.load(row + offs, mask=offs < size, other=0.0)
            tl.store(row + offs, rounded(z.to(by.dtype) * by, CODE), mask=offs < size)
