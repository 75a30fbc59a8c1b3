"""The apply pass of SLERP in Triton: any number of merged models in one launch over all tensors.

One launch per combination of dtypes and alignment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from warp_fast._table import (
    Launch,
    TableCache,
    apply_launches,
    by_column,
    chosen,
    copied_back,
    on_device,
    packed,
)
from warp_fast.kernels._common import HEAD, deltas_of, entry_size, pointers, rounded, typed_pointer

# 8 elements per thread: one 16-byte load of each bf16 tensor, and 16 task vectors fit in registers
_BLOCK = 2048
_WARPS = 8

_tables = TableCache()


@triton.jit(do_not_specialize=["stride", "rows", "segments", "blocks"])
def _apply_kernel(
    table,  # [entries, stride] int64: size, first block, segment; init, policies, outs
    block_entry,  # [blocks] int32, entry of each block
    coefficients,  # [K, S, M] fp64
    stride,
    rows,  # K
    segments,  # S
    blocks,
    M: tl.constexpr,
    CODES: tl.constexpr,
    OUT_CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out_k = init + sum_m coefficients[k, s, m] * (policy_m - init), one block per program.

    Traffic: reads init and M policies, writes K outputs. The blocks run backward: what the Gram
    pass read last is still in L2. Rows of NaN, which is how a solve refuses, write nothing.
    """
    pid = blocks - 1 - tl.program_id(0).to(tl.int64)
    entry = table + tl.load(block_entry + pid).to(tl.int64) * stride
    size = entry_size(entry, ALIGNED)
    offs = (pid - tl.load(entry + 1)) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    init_ptr = pointers(entry, 0, 1, CODES, ALIGNED)[0]
    policy_ptrs = pointers(entry, 1, M, CODES, ALIGNED)
    init = tl.load(init_ptr + offs, mask=mask, other=0.0, eviction_policy="evict_first")
    deltas = deltas_of(init, policy_ptrs, offs, mask, M, "evict_first")

    weights = coefficients + tl.load(entry + 2) * M
    for k in range(rows):
        first = tl.load(weights)
        if first == first:
            merged = init.to(deltas[0].dtype)
            for m in tl.static_range(M):
                merged = merged + tl.load(weights + m).to(deltas[m].dtype) * deltas[m]
            out = typed_pointer(tl.load(entry + HEAD + 1 + M + k), OUT_CODE, ALIGNED)
            tl.store(out + offs, rounded(merged, OUT_CODE), mask=mask, cache_modifier=".cs")
        weights += segments * M


def slerp_apply_triton_(
    out: list[Tensor],
    init: list[Tensor],
    policies: list[Tensor],
    coefficients: Tensor,
    segment: list[int],
) -> None:
    """out_k = init + sum_m coefficients[k, s, m] * (policy_m - init), for all rows k.

    Shapes: as `slerp_apply_reference_`. Computed in fp32 (fp64 where any input is), rounded once.
    Rows whose outputs differ in dtype take a pass each.
    """
    written = [x.contiguous() for x in out]
    read = by_column([*init, *policies], len(init))
    results = by_column(written, len(init))
    with on_device(init[0]):
        passes = apply_launches(_tables, read, results, _BLOCK, segment)
        weights = coefficients.to(init[0].device, torch.float64)
        for rows, launches in passes:
            _apply(launches, chosen(weights, rows), len(read))
    copied_back(out, written)


def _apply(launches: list[Launch], weights: Tensor, inputs: int) -> None:
    for launch in launches:
        _apply_kernel[(launch.block_entry.numel(),)](
            launch.table,
            launch.block_entry,
            weights,
            launch.table.shape[1],
            weights.shape[0],
            weights.shape[1],
            launch.block_entry.numel(),
            M=inputs - 1,
            CODES=packed(launch.codes[:inputs]),
            OUT_CODE=launch.codes[inputs],
            ALIGNED=launch.aligned,
            BLOCK=_BLOCK,
            num_warps=2 * _WARPS if launch.heavy else _WARPS,
            # rounded where the reference rounds
            enable_fp_fusion=False,
        )
