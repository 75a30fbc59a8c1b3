"""How far a result may lie from float64: twice as far as the plain formula, plus a floor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Floors relative to the largest number that enters. u = 2^-53 and 2^-24 is what one rounding
# costs; a log-probability is the difference of a score and of a logarithm of a sum, and 16 u hold
# their scaling (2), an exp and a log good to 2 ulp (4 u each) and the sums around them. A 16-bit
# result is one rounding of such an fp32 result: u = 2^-8 for bf16 and 2^-11 for fp16.
_RELATIVE = {
    torch.float64: 16 * 2.0**-53,
    torch.float32: 16 * 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
# half the distance of the subnormal numbers, which fp16 alone reaches here
_ABSOLUTE = {torch.float16: 2.0**-25}


def largest(values: Tensor) -> float:
    """max |x|, 0 of nothing."""
    return float(values.detach().abs().max()) if values.numel() else 0.0


def floor(dtype: torch.dtype, scale: float) -> float:
    """The error that even a perfect result in `dtype` may have; scale is the largest number."""
    return _RELATIVE[dtype] * scale + _ABSOLUTE.get(dtype, 0.0)


def assert_close(
    what: str, ours: Tensor, gold: Tensor, eager: Tensor, scale: float | None = None
) -> None:
    """|ours - gold| <= 2 |eager - gold| + floor, in the max norm; gold is float64."""
    assert gold.dtype == torch.float64
    assert ours.shape == gold.shape, f"{what}: shape {ours.shape} for {gold.shape}"
    assert ours.isfinite().all(), f"{what} is not finite"
    error, plain = largest(ours.double() - gold), largest(eager.double() - gold)
    allowed = 2 * plain + floor(ours.dtype, largest(gold) if scale is None else scale)
    assert error <= allowed, (
        f"{what}: off by {error:.3g}; allowed {allowed:.3g} (eager {plain:.3g})"
    )


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: NaN is equal to itself, and 0 not to -0."""
    views = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(views[tensor.element_size()])


def assert_same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype
        different = (bits(a) != bits(b)).flatten().nonzero()
        assert not different.numel(), (
            f"tensor {i}: {different.numel()} of {a.numel()} elements differ, first at "
            f"{int(different[0])}: {a.flatten()[different[0]]} for {b.flatten()[different[0]]}"
        )
