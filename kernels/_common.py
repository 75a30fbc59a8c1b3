# ruff: noqa: RUF005 -- inside a kernel a tuple grows by concatenation; it has no starred form
"""What the Triton kernels share: typed access through a pointer table (see warp_fast/_table.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from warp_fast._table import CODE

# dtype codes of the table
BF16, FP16, FP32, FP64, INT16 = (
    tl.constexpr(CODE[dtype])
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int16)
)
HEAD = tl.constexpr(3)  # fields of a table row before the addresses: size, first block, payload
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def typed_pointer(address, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    """int64 address -> pointer to the dtype of CODE; ALIGNED promises a multiple of 16 bytes."""
    if CODE == BF16:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    elif CODE == FP16:
        pointer = address.to(tl.pointer_type(tl.float16))
    elif CODE == FP32:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif CODE == FP64:
        pointer = address.to(tl.pointer_type(tl.float64))
    else:
        pointer = address.to(tl.pointer_type(tl.int16))
    # the compiler looks for the promise on the pointer, not on the address it was cast from
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def entry_size(entry, ALIGNED: tl.constexpr):
    """Elements of an entry; ALIGNED ones hold whole vectors, so that a mask never cuts one."""
    size = tl.load(entry)
    return tl.multiple_of(size, 8) if ALIGNED else size


@triton.jit
def pointers(
    entry, FIRST: tl.constexpr, COUNT: tl.constexpr, CODES: tl.constexpr, ALIGNED: tl.constexpr
):
    """Pointers to the columns FIRST .. FIRST + COUNT of an entry, in a tuple."""
    found = ()
    for c in tl.static_range(FIRST, FIRST + COUNT):
        found = found + (typed_pointer(tl.load(entry + HEAD + c), CODES >> 3 * c & 7, ALIGNED),)
    return found


@triton.jit
def deltas_of(init, policies, offs, mask, COUNT: tl.constexpr, EVICT: tl.constexpr):
    """policy - init for a tuple of pointers, in fp32, or in fp64 where either side is."""
    found = ()
    for m in tl.static_range(COUNT):
        end = tl.load(policies[m] + offs, mask=mask, other=0.0, eviction_policy=EVICT)
        if end.dtype == tl.float64 or init.dtype == tl.float64:
            delta = end.to(tl.float64) - init.to(tl.float64)
        else:
            delta = end.to(tl.float32) - init.to(tl.float32)
        found = found + (delta,)
    return found


@triton.jit
def rounded(value, CODE: tl.constexpr):
    """fp32 or fp64 -> the stored dtype, to nearest even; fp64 by way of fp32, as in torch."""
    if CODE == FP64:
        near = value.to(tl.float64)
    elif CODE == FP32:
        near = value.to(tl.float32)
    elif CODE == FP16:
        near = value.to(tl.float32).to(tl.float16)
    elif INTERPRETED:
        # the interpreter would truncate
        value = value.to(tl.float32)
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        near = tl.where(value != value, 0x7FC0, bits).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        near = value.to(tl.float32).to(tl.bfloat16)
    return near
