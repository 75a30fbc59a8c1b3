"""Storages of the EMA: split holds fp32 exactly, stochastic rounding is unbiased and keyed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tolerances import bits
from warp_fast import ema_update_
from warp_fast._backend import MISSING, able
from warp_fast.native.ema import ema_update_cpp_
from warp_fast.reference import ema as reference
from warp_fast.reference.ema import join_float32, split_float32

# triton has its own file: on CPU tensors it runs in an interpreter
BACKENDS = [n for n in able("ema", "cpu") if n != "triton"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


# --- split storage -------------------------------------------------------------------------------


def halves() -> Tensor:
    """fp32 with every high half, twice, over random low halves."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32).repeat(2) << 16
    return (high | torch.randint(2**16, high.shape, dtype=torch.int32)).view(FP32)


def test_split_and_join_lose_nothing() -> None:
    value = halves()
    high, low = split_float32(value)
    number = ~value.isnan()
    assert torch.equal(bits(join_float32(high, low))[number], bits(value)[number])
    assert high[~number].isnan().all() and join_float32(high, low)[~number].isnan().all()


def test_high_half_is_the_nearest_bf16() -> None:
    value = halves()
    value = value[~value.isnan()]
    high, _ = split_float32(value)
    nearest = value.to(BF16)
    assert torch.equal(high.isinf(), nearest.isinf())
    distance, smallest = ((x.double() - value.double()).abs() for x in (high, nearest))
    assert torch.equal(distance[~high.isinf()], smallest[~high.isinf()])


@every_backend
def test_split_average_is_the_fp32_average_where_bf16_stalls(backend: str) -> None:
    """3,000 steps of 1e-6, the size of RL steps: the pair follows, bf16 arithmetic does not."""
    policy = torch.randn(2048) * 0.03
    direction = torch.randn(2048).sign() * 1e-6
    (high, low), exact, true = split_float32(policy), policy.clone(), policy.double()
    stalled, start = policy.to(BF16), policy.double()
    for _ in range(3000):
        policy += direction
        ema_update_(high, policy, 0.01, residual=low, backend=backend)
        ema_update_(exact, policy, 0.01, backend=backend)
        true += 0.01 * (policy.double() - true)
        stalled += 0.01 * (policy.to(BF16) - stalled)
    assert torch.equal(join_float32(high, low), exact)

    def captured(average: Tensor, origin: Tensor) -> float:
        moved = true - start
        return float((average.double() - origin.double()) @ moved / (moved @ moved))

    assert captured(exact, start) == pytest.approx(1.0, abs=0.01)
    assert captured(stalled, start.to(BF16)) < 0.2


# the payloads that rounding would carry into inf, -0.0 and 0.0, were they taken for numbers
NANS = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -(2**22)], dtype=torch.int32).view(
    FP32
)


@every_backend
@pytest.mark.parametrize("split", [True, False], ids=["split", "stochastic"])
def test_every_nan_becomes_the_same_nan(backend: str, split: bool) -> None:
    ema, residual = torch.zeros(40, dtype=BF16), torch.zeros(40, dtype=torch.int16)
    storage: dict[str, Any] = {"residual": residual} if split else {"stochastic": True}
    for params in (NANS.repeat(8), torch.zeros(40)):
        ema_update_(ema, params, 0.3, backend=backend, **storage)
        assert (bits(ema) == 0x7FC0).all() and (residual == 0).all()


# --- stochastic storage --------------------------------------------------------------------------


@every_backend
def test_stochastic_rounding_is_unbiased(backend: str) -> None:
    draws, params = 400, torch.randn(500)
    below = (bits(params) & -(2**16)).view(FP32)
    gap = (bits(below) + 2**16).view(FP32) - below
    chance = ((params - below) / gap).double()
    ups = torch.zeros(500, dtype=FP64)
    for seed in range(draws):
        ema = torch.zeros(500, dtype=BF16)
        ema_update_(ema, params, 1.0, stochastic=True, seed=seed, backend=backend)
        up = (ema.float() - below) / gap
        assert ((up == 0) | (up == 1)).all()
        ups += up
    deviation = (ups - draws * chance) / (draws * chance * (1 - chance)).sqrt()
    assert abs(float(deviation.sum())) < 4 * 500**0.5
    # chi-squared of 500 terms: mean 500, variance 1000
    assert abs(float(deviation.square().sum()) - 500) < 4 * 1000**0.5


@every_backend
@pytest.mark.parametrize("sizes", [[1000], [1, 0, 999], [333, 334, 333], [8] * 125])
def test_random_bits_follow_the_index_in_the_list(backend: str, sizes: list[int]) -> None:
    start, params = torch.randn(1000).to(BF16), torch.randn(1000)
    options: dict[str, Any] = {"stochastic": True, "seed": 11, "step": 5, "backend": backend}
    whole, parts = start.clone(), start.clone()
    ema_update_(whole, params, 0.3, **options)
    ema_update_(torch.split(parts, sizes), torch.split(params, sizes), 0.3, **options)
    assert torch.equal(parts, whole)


@pytest.mark.skipif(MISSING["cpp"] is not None, reason=str(MISSING["cpp"]))
def test_random_bits_where_the_index_outgrows_32_bits_inside_a_vector() -> None:
    start, params = torch.randn(9000).to(BF16), torch.randn(9000)
    found, expected = start.clone(), start.clone()
    rest = (0.3, None, True, 11, 5, [2**32 - 4003])
    ema_update_cpp_([found], [params], [], *rest)
    reference.ema_update_reference_([expected], [params], [], *rest)
    assert torch.equal(found, expected)


@every_backend
@pytest.mark.parametrize("other", [{"seed": 12}, {"step": 6}, {"seed": 5, "step": 11}])
def test_other_seeds_and_steps_draw_other_bits(backend: str, other: dict[str, int]) -> None:
    start, params = torch.zeros(1000, dtype=BF16), torch.randn(1000)
    options: dict[str, Any] = {"stochastic": True, "seed": 11, "step": 5, "backend": backend}
    results = [start.clone() for _ in range(3)]
    for ema, keys in zip(results, (options, options, {**options, **other}), strict=True):
        ema_update_(ema, params, 0.3, **keys)
    assert torch.equal(results[0], results[1])
    assert (results[0] != results[2]).sum() > 300


def test_reference_rounds_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces, params = (
        torch.zeros(1000, dtype=BF16),
        torch.zeros(1000, dtype=BF16),
        torch.randn(1000),
    )
    ema_update_(whole, params, 0.3, stochastic=True, backend="reference")
    monkeypatch.setattr(reference, "_CHUNK", 100)
    ema_update_(pieces, params, 0.3, stochastic=True, backend="reference")
    assert torch.equal(pieces, whole)
