"""SLERP against the recursion on whole vectors in float64, written here anew."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from warp_fast import gram, lerp, slerp, slerp_coefficients
from warp_fast._backend import able
from warp_fast._ops import SOLVE

# triton has its own file: on CPU tensors it runs in an interpreter
BACKENDS = [n for n in able("slerp", "cpu") if n != "triton"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# a matrix, fewer elements than a vector register, an odd vector, a matrix of odd rows
SHAPES = {"a.weight": (33, 16), "a.norm": (3,), "b.bias": (257,), "b.weight": (5, 129)}
GROUPS = {"a": ["a.weight", "a.norm"], "b": ["b.bias", "b.weight"]}
GRANULARITIES = {"tensor": None, "block": GROUPS, "model": [list(SHAPES)]}

Weights = dict[str, Tensor]


def family(
    runs: int, init_dtype: torch.dtype = FP64, dtype: torch.dtype = FP64, offset: float = 0.0
) -> tuple[Weights, list[Weights]]:
    """theta_init, and policies with task vectors of several lengths that share a part."""
    torch.manual_seed(0)
    init = {n: torch.randn(s, dtype=FP64) * 0.05 for n, s in SHAPES.items()}
    shared = {n: torch.randn(s, dtype=FP64) for n, s in SHAPES.items()}
    policies = [
        {
            n: init[n] + (0.01 + 0.002 * m) * (0.5 * shared[n] + torch.randn(s, dtype=FP64))
            for n, s in SHAPES.items()
        }
        for m in range(runs)
    ]
    moved = [{n: (x + offset).to(dtype) for n, x in policy.items()} for policy in policies]
    return {n: (x + offset).to(init_dtype) for n, x in init.items()}, moved


def recursion(deltas: list[Tensor]) -> Tensor:
    """v_1 = d_1; v_m = slerp(v_{m-1}, d_m, 1/m), on vectors."""
    merged = deltas[0]
    for m, delta in enumerate(deltas[1:], start=2):
        omega = math.acos(float(merged @ delta / (merged.norm() * delta.norm())))
        kept, added = ((1 - 1 / m) * omega, omega / m)
        merged = (math.sin(kept) * merged + math.sin(added) * delta) / math.sin(omega)
    return merged


def oracle(init: Weights, policies: list[Weights], segments: Any, eta: float = 1.0) -> Weights:
    groups = [[n] for n in SHAPES] if segments is None else segments
    result: Weights = {}
    for names in groups.values() if isinstance(groups, dict) else groups:
        deltas = [
            torch.cat([(p[n].double() - init[n].double()).flatten() for n in names])
            for p in policies
        ]
        parts = torch.split(recursion(deltas), [init[n].numel() for n in names])
        for n, part in zip(names, parts, strict=True):
            result[n] = init[n].double() + eta * part.view(init[n].shape)
    return result


def distance(found: Weights, gold: Weights, init: Weights) -> float:
    """Largest error of a tensor, in units of its merged task vector."""
    return max(
        float((found[n].double() - gold[n]).norm() / (gold[n] - init[n].double()).norm())
        for n in gold
    )


# --- values --------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("runs", [*range(1, 11), 16, 17])
def test_equals_the_recursion_on_vectors(backend: str, granularity: str, runs: int) -> None:
    init, policies = family(runs)
    segments = GRANULARITIES[granularity]
    merged = slerp(init, policies, segments=segments, backend=backend)
    assert distance(merged, oracle(init, policies, segments), init) < 1e-12


@every_backend
@pytest.mark.parametrize("eta", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(
    ("init_dtype", "dtype"),
    [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16), (BF16, FP32), (BF16, FP64)],
    ids=["fp32", "bf16", "fp16", "fp32-bf16", "bf16-fp32", "bf16-fp64"],
)
def test_rounds_once_to_the_dtype_of_init(
    backend: str, init_dtype: torch.dtype, dtype: torch.dtype, eta: float
) -> None:
    init, policies = family(3, init_dtype, dtype)
    merged = slerp(init, policies, eta=eta, backend=backend)
    for n, gold in oracle(init, policies, None, eta).items():
        assert merged[n].dtype == init_dtype
        # fp32 arithmetic: three differences, products and sums of terms below `size`
        size = init[n].double().abs() + eta * sum(
            (p[n].double() - init[n].double()).abs() for p in policies
        )
        allowed = gold.abs() * torch.finfo(init_dtype).eps / 2 + 9 * 2.0**-24 * size
        assert ((merged[n].double() - gold).abs() <= allowed).all()


@every_backend
def test_two_policies_have_the_closed_form(backend: str) -> None:
    init, (one, two) = family(2)
    merged = slerp(init, [one, two], backend=backend)
    for n in init:
        a, b = one[n] - init[n], two[n] - init[n]
        cosine = float((a * b).sum() / (a.norm() * b.norm()))
        # at one half sin(omega / 2) / sin(omega) = 1 / (2 cos(omega / 2))
        expected = init[n] + (a + b) / (2 * math.cos(math.acos(cosine) / 2))
        torch.testing.assert_close(merged[n], expected, rtol=1e-13, atol=1e-15)


@every_backend
def test_order_matters_from_three_policies_on(backend: str) -> None:
    init, (a, b, c) = family(3)

    def merged(*policies: Weights) -> Tensor:
        result: Tensor = slerp(init, policies, backend=backend)["a.weight"]
        return result

    torch.testing.assert_close(merged(a, b), merged(b, a), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(merged(a, b, c), merged(b, a, c), rtol=1e-13, atol=1e-15)
    assert (merged(a, b, c) - merged(c, b, a)).abs().max() > 1e-4


@every_backend
@pytest.mark.parametrize("runs", [1, 2, 5])
def test_lerp_is_the_mean(backend: str, runs: int) -> None:
    init, policies = family(runs)
    for eta in (1.0, 0.3):
        merged = lerp(init, policies, eta=eta, backend=backend)
        for n in init:
            mean = sum(policy[n] for policy in policies) / runs
            expected = init[n] + eta * (mean - init[n])
            torch.testing.assert_close(merged[n], expected, rtol=1e-13, atol=1e-15)


# --- errors of other implementations -------------------------------------------------------------


def test_each_segment_has_its_own_angle() -> None:
    init, policies = family(2)
    merged = {name: slerp(init, policies, segments=s) for name, s in GRANULARITIES.items()}
    for one, other in (("tensor", "block"), ("block", "model"), ("tensor", "model")):
        assert distance(merged[one], merged[other], init) > 1e-3


def test_angle_is_that_of_the_flattened_tensor_not_of_its_rows() -> None:
    delta = torch.randn(2, 6, 8, dtype=FP64)
    whole = slerp(torch.zeros(6, 8, dtype=FP64), list(delta))
    flat = slerp(torch.zeros(48, dtype=FP64), list(delta.view(2, 48)))
    assert torch.equal(whole.flatten(), flat)


@every_backend
@pytest.mark.parametrize("function", [slerp, lerp])
def test_only_task_vectors_are_merged_not_weights(backend: str, function: Any) -> None:
    """Neither the angle nor the coefficients see a large theta_init."""
    near, far = (family(3, offset=offset) for offset in (0.0, 100.0))
    for n in SHAPES:
        moved = [function(*given, backend=backend)[n] - given[0][n] for given in (near, far)]
        torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-12)


def test_angle_is_normalised_by_the_lengths() -> None:
    products = gram(*family(4))
    torch.testing.assert_close(slerp_coefficients(products * 1e6), slerp_coefficients(products))


@every_backend
def test_init_is_kept_so_that_the_step_back_to_it_works(backend: str) -> None:
    init, policies = family(2)
    before = {n: x.clone() for n, x in init.items()}
    given = [{n: x.clone() for n, x in policy.items()} for policy in policies]
    merged, half = (slerp(init, policies, eta=eta, backend=backend) for eta in (1.0, 0.5))
    for n in init:
        assert torch.equal(init[n], before[n])
        assert all(torch.equal(p[n], q[n]) for p, q in zip(policies, given, strict=True))
        torch.testing.assert_close(half[n], (before[n] + merged[n]) / 2, rtol=1e-13, atol=1e-16)


# rates 1/2, 1/3 .. 1/M at 90 degrees: the last vector gets sin(pi / 2M)
ORTHOGONAL = {
    2: [0.7071, 0.7071],
    3: [0.6124, 0.6124, 0.5000],
    4: [0.5658, 0.5658, 0.4619, 0.3827],
    5: [0.5381, 0.5381, 0.4393, 0.3640, 0.3090],
}


@every_backend
@pytest.mark.parametrize("runs", ORTHOGONAL)
def test_rates_are_one_over_m_level_by_level(backend: str, runs: int) -> None:
    merged = slerp(torch.zeros(9), list(torch.eye(9)[:runs]), backend=backend)
    expected = torch.tensor(ORTHOGONAL[runs] + [0.0] * (9 - runs))
    torch.testing.assert_close(merged, expected, rtol=0, atol=5e-5)
    assert merged.norm() == pytest.approx(1.0, abs=1e-6)


# --- eta -----------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("function", [slerp, lerp])
def test_many_etas_equal_single_calls(backend: str, dtype: torch.dtype, function: Any) -> None:
    init, policies = family(3, dtype, dtype)
    etas = [0.0, 0.3, 1.0, 2.0, -0.5, 0.1, 0.2, 0.4, 0.6, 0.8]
    for eta, merged in zip(etas, function(init, policies, eta=etas, backend=backend), strict=True):
        single = function(init, policies, eta=eta, backend=backend)
        assert all(torch.equal(merged[n], single[n]) for n in init)
        assert eta or all(torch.equal(merged[n], init[n]) for n in init)


@pytest.mark.parametrize("function", [slerp, lerp])
def test_etas_may_be_a_vector(function: Any) -> None:
    init, one, two = torch.randn(3, 8)
    expected = function(init, [one, two], eta=[0.0, 0.5, 1.0])
    for etas in (torch.linspace(0, 1, 3), torch.linspace(0, 1, 3).numpy()):
        found = function(init, [one, two], eta=etas)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_backend
def test_one_policy_is_reached_at_eta_one(backend: str) -> None:
    init, (policy,) = family(1, BF16, BF16)
    merged = slerp(init, [policy], backend=backend)
    assert all(torch.equal(merged[n], policy[n]) for n in init)


# --- report, gram --------------------------------------------------------------------------------


@every_backend
def test_report_says_what_was_merged(backend: str) -> None:
    init, policies = family(3)
    merged, report = slerp(init, policies, segments=GROUPS, return_report=True, backend=backend)
    assert report.segments == ["a", "b"]
    assert torch.equal(report.gram, gram(init, policies, segments=GROUPS, backend=backend))
    assert torch.equal(report.coefficients, SOLVE[backend](report.gram)[0])
    best = slerp_coefficients(report.gram)
    torch.testing.assert_close(report.coefficients, best, rtol=1e-12, atol=0)
    for s, names in enumerate(GROUPS.values()):
        deltas = torch.stack(
            [torch.cat([(w[n] - init[n]).flatten() for n in names]) for w in (*policies, merged)]
        )
        lengths = deltas.norm(dim=1)
        torch.testing.assert_close(report.norms[s], lengths[:3])
        torch.testing.assert_close(report.merged_norms[s], lengths[3])
        cosines = deltas[:3] @ deltas[:3].T / lengths[:3, None] / lengths[:3]
        torch.testing.assert_close(report.angles[s].cos(), cosines)


@every_backend
@pytest.mark.parametrize("dtype", [BF16, FP64], ids=["bf16", "fp64"])
@pytest.mark.parametrize("runs", [*range(1, 10), 16, 17])
def test_gram_is_the_matrix_of_inner_products(backend: str, dtype: torch.dtype, runs: int) -> None:
    init, policies = family(runs, dtype, dtype)
    found = gram(init, policies, backend=backend)
    assert found.dtype == FP64 and torch.equal(found, found.transpose(1, 2))
    for s, n in enumerate(init):
        delta = torch.stack([(p[n].double() - init[n].double()).flatten() for p in policies])
        expected = delta @ delta.T
        bound = delta.norm(dim=1)[:, None] * delta.norm(dim=1)
        assert ((found[s] - expected).abs() <= 1e-14 * bound).all()


@every_backend
@pytest.mark.parametrize("runs", range(1, 8))
def test_gram_of_a_task_vector_that_is_infinite(backend: str, runs: int) -> None:
    init, policies = torch.zeros(40), [torch.ones(40) for _ in range(runs)]
    policies[0][3] = math.inf
    found = gram(init, policies, backend=backend)[0]
    assert (found[0] == math.inf).all() and (found[1:, 1:] == 40).all()


@every_backend
def test_gram_of_a_union_is_a_sum(backend: str) -> None:
    init, policies = family(3)
    parts = gram(init, policies, backend=backend)
    blocks = gram(init, policies, segments=GROUPS, backend=backend)
    torch.testing.assert_close(blocks[0], parts[0] + parts[1], rtol=1e-13, atol=0)
    torch.testing.assert_close(blocks[1], parts[2] + parts[3], rtol=1e-13, atol=0)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@every_backend
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_same_bits_for_any_number_of_threads(backend: str, dtype: torch.dtype) -> None:
    init = torch.randn(300_001).to(dtype)
    policies = [(init + 0.01 * torch.randn(300_001)).to(dtype) for _ in range(3)]
    results = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        merged = slerp(init, policies, backend=backend)
        results.append((merged, gram(init, policies, backend=backend)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- tied weights --------------------------------------------------------------------------------


def tied_family() -> tuple[Weights, list[Weights]]:
    """A head that is the embedding, as in the state dict of a tied model."""
    init, policies = family(3, FP32, FP32)
    for weights in (init, *policies):
        weights["head"] = weights["a.weight"].detach()
    return init, policies


@every_backend
@pytest.mark.parametrize("merge", [slerp, lerp])
def test_tied_tensors_count_once_and_stay_tied(merge: Any, backend: str) -> None:
    init, policies = tied_family()
    groups = {"all": list(init)}
    merged, report = merge(init, policies, segments=groups, return_report=True, backend=backend)
    assert list(merged) == list(init) and merged["head"] is merged["a.weight"]
    for weights in (init, *policies):
        del weights["head"]
    expected, alone = merge(
        init, policies, segments=[list(init)], return_report=True, backend=backend
    )
    assert torch.equal(report.gram, alone.gram)
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor)


def test_tied_tensors_are_written_under_every_name() -> None:
    init, policies = tied_family()
    expected = slerp(init, policies)
    values: Any = dict(enumerate(policies)).values()  # any collection will do
    assert slerp(init, values, return_report=True)[1].segments == list(SHAPES)
    apart = {name: torch.zeros_like(tensor) for name, tensor in init.items()}
    assert slerp(init, policies, out=apart) is apart
    assert torch.equal(apart["head"], expected["head"]) and apart["head"] is not apart["a.weight"]
    wrong = {**apart, "head": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"out 0, head: must be \(33, 16\)"):
        slerp(init, policies, out=wrong)
    assert slerp(init, policies, out=init) is init  # tied, it overlaps nothing but itself
    assert torch.equal(init["head"], expected["head"])


def test_tensors_that_one_policy_has_apart_are_merged_apart() -> None:
    init, policies = tied_family()
    policies[1]["head"] = policies[1]["head"] + 1
    merged, report = slerp(init, policies, return_report=True)
    assert report.segments == list(init) and not torch.equal(merged["head"], merged["a.weight"])
