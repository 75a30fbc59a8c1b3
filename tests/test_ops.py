"""The EMA and SLERP ops under torch.library and torch.compile, and their check for overlap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from warp_fast import _ops, ema_update_, gram, lerp, slerp
from warp_fast._backend import able

# triton has its own files: on CPU tensors it runs in an interpreter
EMA = [n for n in able("ema", "cpu") if n != "triton"]
SLERP = [n for n in able("slerp", "cpu") if n != "triton"]
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
SIZES = (3, 0, 17)
STORAGES = ("fp32", "split", "stochastic")


def averages(storage: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(ema, params, residual)."""
    dtype = torch.float32 if storage == "fp32" else BF16
    ema = [torch.randn(n).to(dtype) for n in SIZES]
    params = [torch.randn(n).to(BF16) for n in SIZES]
    residual = [torch.randint(-9, 9, (n,), dtype=torch.int16) for n in SIZES]
    return ema, params, residual if storage == "split" else []


def weights() -> tuple[list[Tensor], list[list[Tensor]]]:
    """theta_init and three policies of two tensors."""
    init = [torch.randn(4, 5), torch.randn(7).to(BF16)]
    policies = [[(x + torch.randn(x.shape)).to(x.dtype) for x in init] for _ in range(3)]
    return init, policies


# --- torch.library -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", EMA)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("device_rate", [None, 0.3])
def test_opcheck_of_the_update(backend: str, storage: str, device_rate: float | None) -> None:
    rate = None if device_rate is None else torch.tensor(device_rate)
    rest = (0.3, rate, storage == "stochastic", 3, 7, [0, 3, 3])
    torch.library.opcheck(_ops.EMA_UPDATE[backend], (*averages(storage), *rest))


@pytest.mark.parametrize("backend", SLERP)
def test_opcheck_of_the_two_passes(backend: str) -> None:
    init, policies = weights()
    ends = [x for policy in policies for x in policy]
    torch.library.opcheck(_ops.GRAM[backend], (init, ends, [1, 0], 2))
    rows = torch.randn(2, 2, 3, dtype=FP64)
    out = [torch.zeros_like(x) for _ in range(2) for x in init]
    torch.library.opcheck(_ops.SLERP_APPLY[backend], (out, init, ends, rows, [1, 0]))
    gram = _ops.GRAM[backend](init, ends, [1, 0], 2)
    rest = gram, [0.3, 1.0], ["a", "b"], [1, 0]
    torch.library.opcheck(_ops.SLERP[backend], (out, init, ends, *rest))


def test_opcheck_of_the_coefficients() -> None:
    delta = torch.randn(2, 3, 8, dtype=FP64)
    torch.library.opcheck(_ops.SLERP_COEFFICIENTS, (delta @ delta.mT, ["a", "b"]))


# --- torch.compile -------------------------------------------------------------------------------


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("backend", EMA)
@pytest.mark.parametrize("storage", STORAGES)
def test_compiled_update_equals_eager(backend: str, storage: str) -> None:
    ema, params, residual = averages(storage)
    rate = torch.tensor(0.3)

    def update(ema: list[Tensor], residual: list[Tensor]) -> None:
        options: dict[str, Any] = {"backend": backend, "stochastic": storage == "stochastic"}
        ema_update_(ema, params, rate, residual=residual or None, **options)
        ema_update_(ema, params, 0.6, residual=residual or None, **options)

    ours, remainders = [x.clone() for x in ema], [x.clone() for x in residual]
    compiled(update)(ours, remainders)
    update(ema, residual)
    for a, b in zip([*ours, *remainders], [*ema, *residual], strict=True):
        assert torch.equal(a, b)


def merged_forms(backend: str) -> dict[str, Callable[[list[Tensor], list[list[Tensor]]], Any]]:
    return {
        "slerp": lambda init, policies: slerp(init, policies, eta=[0.3, 1.0], backend=backend),
        "lerp": lambda init, policies: [lerp(init, policies, backend=backend)],
        "gram": lambda init, policies: [[gram(init, policies, backend=backend)]],
        "segments": lambda init, policies: [
            [
                slerp(
                    init[1],
                    [policy[1] for policy in policies],
                    segments=[(0, 3), (4, 7)],
                    backend=backend,
                )
            ]
        ],
    }


@pytest.mark.parametrize("backend", SLERP)
@pytest.mark.parametrize("form", ["slerp", "lerp", "gram", "segments"])
def test_compiled_merge_equals_eager(backend: str, form: str) -> None:
    init, policies = weights()
    merge = merged_forms(backend)[form]
    for ours, theirs in zip(compiled(merge)(init, policies), merge(init, policies), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("backend", EMA)
def test_a_trace_is_not_tied_to_a_step(backend: str) -> None:
    """It is another one at every update."""

    def update(ema: Tensor, params: Tensor, step: int) -> Tensor:
        options: dict[str, Any] = {"stochastic": True, "seed": 3, "backend": backend}
        ema_update_(ema, params, 0.3, step=step, **options)
        return ema.float()

    ema, params = torch.zeros(64, dtype=BF16), torch.randn(64)
    run = compiled(update)
    for step in range(10):
        assert torch.equal(run(ema.clone(), params, step), update(ema.clone(), params, step))


@pytest.mark.parametrize("backend", SLERP)
def test_other_etas_of_a_compiled_merge(backend: str) -> None:
    init, policies = weights()
    run = compiled(lambda eta: slerp(init, policies, eta=eta, backend=backend))
    for eta in (0.3, 0.5, 1):
        expected = slerp(init, policies, eta=eta, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(run(eta), expected, strict=True))


# --- overlap -------------------------------------------------------------------------------------

OVERLAP = "a tensor that is written must not share memory with another argument"


@pytest.mark.parametrize("backend", EMA)
@pytest.mark.parametrize(
    ("ema", "params"),
    [
        ([(0, 4)], [(0, 4)]),
        ([(0, 4)], [(3, 7)]),
        ([(0, 4), (0, 4)], [(4, 8), (8, 12)]),
        ([(0, 4), (3, 7)], [(8, 12), (8, 12)]),
        ([(4, 6), (8, 10)], [(12, 14), (9, 11)]),
    ],
    ids=["same", "shifted", "tied", "shifted averages", "other in the list"],
)
def test_update_refuses_overlap_before_any_write(
    backend: str, ema: list[tuple[int, int]], params: list[tuple[int, int]]
) -> None:
    memory = torch.arange(16.0)
    with pytest.raises(ValueError, match=OVERLAP):
        ema_update_(
            [memory[a:b] for a, b in ema], [memory[a:b] for a, b in params], 0.5, backend=backend
        )
    assert torch.equal(memory, torch.arange(16.0))


@pytest.mark.parametrize("backend", EMA)
def test_residual_may_not_lie_in_the_average(backend: str) -> None:
    memory = torch.zeros(8, dtype=BF16)
    with pytest.raises(ValueError, match=OVERLAP):
        ema_update_(memory, torch.ones(8), 0.5, residual=memory.view(torch.int16), backend=backend)


@pytest.mark.parametrize("backend", EMA)
def test_neighbours_and_shared_params_are_allowed(backend: str) -> None:
    memory, shared = torch.zeros(12), torch.ones(4)
    ema_update_([memory[:4], memory[4:8]], [shared, shared], 0.5, backend=backend)
    ema_update_(memory[:4], memory[4:8], 0.5, backend=backend)
    ema_update_([memory[:0], memory[8:]], [memory[:0], memory[:4]], 0.5, backend=backend)
    assert memory.tolist() == [0.5] * 8 + [0.25] * 4


CASES: dict[str, tuple[tuple[int, int], ...]] = {
    "out in init": ((2, 6), (0, 4), (4, 8), (8, 12)),
    "out in a policy": ((6, 10), (0, 4), (4, 8), (8, 12)),
    "out over two": ((3, 7), (0, 4), (4, 8), (8, 12)),
}


@pytest.mark.parametrize("backend", SLERP)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", [slerp, lerp])
def test_merge_refuses_overlap_before_any_write(backend: str, case: str, function: Any) -> None:
    memory = torch.randn(12)
    before = memory.clone()
    out, init, one, two = (memory[a:b] for a, b in CASES[case])
    with pytest.raises(ValueError, match=OVERLAP):
        function(init, [one, two], out=out, backend=backend)
    assert torch.equal(memory, before)


@pytest.mark.parametrize("backend", SLERP)
def test_merge_in_place_is_for_one_eta(backend: str) -> None:
    init, one, two = torch.randn(3, 8)
    before, out = init.clone(), torch.zeros(8)
    for outs in ([init, out], [out, out]):
        with pytest.raises(ValueError, match=OVERLAP):
            slerp(init, [one, two], eta=[0.5, 1.0], out=outs, backend=backend)
    assert torch.equal(init, before) and not out.any()


@pytest.mark.parametrize("case", ["a policy in init", "swapped"])
def test_merge_in_place_refuses_what_is_read_later(case: str) -> None:
    memory = torch.randn(12)
    if case == "swapped":
        init, policies = [memory[:4], memory[4:8]], [[torch.randn(4), torch.randn(4)]]
        out = init[::-1]
    else:
        init, policies = [memory[:8]], [[memory[4:12]]]
        out = init
    with pytest.raises(ValueError, match=OVERLAP):
        slerp(init, policies, out=out)


@pytest.mark.parametrize("backend", EMA)
@pytest.mark.parametrize("storage", ["fp32", "split"])
def test_autograd_learns_of_an_update(backend: str, storage: str) -> None:
    """A graph that saved the average is refused its backward pass, as after any in-place op."""
    x = torch.randn(4, requires_grad=True)
    average = torch.randn(4, dtype=FP32 if storage == "fp32" else BF16).requires_grad_()
    residual = None if storage == "fp32" else torch.zeros(4, dtype=torch.int16)
    saved = (x * average).sum()
    assert ema_update_(average, x, 0.5, residual=residual, backend=backend) is average
    assert average.is_leaf and average.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("backend", SLERP)
def test_autograd_learns_of_a_merge_in_place(backend: str) -> None:
    init, one, two = torch.randn(3, 8)
    x = torch.randn(8, requires_grad=True)
    saved = (x * init).sum()
    slerp(init, [one, two], out=init, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_a_trace_learns_of_what_is_written() -> None:
    """It would differentiate through what was there before."""
    x = torch.randn(4, requires_grad=True)

    def moved(x: Tensor, average: Tensor) -> Tensor:
        saved = (x * average).sum()
        with torch.no_grad():
            ema_update_(average, x.detach(), 0.5)
        return saved

    def merged(x: Tensor, init: Tensor) -> Tensor:
        saved = (x * init).sum()
        slerp(init, [init + 1], out=init)
        return saved

    for function in (moved, merged):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            compiled(function)(x, torch.randn(4)).backward()


@pytest.mark.parametrize("backend", EMA)
def test_tensors_of_inference_mode_are_written_in_it_alone(backend: str) -> None:
    with torch.inference_mode():
        average = torch.zeros(3)
        ema_update_(average, torch.ones(3), 1.0, backend=backend)
        assert average.sum() == 3
    for ema in ([average], [torch.ones(3), average]):
        with pytest.raises((ValueError, RuntimeError), match=r"(?i)inference"):
            ema_update_(ema, [torch.zeros(3)] * len(ema), 1.0, backend=backend)
        with pytest.raises((ValueError, RuntimeError), match=r"(?i)inference"):
            slerp(ema, [[x + 1 for x in ema]], out=ema, backend=backend)
        assert all(x.sum() == 3 for x in ema)


@pytest.mark.parametrize("backend", EMA)
def test_update_refuses_averages_that_overlap_themselves(backend: str) -> None:
    first = torch.zeros(4)
    for odd in (torch.zeros(1).expand(4), torch.zeros(10).as_strided((2, 2), (1, 1))):
        with pytest.raises(ValueError, match="each element in a place of its own"):
            ema_update_([first, odd], [torch.ones(4), torch.ones(odd.shape)], 0.5, backend=backend)
        assert not first.any()
    for even in (torch.zeros(6, 4).T, torch.zeros(4, 6)[::2, ::3], torch.zeros(2, 1, 3)[:, :0]):
        ema_update_([first, even], [torch.ones(4), torch.ones(even.shape)], 0.5, backend=backend)


@pytest.mark.parametrize("backend", SLERP)
def test_merge_refuses_outputs_that_overlap_themselves(backend: str) -> None:
    out = [torch.zeros(2), torch.zeros(1).expand(2)]
    with pytest.raises(ValueError, match="each element in a place of its own"):
        slerp([torch.zeros(2)] * 2, [[torch.ones(2)] * 2], out=out, backend=backend)
    assert not out[0].any()


@pytest.mark.parametrize("function", [slerp, lerp])
def test_merge_where_tensors_are_made_elsewhere(function: Any) -> None:
    init, one, two = torch.randn(3, 8)
    expected = function(init, [one, two], eta=[0.5, 1.0])
    with torch.device("meta"):
        found = function(init, [one, two], eta=[0.5, 1.0], return_report=True)[0]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
