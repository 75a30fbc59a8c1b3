"""The solve of SLERP in C++ and Triton: coefficients of Gram matrices against the reference.

Triton on CUDA tensors where there is a GPU, else on CPU tensors under its interpreter.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from warp_fast._backend import MISSING
from warp_fast.native.slerp import slerp_coefficients_cpp
from warp_fast.reference.slerp import slerp_coefficients_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it once, at the import below
Solve = Callable[[Tensor], tuple[Tensor, Tensor]]
FP64 = torch.float64
SOLVES: dict[str, Solve] = {"reference": slerp_coefficients_reference}
if MISSING["cpp"] is None:
    SOLVES["cpp"] = slerp_coefficients_cpp
if MISSING["triton"] is None:
    triton_pass = importlib.import_module("warp_fast.kernels.coefficients")
    SOLVES["triton"] = lambda gram: triton_pass.slerp_coefficients_triton(gram.to(DEVICE))

every_solve = pytest.mark.parametrize("solve", SOLVES.values(), ids=SOLVES)


def grams(segments: int, runs: int) -> Tensor:
    """Of random task vectors; the second to fifth segment have a pair that is nearly no plane."""
    generator = torch.Generator().manual_seed(runs)
    deltas = torch.randn(segments, runs, 40, dtype=FP64, generator=generator)
    deltas *= torch.rand(segments, runs, 1, dtype=FP64, generator=generator)
    if runs > 1 and segments > 4:
        deltas[1, -1] = 0
        deltas[2, 1] = 2 * deltas[2, 0]
        deltas[3, 1] = -deltas[3, 0]
        deltas[4, 1] = deltas[4, 0] + 1e-5 * deltas[4, 1]
    products = deltas @ deltas.mT
    return (products + products.mT) / 2


def as_the_reference(solve: Solve, products: Tensor) -> None:
    found, linear = (x.cpu() for x in solve(products))
    expected, expected_linear = slerp_coefficients_reference(products)
    # beside pi the rounding of a cosine grows by 1 / sin^2, and the coefficients by 1 / sin
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-14)
    usual = expected.abs().amax(1) < 10
    torch.testing.assert_close(found[usual], expected[usual], rtol=1e-13, atol=1e-15)
    assert usual.sum() >= len(products) - 2
    assert torch.equal(linear, expected_linear)


@every_solve
@pytest.mark.parametrize("runs", [1, 2, 3, 5, 10, 16])
@pytest.mark.parametrize("segments", [0, 1, 9])
def test_many_policies(solve: Solve, runs: int, segments: int) -> None:
    as_the_reference(solve, grams(segments, runs))


@every_solve
def test_gram_of_any_strides(solve: Solve) -> None:
    products = grams(9, 3)
    as_the_reference(solve, products.flip(0).permute(1, 2, 0).contiguous().permute(2, 0, 1))
    as_the_reference(solve, products[:1].expand(4, 3, 3))


@every_solve
def test_where_tensors_are_made_elsewhere(solve: Solve) -> None:
    products = grams(9, 3)
    with torch.device("meta"):
        found = solve(products)
    for ours, expected in zip(found, solve(products), strict=True):
        assert torch.equal(ours, expected)


@every_solve
def test_numbers_that_are_no_gram_of_vectors(solve: Solve) -> None:
    """Cosines beyond 1, negative squares, sums that overflow or vanish."""
    as_the_reference(solve, torch.tensor([[[1.0, 2.0], [2.0, 1.0]]], dtype=FP64))
    as_the_reference(solve, torch.tensor([[[1.0, -2.0], [-2.0, 1.0]]], dtype=FP64))
    as_the_reference(solve, torch.tensor([[[1.0, 0.5], [0.5, -1e-30]]], dtype=FP64))
    as_the_reference(solve, torch.full((1, 3, 3), 1e308, dtype=FP64))
    as_the_reference(solve, torch.full((1, 3, 3), 1e-320, dtype=FP64))


@every_solve
@pytest.mark.parametrize("cosine", [1.0, -1.0, 1 - 1e-9, 1e-9 - 1, 0.0, 0.5, -0.999])
def test_every_angle(solve: Solve, cosine: float) -> None:
    found, linear = solve(torch.tensor([[[1.0, cosine], [cosine, 1.0]]], dtype=FP64))
    degenerate = abs(cosine) == 1
    angle = math.acos(cosine)
    gold = 0.5 if degenerate else math.sin(angle / 2) / math.sin(angle)
    assert found[0].tolist() == pytest.approx([gold, gold], rel=1e-7 if cosine < -0.9999 else 1e-14)
    assert linear.tolist() == [degenerate]


@every_solve
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_gram_that_is_not_finite_makes_every_coefficient_nan(
    solve: Solve, value: float
) -> None:
    products = grams(300, 2)
    products[299, 1, 1] = value
    assert solve(products)[0].isnan().all()
