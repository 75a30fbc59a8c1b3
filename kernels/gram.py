# ruff: noqa: RUF005 -- inside a kernel a tuple grows by concatenation; it has no starred form
"""The Gram matrices of task vectors in Triton: one launch over all tensors of the model.

Summed in two stages of fixed order, per chunk of a tensor and then per segment, without atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from warp_fast._table import (
    LANES,
    Launch,
    TableCache,
    by_column,
    gram_launches,
    on_device,
    packed,
)
from warp_fast.kernels._common import HEAD, deltas_of, entry_size, pointers

_COLUMNS = tl.constexpr(LANES)
# a thread sums the products of one vector of 8 before anything crosses threads
_WARPS = 4
_ROWS = 32 * _WARPS
# without a limit of its own the assembler spills to fit one more block on a multiprocessor
_REGISTERS = {} if torch.version.hip else {"maxnreg": 255}
_SUM_BLOCK = 1024

_tables = TableCache()


class Tiling(NamedTuple):
    """Policies per group, elements per chunk, and vectors that are on their way at once."""

    group: int
    chunk: int
    stages: int


def tiling(runs: int, heavy: bool = False) -> Tiling:
    """heavy: see `Launch.heavy`.

    All pairs of 5 policies fit in registers as fp64 sums. More are taken 4 by 4, heavy ones 2 by 2,
    from chunks short enough to be read again from cache. From 4 on the products take about as long
    as the loads, and few programs fit beside each other: loads go ahead through shared memory.
    """
    group, chunk = (5, 1 << 15) if runs <= 5 else (4, 1 << 13)
    return Tiling(2 if heavy else group, chunk, 3 if runs > 3 else 1)


@triton.jit
def _added(sums, x, y, TRIANGLE: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """sums[i, j] + x_i . y_j over the vector of each thread."""
    found = ()
    for i in tl.static_range(A):
        for j in tl.static_range(i if TRIANGLE else 0, B):
            found = found + (
                sums[len(found)] + tl.sum(x[i].to(tl.float64) * y[j].to(tl.float64), axis=1),
            )
    return found


@triton.jit
def _store_sums(
    row, sums, a: tl.constexpr, b: tl.constexpr, A: tl.constexpr, B: tl.constexpr, M: tl.constexpr
):
    """Sum over the threads, and write the pairs (a + i, b + j) to their places in the triangle."""
    done = ()
    for i in tl.static_range(A):
        for j in tl.static_range(i if a == b else 0, B):
            place = (a + i) * M - (a + i) * (a + i - 1) // 2 + (b + j) - (a + i)
            tl.store(row + place, tl.sum(sums[len(done)], axis=0))
            done = done + (0,)


@triton.jit
def _group(
    entry,
    row,
    begin,
    end,
    size,
    a: tl.constexpr,
    b: tl.constexpr,
    M: tl.constexpr,
    CODES: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Inner products of policies [a, a + GROUP) with [b, b + GROUP) over elements [begin, end)."""
    A: tl.constexpr = GROUP if a + GROUP <= M else M - a
    B: tl.constexpr = GROUP if b + GROUP <= M else M - b
    init_ptr = pointers(entry, 0, 1, CODES, ALIGNED)[0]
    left = pointers(entry, 1 + a, A, CODES, ALIGNED)
    right = pointers(entry, 1 + b, B, CODES, ALIGNED)
    lanes = tl.arange(0, ROWS)[:, None] * _COLUMNS + tl.arange(0, _COLUMNS)[None, :]
    lanes = lanes.to(tl.int64)
    sums = ()
    for i in tl.static_range(A):
        for _ in tl.static_range(i if a == b else 0, B):
            sums = sums + (tl.zeros([ROWS], tl.float64),)
    for start in tl.range(begin, end, ROWS * _COLUMNS, num_stages=STAGES):
        offs = start + lanes
        mask = offs < size
        init = tl.load(init_ptr + offs, mask=mask, other=0.0)
        x = deltas_of(init, left, offs, mask, A, "")
        y = x
        if a != b:
            y = deltas_of(init, right, offs, mask, B, "")
        sums = _added(sums, x, y, a == b, A, B)
    _store_sums(row, sums, a, b, A, B, M)


@triton.jit
def _gram_kernel(
    table,  # [entries, HEAD + 1 + M] int64: size, first block, first row; init, policies
    block_entry,  # [blocks] int32, entry of each program
    partial,  # [rows, M (M + 1) / 2] fp64, the upper triangle row by row
    M: tl.constexpr,
    CODES: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Inner products of the task vectors over one chunk of one entry.

    Traffic: reads init and M policies once from memory; for M above GROUP again from cache.
    """
    pid = tl.program_id(0).to(tl.int64)
    entry = table + tl.load(block_entry + pid).to(tl.int64) * (HEAD + 1 + M)
    size = entry_size(entry, ALIGNED)
    block = pid - tl.load(entry + 1)
    row = partial + (tl.load(entry + 2) + block) * (M * (M + 1) // 2)
    begin = block * CHUNK
    end = tl.minimum(begin + CHUNK, size)
    for a in tl.static_range(0, M, GROUP):
        for b in tl.static_range(a, M, GROUP):
            _group(entry, row, begin, end, size, a, b, M, CODES, ALIGNED, GROUP, STAGES, ROWS)


@triton.jit(do_not_specialize=["M"])
def _sum_kernel(
    partial,  # [rows, M (M + 1) / 2] fp64
    bounds,  # [S + 1] int64, rows of segment s are bounds[s] .. bounds[s + 1]
    gram,  # [S, M, M] fp64
    M,
    BLOCK: tl.constexpr,
):
    """One entry of one Gram matrix per program, its chunks summed in a fixed order."""
    s, i, j = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    first, second = tl.minimum(i, j), tl.maximum(i, j)
    place = first * M - first * (first - 1) // 2 + second - first
    stop = tl.load(bounds + s + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(tl.load(bounds + s), stop, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        total += tl.load(partial + rows * (M * (M + 1) // 2) + place, mask=rows < stop, other=0.0)
    tl.store(gram + (s * M + i) * M + j, tl.sum(total, axis=0))


def gram_triton(
    init: list[Tensor], policies: list[Tensor], segment: list[int], count: int
) -> Tensor:
    """G[s, i, j] = sum over the tensors of segment s of <delta_i, delta_j>, in fp64.

    Shapes: as `gram_reference`. Task vectors in fp32, products and sums in fp64.
    """
    runs = len(policies) // len(init)
    chunk = tiling(runs).chunk
    columns = by_column([*init, *policies], len(init))

    def build() -> tuple[list[Launch], Tensor, int]:
        return gram_launches(columns, chunk, segment, count)

    with on_device(init[0]):
        launches, bounds, rows = _tables.get(columns, (tuple(segment), count), build)
        partial = init[0].new_empty((rows, runs * (runs + 1) // 2), dtype=torch.float64)
        gram = init[0].new_empty((count, runs, runs), dtype=torch.float64)
        for launch in launches:
            group, _, stages = tiling(runs, launch.heavy)
            _gram_kernel[(launch.block_entry.numel(),)](
                launch.table,
                launch.block_entry,
                partial,
                M=runs,
                CODES=packed(launch.codes),
                ALIGNED=launch.aligned,
                GROUP=group,
                CHUNK=chunk,
                STAGES=stages,
                ROWS=_ROWS,
                num_warps=_WARPS,
                **_REGISTERS,
                # products of fp32 task vectors are exact in fp64: fusing them changes no bit
                enable_fp_fusion=True,
            )
        if count:
            _sum_kernel[(count, runs, runs)](
                partial, bounds, gram, runs, BLOCK=_SUM_BLOCK, enable_fp_fusion=False
            )
    return gram
