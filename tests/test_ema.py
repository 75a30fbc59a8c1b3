"""The EMA update: values against float64, bits against the reference, forms and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tolerances import assert_same_bits
from warp_fast import EMAAnchor, ema_update_
from warp_fast._backend import able
from warp_fast.reference.ema import split_float32

# triton has its own file: on CPU tensors it runs in an interpreter
BACKENDS = [n for n in able("ema", "cpu") if n != "triton"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
PARAMS = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
# one element; around a vector of 8 and of 16; empty; odd; more than one block of any kernel
SIZES = (1, 7, 8, 17, 0, 4099)
STORAGES = pytest.mark.parametrize("storage", ["fp32", "split", "stochastic"])

Average = dict[str, Any]


def average_of(storage: str, exact: list[Tensor]) -> Average:
    """The keyword arguments of `ema_update_` that hold the fp32 values `exact` in a storage."""
    if storage == "split":
        halves = [split_float32(x) for x in exact]
        return {"ema": [h for h, _ in halves], "residual": [low for _, low in halves]}
    if storage == "stochastic":
        return {"ema": [x.to(BF16) for x in exact], "stochastic": True, "seed": 3, "step": 7}
    return {"ema": [x.clone() for x in exact]}


def copied(average: Average) -> Average:
    return {k: [x.clone() for x in v] if isinstance(v, list) else v for k, v in average.items()}


def assert_same_average(found: Average, expected: Average) -> None:
    for key in ("ema", "residual"):
        assert_same_bits(found.get(key, []), expected.get(key, []))


def normal(sizes: tuple[int, ...] = SIZES, scale: float = 0.02) -> list[Tensor]:
    return [torch.randn(size) * scale for size in sizes]


# --- values --------------------------------------------------------------------------------------


@every_backend
@PARAMS
@pytest.mark.parametrize("storage", [FP32, FP64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("rate", [0.01, 0.5, 0.7])
def test_follows_the_formula(
    backend: str, dtype: torch.dtype, storage: torch.dtype, rate: float
) -> None:
    ema = [x.to(storage) for x in normal()]
    params = [x.to(dtype) for x in normal()]
    gold = [e.double() + rate * (p.double() - e.double()) for e, p in zip(ema, params, strict=True)]
    ema_update_(ema, params, rate, backend=backend)
    for found, exact in zip(ema, gold, strict=True):
        # four roundings (rate, difference, product, sum) of numbers below 0.2 in magnitude
        assert (found.double() - exact).abs().lt(4 * 0.2 * torch.finfo(storage).eps).all()


@every_backend
def test_rate_is_the_weight_of_the_params(backend: str) -> None:
    ema = torch.zeros(3)
    ema_update_(ema, torch.ones(3), 0.01, backend=backend)
    torch.testing.assert_close(ema, torch.full((3,), 0.01))


@every_backend
@STORAGES
def test_first_update_is_not_a_copy_of_the_params(backend: str, storage: str) -> None:
    average = average_of(storage, [torch.full((64,), 1.0)])
    ema_update_(params=[torch.full((64,), 2.0)], rate=0.25, backend=backend, **average)
    assert (average["ema"][0] == 1.25).all()


def unaligned(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.new_zeros(1), tensor])[1:]


@every_backend
@STORAGES
@PARAMS
@pytest.mark.parametrize("rate", [0.0, 0.01, 0.499999, 0.5, 0.9, 1.0])
def test_every_backend_has_the_bits_of_the_reference(
    backend: str, storage: str, dtype: torch.dtype, rate: float
) -> None:
    average = average_of(storage, normal())
    for key in average.keys() & {"ema", "residual"}:
        average[key] += [unaligned(x) for x in average[key]]
    params = [x.to(dtype) for x in normal()] + [unaligned(x.to(dtype)) for x in normal()]
    expected = copied(average)
    ema_update_(params=params, rate=rate, backend=backend, **average)
    ema_update_(params=params, rate=rate, backend="reference", **expected)
    assert_same_average(average, expected)


@every_backend
@STORAGES
@pytest.mark.parametrize("rate", [0.25, 0.75])
@pytest.mark.parametrize("rate_dtype", [FP32, FP64, BF16], ids=["fp32", "fp64", "bf16"])
def test_rate_in_a_tensor_equals_the_number(
    backend: str, storage: str, rate: float, rate_dtype: torch.dtype
) -> None:
    average = average_of(storage, normal())
    other, params = copied(average), normal()
    ema_update_(params=params, rate=rate, backend=backend, **average)
    device_rate = torch.tensor(rate, dtype=rate_dtype, requires_grad=True)
    ema_update_(params=params, rate=device_rate, backend=backend, **other)
    assert_same_average(average, other)


@every_backend
@STORAGES
def test_rate_zero_keeps_and_rate_one_copies(backend: str, storage: str) -> None:
    average, params = average_of(storage, normal()), [x.to(BF16) for x in normal(scale=30.0)]
    before = copied(average)
    ema_update_(params=params, rate=0.0, backend=backend, **average)
    assert_same_average(average, before)
    ema_update_(params=params, rate=1.0, backend=backend, **average)
    assert_same_average(average, average_of(storage, [x.float() for x in params]))


finite = st.floats(-(2.0**99), 2.0**99, width=32)


@settings(max_examples=60, deadline=None)
@given(start=finite, ends=st.lists(finite, min_size=2, max_size=20), rate=st.floats(0, 1))
@pytest.mark.parametrize("backend", BACKENDS)
def test_result_lies_between(backend: str, start: float, ends: list[float], rate: float) -> None:
    params = torch.tensor(ends).sort().values
    ema = torch.full_like(params, start)
    ema_update_(ema, params, rate, backend=backend)
    assert (ema >= params.clamp(max=start)).all() and (ema <= params.clamp(min=start)).all()
    # above one half the differences are taken from params, and their rounding shows
    assert rate >= 0.5 or ema.diff().ge(0).all()


@every_backend
@STORAGES
def test_infinity_and_overflow_keep_their_sign(backend: str, storage: str) -> None:
    average = average_of(storage, [torch.zeros(40)])
    params = torch.tensor([torch.inf, -torch.inf]).repeat(20)
    ema_update_(params=[params], rate=0.3, backend=backend, **average)
    assert torch.equal(average["ema"][0].float(), params)


@every_backend
@STORAGES
def test_rate_one_makes_params_of_whatever_it_was(backend: str, storage: str) -> None:
    start = torch.tensor([0.0, torch.nan, torch.inf, -3e38, 1.0]).repeat(20)
    params = torch.tensor([torch.inf, 2.0, -torch.inf, 3.389e38, -0.0]).repeat(20)
    average = average_of(storage, [start])
    # what bf16 holds needs no rounding
    params = params.bfloat16().float()
    ema_update_(params=[params], rate=1.0, backend=backend, **average)
    assert_same_bits([average["ema"][0].float()], [params])


# --- forms ---------------------------------------------------------------------------------------


@every_backend
def test_lists_and_tensors_come_back_as_given(backend: str) -> None:
    ema, params = torch.zeros(3), torch.ones(3)
    assert ema_update_(ema, params, 0.5, backend=backend) is ema
    pair = (ema, torch.zeros(()))
    assert ema_update_(pair, (params, torch.ones(())), 0.5, backend=backend) is pair
    assert (ema == 0.75).all() and pair[1] == 0.5
    empty: list[Tensor] = []
    assert ema_update_(empty, [], 0.5, backend=backend) is empty
    ema_update_([torch.zeros(0)], [torch.zeros(0)], 0.5, backend=backend)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "columns": lambda x: x.view(12, 40)[:, ::2],
    "transposed": lambda x: x.view(12, 40).T,
    "scalar": lambda x: x[7],
}


@every_backend
@STORAGES
@pytest.mark.parametrize("form", VIEWS)
def test_strided_views_are_written_through(backend: str, storage: str, form: str) -> None:
    average, params = average_of(storage, normal((480,))), normal((480,))
    strided, dense = dict(average), dict(average)
    for key in average.keys() & {"ema", "residual"}:
        strided[key] = [VIEWS[form](x) for x in average[key]]
        dense[key] = [x.clone() for x in strided[key]]
    shaped = VIEWS[form](params[0])
    ema_update_(params=[shaped.contiguous()], rate=0.3, backend=backend, **dense)
    ema_update_(params=[shaped], rate=0.3, backend=backend, **strided)
    assert_same_average(strided, dense)


@every_backend
def test_leaf_parameters_are_updated_outside_the_graph(backend: str) -> None:
    ema, params = (torch.nn.Parameter(x) for x in (torch.zeros(3), torch.ones(3)))
    ema_update_(ema, params, 0.5, backend=backend)
    assert (ema == 0.5).all() and ema.is_leaf and params.grad is None


# --- errors --------------------------------------------------------------------------------------

Z, ZB, ZI = torch.zeros(3), torch.zeros(3, dtype=BF16), torch.zeros(3, dtype=torch.int16)
META = torch.zeros(3, device="meta")
ERRORS: list[tuple[tuple[Any, Any, Any], dict[str, Any], type[Exception], str]] = [
    ((Z, Z, 1.5), {}, ValueError, r"rate must be in \[0, 1\]; got 1.5"),
    ((Z, Z, float("nan")), {}, ValueError, "got nan"),
    ((Z, Z, "0.1"), {}, TypeError, "rate must be a number or a tensor; got str"),
    ((Z, Z, None), {}, TypeError, "rate must be a number or a tensor; got NoneType"),
    (({"a": Z}, [Z], 0.1), {}, TypeError, "ema must be a tensor or a list of tensors; got dict"),
    ((Z, Z.numpy(), 0.1), {}, TypeError, "params must be a tensor .* got ndarray of float32"),
    ((ZB, Z, 0.1), {"residual": 1}, TypeError, "residual must be a tensor .* got int"),
    ((Z, Z, 0.1), {"seed": 2**63}, ValueError, r"seed must be in \[0, 2\*\*63\); got 922"),
    ((Z, Z, 0.1), {"step": -1}, ValueError, r"step must be in \[0, 2\*\*63\); got -1"),
    ((Z, Z, 0.1), {"seed": 1.5}, TypeError, "seed must be an integer; got float"),
    ((Z, Z, torch.zeros(1)), {}, ValueError, r"0-dim tensor on cpu; got shape \(1,\)"),
    ((Z, Z, torch.tensor(1)), {}, ValueError, "a tensor rate must be a floating"),
    ((ZB, Z, 0.1), {"residual": ZI, "stochastic": True}, ValueError, "are two storages"),
    (([Z, Z], [Z], 0.1), {}, ValueError, "as many params .*got 2 ema, 1 params$"),
    (([ZB], [Z], 0.1), {"residual": []}, ValueError, "got 1 ema, 1 params, 0 residual"),
    ((Z, torch.zeros(2), 0.1), {}, ValueError, r"params\[0\] must be \(3,\) .*got \(2,\)"),
    ((ZB, Z, 0.1), {"residual": ZI[:2]}, ValueError, r"residual\[0\] must be \(3,\)"),
    ((Z, META, 0.1), {}, ValueError, r"params\[0\] must be .* on cpu .* on meta"),
    (([Z, META], [Z, Z], 0.1), {}, ValueError, r"ema\[1\] must be on cpu; got meta"),
    ((ZB, Z, 0.1), {}, TypeError, r"ema\[0\] is bfloat16: a bf16 average stalls"),
    ((Z, Z, 0.1), {"residual": ZI}, TypeError, r"ema\[0\] must be bfloat16 in this storage"),
    ((Z.half(), Z, 0.1), {}, TypeError, r"ema\[0\] must be float32 .*; got torch.float16"),
    ((ZB, Z, 0.1), {"residual": ZI.int()}, TypeError, r"residual\[0\] must be int16"),
    ((Z, Z.double(), 0.1), {}, TypeError, r"params\[0\] must be one of .*got torch.float64"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), ERRORS)
def test_refuses(
    arguments: tuple[Any, Any, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ema_update_(*arguments, **options)


def test_the_seed_of_an_anchor_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"seed must be in .* torch.initial_seed\(\) % 2"):
        EMAAnchor(torch.nn.Linear(2, 2), storage="bf16", seed=2**63)
