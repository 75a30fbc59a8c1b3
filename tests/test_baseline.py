"""The C++ kernels as a processor without AVX2 runs them: the same bits, or as exact."""

from __future__ import annotations

import platform
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

import warp_fast
from tests.compiled import HAS_COMPILER, OPS, ROOT, compiled, folder_of
from tests.tolerances import assert_same_bits

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
SIZES = (3, 15, 16, 300, 40_000)  # below and above a vector and a chunk

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not HAS_COMPILER,
    reason="needs x86, where AVX2 is a choice, and a C++ compiler",
)


@pytest.fixture(scope="module")
def baseline() -> ModuleType:
    """warp_fast._C without its AVX2 part."""
    sources = [ROOT / "csrc" / f"{name}.cpp" for name in ("bindings", "coefficients", *OPS)]
    with folder_of("baseline") as folder:
        found = compiled(folder, sources, "-fopenmp -DWARP_FAST_ISA=baseline")
    assert found.instructions == "baseline"
    return found


@pytest.fixture(autouse=True)
def use_baseline(monkeypatch: pytest.MonkeyPatch, baseline: ModuleType) -> None:
    monkeypatch.setitem(sys.modules, "warp_fast._C", baseline)


@DTYPES
@pytest.mark.parametrize("storage", ["fp32", "split", "stochastic"])
def test_ema(storage: str, dtype: torch.dtype) -> None:
    exact = [torch.randn(size) for size in SIZES]
    params = [torch.randn(size).to(dtype) for size in SIZES]
    options: dict[str, Any] = {"stochastic": True, "seed": 3} if storage == "stochastic" else {}
    results = []
    for backend in ("reference", "cpp"):
        ema = [x.clone() if storage == "fp32" else x.to(BF16) for x in exact]
        if storage == "split":
            options["residual"] = [torch.full(x.shape, 77, dtype=torch.int16) for x in exact]
        warp_fast.ema_update_(ema, params, 0.3, **options, backend=backend)
        results.append([*ema, *options.get("residual", [])])
    assert_same_bits(*results)


@DTYPES
@pytest.mark.parametrize("runs", [2, 5])
def test_slerp(dtype: torch.dtype, runs: int) -> None:
    init = [torch.randn(size).to(dtype) for size in SIZES]
    policies = [[(x + 0.1 * torch.randn(x.shape)).to(dtype) for x in init] for _ in range(runs)]
    results = [
        warp_fast.slerp(init, policies, eta=0.7, backend=backend)
        for backend in ("reference", "cpp")
    ]
    assert_same_bits(*results)


@pytest.mark.parametrize("flush", [False, True], ids=["", "subnormals of fp32 are 0"])
def test_every_half_is_read_and_written(flush: bool) -> None:
    torch.set_flush_denormal(flush)
    try:
        every_half()
    finally:
        torch.set_flush_denormal(False)


def every_half() -> None:
    half = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(FP16)
    half = half[half.isfinite()]
    (found,) = warp_fast.slerp([torch.zeros_like(half)], [[half]], backend="cpp")
    assert torch.equal(found, half)
    wide = half.float() * (1 + 2.0**-11)  # halfway to the next, or nearly
    (found,) = warp_fast.slerp([torch.zeros_like(half)], [[wide]], backend="cpp")
    assert torch.equal(found, wide.half())


@DTYPES
def test_loss(dtype: torch.dtype) -> None:
    logits = 5 * torch.randn(2, 3, 1000)
    logits, anchor = logits.to(dtype), (logits + torch.randn(logits.shape)).to(dtype)
    ids, advantages = torch.randint(1000, (2, 3)), torch.randn(2)
    results = []
    for backend in ("reference", "cpp"):
        leaf = logits.clone().requires_grad_()
        options: dict[str, Any] = {"kl": "reverse", "softcap": 30.0, "backend": backend}
        loss = warp_fast.warp_loss(leaf, ids, advantages, anchor_logits=anchor, **options)
        torch.autograd.backward(loss.loss)
        results.append([loss.logprobs, loss.kl, leaf.grad])
    torch.testing.assert_close(*results)
