"""SLERP where it degenerates, and what it refuses before it writes."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from warp_fast import gram, lerp, slerp, slerp_coefficients
from warp_fast._backend import able

# triton has its own file: on CPU tensors it runs in an interpreter
BACKENDS = [n for n in able("slerp", "cpu") if n != "triton"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
FP64 = torch.float64

A, B = torch.tensor([3.0, 0.0, 4.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 2.0])
ZERO = torch.zeros(4)
LINEAR = "zero, parallel or antiparallel task vectors in 1 of 1 segments"


def pair(cosine: float, lengths: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """[1, 2, 2] Gram matrix of two task vectors."""
    a, b = lengths
    return torch.tensor([[[a * a, a * b * cosine], [a * b * cosine, b * b]]], dtype=FP64)


# --- the coefficients ----------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(omega=st.floats(0.01, 3.1), length=st.floats(1e-3, 1e3))
def test_equal_lengths_are_kept(omega: float, length: float) -> None:
    cosine = math.cos(omega)
    products = length**2 * torch.tensor([[[1.0, cosine], [cosine, 1.0]]], dtype=FP64)
    c = slerp_coefficients(products)[0]
    assert float(c @ products[0] @ c) ** 0.5 == pytest.approx(length, rel=1e-9)


def test_lengths_between_the_two_at_a_right_angle() -> None:
    products = pair(0.0, (1.0, 3.0))
    c = slerp_coefficients(products)[0]
    assert float(c @ products[0] @ c) == pytest.approx((1 + 9) / 2)


@pytest.mark.parametrize("sign", [1, -1], ids=["parallel", "antiparallel"])
def test_linear_rule_starts_below_a_sine_of_one_millionth(sign: int) -> None:
    below, above = (sign * math.sqrt(1 - sine**2) for sine in (0.9e-6, 1.1e-6))
    with pytest.warns(UserWarning, match=LINEAR + r" \(segment 0\)"):
        assert slerp_coefficients(pair(below)).tolist() == [[0.5, 0.5]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near = slerp_coefficients(pair(above))[0]
    # sin(omega / 2) / sin(omega): one half beside 0, and up to a million beside pi
    expected = 0.5 if sign > 0 else 1 / 1.1e-6
    assert near.tolist() == pytest.approx([expected, expected], rel=1e-3 if sign < 0 else 1e-9)


def test_only_the_degenerate_level_is_linear() -> None:
    """Three policies, the second equal to the first, the third at a right angle."""
    products = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]], dtype=FP64)
    with pytest.warns(UserWarning, match=LINEAR):
        c = slerp_coefficients(products)[0].tolist()
    assert c == pytest.approx([math.cos(math.pi / 6) / 2] * 2 + [0.5])


def test_warning_names_the_first_five_segments() -> None:
    with pytest.warns(UserWarning, match=r"in 7 of 7 segments \(segment 0, .*segment 4, \.\.\.\)"):
        slerp_coefficients(pair(1.0).expand(7, 2, 2))


def test_no_policies_degenerate_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert slerp_coefficients(torch.zeros(3, 1, 1, dtype=FP64)).tolist() == [[1.0]] * 3
        assert slerp_coefficients(torch.zeros(0, 2, 2, dtype=FP64)).shape == (0, 2)


# --- degenerate weights --------------------------------------------------------------------------

DEGENERATE: dict[str, list[Tensor]] = {
    "one is zero": [ZERO, B],
    "the other is zero": [A, ZERO],
    "all are zero": [ZERO, ZERO, ZERO],
    "identical": [A, A],
    "parallel": [A, 2 * A],
    "antiparallel": [A, -A],
    "antiparallel, other length": [A, -3 * A],
    "the first three cancel": [0.1 * A, 0.2 * A, -0.3 * A, A],
    "cancel beside another": [0.1 * A, 0.2 * A, -0.3 * A, B],
}


@every_backend
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_task_vectors_are_averaged_with_a_warning(backend: str, case: str) -> None:
    """Frozen and identical tensors are where cosines of 0 / 0 or just above 1 turn into NaN."""
    init, deltas = torch.tensor([1.0, -2.0, 0.5, 0.25]), DEGENERATE[case]
    with pytest.warns(UserWarning, match=LINEAR + r" \(frozen\); these were merged linearly"):
        merged, report = slerp(
            {"frozen": init},
            [{"frozen": init + delta} for delta in deltas],
            return_report=True,
            backend=backend,
        )
    torch.testing.assert_close(
        report.coefficients, torch.full((1, len(deltas)), 1 / len(deltas), dtype=FP64)
    )
    torch.testing.assert_close(merged["frozen"], init + sum(deltas) / len(deltas))


@every_backend
@pytest.mark.filterwarnings("error")
def test_other_segments_are_merged_as_ever_and_silently_where_all_is_well(backend: str) -> None:
    init = {"frozen": ZERO, "moved": ZERO}
    policies = [{"frozen": ZERO, "moved": delta} for delta in (A, B)]
    alone = slerp({"moved": ZERO}, [{"moved": A}, {"moved": B}], backend=backend)
    with pytest.warns(UserWarning, match=r"in 1 of 2 segments \(frozen\)"):
        merged = slerp(init, policies, backend=backend)
    assert torch.equal(merged["moved"], alone["moved"])
    assert torch.equal(merged["frozen"], ZERO)


@every_backend
@pytest.mark.parametrize("sizes", [[0, 5], [5, 0, 1], [0]])
@pytest.mark.filterwarnings("ignore:slerp. zero, parallel")
def test_empty_tensors_and_single_elements(backend: str, sizes: list[int]) -> None:
    init, one, two = ([torch.randn(n) for n in sizes] for _ in range(3))
    merged = slerp(init, [one, two], backend=backend)
    assert [x.numel() for x in merged] == sizes
    assert all(x.isfinite().all() for x in merged)


def test_angle_to_a_zero_task_vector_is_not_a_number() -> None:
    with pytest.warns(UserWarning, match=LINEAR):
        _, report = slerp(ZERO, [A, ZERO], return_report=True)
    assert report.angles[0, 0, 1].isnan() and report.angles[0, 0, 0] == 0
    assert report.norms.tolist() == [[5.0, 0.0]]


# --- refused -------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 1])
def test_nan_and_inf_are_refused_by_name_before_any_write(
    backend: str, value: float, at: int
) -> None:
    init = {"good": ZERO, "bad": ZERO}
    policies = [{"good": A, "bad": A.clone()}, {"good": B, "bad": B.clone()}]
    policies[at]["bad"][2] = value
    out = {"good": ZERO.clone(), "bad": ZERO.clone()}
    with pytest.raises(ValueError, match=rf"in bad those of policies \[{at}\] \(or init\)"):
        slerp(init, policies, out=out, backend=backend)
    assert all((x == 0).all() for x in out.values())


def test_nan_in_init_is_seen_in_every_policy() -> None:
    with pytest.raises(ValueError, match=r"in the tensor those of policies \[0, 1\] \(or init\)"):
        slerp(torch.full((4,), torch.nan), [A, B])


def test_products_that_overflow_are_refused_as_such() -> None:
    with pytest.raises(ValueError, match=r"policies \[0\] .* hold NaN, inf or numbers too large"):
        slerp(ZERO.double(), [1e200 * A.double(), B.double()])


@pytest.mark.parametrize(
    ("products", "error", "message"),
    [
        (torch.zeros(2, 2, dtype=FP64), ValueError, r"\[S, M, M\] with M >= 1; got \(2, 2\)"),
        (torch.zeros(1, 2, 3, dtype=FP64), ValueError, r"got \(1, 2, 3\)"),
        (torch.zeros(1, 0, 0, dtype=FP64), ValueError, r"got \(1, 0, 0\)"),
        (torch.zeros(1, 2, 2), TypeError, "gram must be float64; got torch.float32"),
        ([[[1.0]]], TypeError, "gram must be a tensor; got list"),
        (pair(math.nan), ValueError, "in segment 0 "),
    ],
)
def test_refused_gram(products: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        slerp_coefficients(products)


@pytest.mark.parametrize("function", [slerp, lerp])
@pytest.mark.parametrize("eta", [math.nan, math.inf, [], [0.5, -math.inf]])
def test_refused_eta(function: Any, eta: Any) -> None:
    with pytest.raises(ValueError, match="eta must be a finite number, or at least one of them"):
        function(ZERO, [A, B], eta=eta)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eta": [0.1, 0.2], "out": [ZERO.clone()]}, ValueError, r"per eta \(2\); got 1"),
        ({"out": torch.zeros(5)}, ValueError, r"out 0 must have shape \(4,\); got \(5,\)"),
        ({"out": [torch.zeros(4)]}, TypeError, "out 0 must have the form of init"),
        ({"out": torch.zeros(4, dtype=torch.int32)}, TypeError, "out 0, the tensor: must be fl"),
    ],
)
def test_refused_out(options: dict[str, Any], error: type[Exception], message: str) -> None:
    for function in (slerp, lerp):
        with pytest.raises(error, match=message):
            function(ZERO, [A, B], **options)


def test_gram_shows_what_slerp_refuses() -> None:
    products = gram(ZERO, [A, torch.full((4,), torch.inf)])
    assert products[0, 0, 0] == 25 and not products[0, 1, 1].isfinite()


@pytest.mark.parametrize("several", [False, True])
def test_what_is_between_segments_overlaps_nothing_either(several: bool) -> None:
    """It is copied from init: to no policy, and not once init was written."""
    memory = torch.arange(30.0)
    before, first, second = memory.clone(), memory[:10], memory[5:15]
    for init, policy, out in ((before[:10], second, first), (first, before[:10] + 1, second)):
        options: Any = {"eta": [1.0], "out": [out]} if several else {"out": out}
        with pytest.raises(ValueError, match="must not share memory"):
            slerp(init, [policy], segments=[(0, 3)], **options)
        assert torch.equal(memory, before)


def test_one_result_may_be_init_itself_between_segments() -> None:
    init = torch.arange(10.0)
    expected = torch.cat([init[:3] + 1, init[3:]])
    assert slerp(init, [init + 1], segments=[(0, 3)], out=init) is init
    torch.testing.assert_close(init, expected)
