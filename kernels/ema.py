"""The EMA update in Triton: a whole list of tensors in one launch per combination of dtypes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from warp_fast._table import (
    FULL,
    SPLIT,
    STOCHASTIC,
    TableCache,
    copied_back,
    ema_launches,
    on_device,
)
from warp_fast.kernels._common import FP32, FP64, HEAD, INT16, entry_size, typed_pointer
from warp_fast.reference.ema import random_key

# 16 elements per thread: split storage has six 16-byte loads in flight in each
_BLOCK = 4096
_WARPS = 8

_FULL, _SPLIT, _STOCHASTIC = map(tl.constexpr, (FULL, SPLIT, STOCHASTIC))

_tables = TableCache()


@triton.jit
def random_bits16(index, key_in, key_out):
    """16 uniform bits, as uint32, for each int64 index; `random_bits16` of the reference."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    word = (low ^ key_in) + high * 0x9E3779B9
    word = (word ^ (word >> 16)) * 0x21F0AAAD
    word = (word ^ (word >> 15)) * 0x735A2D97
    word = word ^ (word >> 15)
    return (word ^ key_out) >> 16


@triton.jit
def round_stochastic(value, random):
    """fp32 -> bits of bf16 (int16), up or down by 16 random bits; inf and NaN are kept."""
    bits = value.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = tl.where(finite, bits + random, bits)
    # a NaN whose payload is in the low half must not become inf
    rounded = tl.where(value != value, 0x7FC00000, rounded)
    return (rounded >> 16).to(tl.int16)


@triton.jit(do_not_specialize=["key_in", "key_out"])
def _ema_kernel(
    table,  # [entries, HEAD + 2 or 3] int64: size, first block, first index; ema, params, residual
    block_entry,  # [blocks] int32, entry of each program
    rate,  # fp32 number, or with DEVICE_RATE a pointer to one number of any float dtype
    key_in,  # int32, keys of the random bits
    key_out,
    STORAGE: tl.constexpr,
    EMA_CODE: tl.constexpr,
    PARAM_CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    DEVICE_RATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ema <- ema + rate * (params - ema), one block of one entry per program.

    Traffic: per element reads and writes ema (4, or 2 + 2 split, or 2 bytes), reads params.
    """
    pid = tl.program_id(0).to(tl.int64)
    STRIDE: tl.constexpr = HEAD + 3 if STORAGE == _SPLIT else HEAD + 2
    entry = table + tl.load(block_entry + pid).to(tl.int64) * STRIDE
    size = entry_size(entry, ALIGNED)
    offs = (pid - tl.load(entry + 1)) * BLOCK + tl.arange(0, BLOCK)
    if ALIGNED and (STORAGE == _FULL or PARAM_CODE == FP32):
        # one layout for all: where fp32 comes in 4 at a time and bf16 in 8, they would meet in
        # shared memory, the loads one after the other
        offs = tl.max_contiguous(tl.multiple_of(offs, 4), 4)
    mask = offs < size
    # bf16 averages are read and written as their bits
    BITS: tl.constexpr = EMA_CODE if STORAGE == _FULL else INT16
    ema_ptrs = typed_pointer(tl.load(entry + HEAD), BITS, ALIGNED) + offs
    param_ptrs = typed_pointer(tl.load(entry + HEAD + 1), PARAM_CODE, ALIGNED) + offs

    average = tl.load(ema_ptrs, mask=mask, eviction_policy="evict_first")
    end = tl.load(param_ptrs, mask=mask, eviction_policy="evict_first")
    if STORAGE == _SPLIT:
        residual_ptrs = typed_pointer(tl.load(entry + HEAD + 2), INT16, ALIGNED) + offs
        low = tl.load(residual_ptrs, mask=mask, eviction_policy="evict_first")
        start = ((average.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)
    elif STORAGE == _STOCHASTIC:
        start = (average.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        start = average

    weight = tl.cast(tl.load(rate) if DEVICE_RATE else rate, start.dtype)
    end = end.to(start.dtype)
    # as the reference: from the nearer end, and at rate 1 params even where the step is infinite
    early = weight < 0.5
    step = (end - start) * tl.where(early, weight, weight - 1.0)
    moved = tl.where(weight < 1.0, tl.where(early, start, end) + step, end)

    if STORAGE == _SPLIT:
        # the NaN of NVIDIA arithmetic, 0x7FFFFFFF, would be rounded to a high half of -0.0
        bits = tl.where(moved != moved, 0x7FC00000, moved.to(tl.int32, bitcast=True))
        high = ((bits + 0x8000) >> 16).to(tl.int16)
        tl.store(ema_ptrs, high, mask=mask, cache_modifier=".cs")
        tl.store(residual_ptrs, bits.to(tl.int16), mask=mask, cache_modifier=".cs")
    elif STORAGE == _STOCHASTIC:
        index = tl.load(entry + 2) + offs
        random = random_bits16(
            index, key_in.to(tl.uint32, bitcast=True), key_out.to(tl.uint32, bitcast=True)
        )
        tl.store(ema_ptrs, round_stochastic(moved, random), mask=mask, cache_modifier=".cs")
    else:
        tl.store(ema_ptrs, moved, mask=mask, cache_modifier=".cs")


def _signed(word: int) -> int:
    """The int32 with the bits of a uint32: one argument type for every key."""
    return word - (1 << 32) if word >= 1 << 31 else word


def ema_update_triton_(
    ema: list[Tensor],
    params: list[Tensor],
    residual: list[Tensor],
    rate: float,
    device_rate: Tensor | None,
    stochastic: bool,
    seed: int,
    step: int,
    first_index: list[int],
) -> None:
    """ema <- ema + rate * (params - ema), in place; see `warp_fast.ema_update_`.

    One launch per combination of dtypes and alignment. Strided tensors go through a copy. Inside a
    CUDA graph the rate may be a device tensor; seed and step are those of the capture.
    """
    written = [x.contiguous() for x in [*ema, *residual]]
    averages, remainders = written[: len(ema)], written[len(ema) :]
    columns = [averages, [x.contiguous() for x in params]] + ([remainders] if residual else [])
    key_in, key_out = map(_signed, random_key(seed, step))
    with on_device(ema[0]):
        for launch in ema_launches(_tables, columns, _BLOCK, first_index):
            weight = device_rate
            if weight is None and launch.codes[0] == FP64.value:
                # a number becomes an fp32 argument: too coarse for an fp64 average
                weight = torch.full((), rate, dtype=torch.float64, device=ema[0].device)
            _ema_kernel[(launch.block_entry.numel(),)](
                launch.table,
                launch.block_entry,
                rate if weight is None else weight,
                key_in,
                key_out,
                STORAGE=_SPLIT if residual else _STOCHASTIC if stochastic else _FULL,
                EMA_CODE=launch.codes[0],
                PARAM_CODE=launch.codes[1],
                ALIGNED=launch.aligned,
                DEVICE_RATE=weight is not None,
                BLOCK=_BLOCK,
                num_warps=_WARPS,
                # a fused multiply-add would round once where the reference rounds twice
                enable_fp_fusion=False,
            )
    copied_back([*ema, *residual], written)
