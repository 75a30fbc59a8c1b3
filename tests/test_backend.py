"""Which backend serves a call, why another cannot, and what importing warp_fast loads."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import warp_fast
from warp_fast import _backend, _ops, _stats_ops, ema_update_
from warp_fast._backend import resolve

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
SERVED = dict(_backend.SERVED)


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    """cpp is best and there, triton serves but is absent, cuda serves only CUDA tensors."""
    served = {"ema": {"cpu": ("triton", "cpp", "reference"), "cuda": ("cuda", "reference")}}
    missing = {"reference": None, "cpp": None, "triton": "no triton here", "cuda": "no nvcc here"}
    monkeypatch.setattr(_backend, "SERVED", served)
    monkeypatch.setattr(_backend, "MISSING", missing)
    monkeypatch.setattr(_backend, "_PREFERRED", "auto")


def test_auto_is_the_best_that_is_present(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("ema", "auto", CPU) == "cpp"
    assert resolve("ema", "auto", torch.device("cuda", 1)) == "reference"
    monkeypatch.setitem(_backend.MISSING, "triton", None)
    assert resolve("ema", "auto", CPU) == "triton"


def test_devices_that_no_table_lists_get_the_reference() -> None:
    assert resolve("ema", "auto", torch.device("meta")) == "reference"
    with pytest.raises(ValueError, match="on meta tensors; it has: reference"):
        resolve("ema", "cpp", torch.device("meta"))


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_a_name_is_taken(name: str) -> None:
    assert resolve("ema", name, CPU) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("numpy", "must be 'auto' or one of reference, cpp, triton, cuda; got 'numpy'"),
        ("cuda", "'cuda' does not implement 'ema' on cpu tensors; it has: triton, cpp, reference"),
        ("cuda", r"\(nor is it available: no nvcc here\)"),
        ("triton", "backend 'triton' is not available: no triton here"),
    ],
)
def test_what_cannot_serve_is_refused_with_the_reason(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve("ema", name, CPU)
    with pytest.raises(ValueError, match=message):
        ema_update_(torch.zeros(1), torch.ones(1), 0.5, backend=name)


def test_a_gpu_that_is_too_old_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_backend.SERVED, "loss", {"cuda": ("cuda", "reference")})
    with pytest.raises(ValueError, match="'cuda' is not available: no nvcc here"):
        resolve("loss", "cuda", GPU)
    monkeypatch.setitem(_backend.MISSING, "cuda", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    message = "its 'loss' needs thread-block clusters, so compute capability 9.0; this GPU has 8.9"
    with pytest.raises(ValueError, match=message):
        resolve("loss", "cuda", GPU)
    assert resolve("loss", "auto", GPU) == "reference"
    assert resolve("ema", "cuda", GPU) == "cuda"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert resolve("loss", "cuda", GPU) == resolve("loss", "auto", GPU) == "cuda"


def test_cuda_has_the_loss_of_logits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "SERVED", SERVED)
    assert "cuda" in SERVED["loss"]["cuda"] and "cuda" not in _stats_ops.LINEAR_TOKEN_STATS
    with pytest.raises(ValueError, match="'cuda' does not implement 'linear_loss' on cuda tensors"):
        resolve("linear_loss", "cuda", GPU)
    for op, ops in (
        ("loss", _stats_ops.TOKEN_STATS),
        ("linear_loss", _stats_ops.LINEAR_TOKEN_STATS),
    ):
        assert {name for served in SERVED[op].values() for name in served} == set(ops)


def test_preference_of_the_environment_replaces_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_PREFERRED", "reference")
    assert resolve("ema", "auto", CPU) == "reference"
    assert resolve("ema", "cpp", CPU) == "cpp"
    monkeypatch.setattr(_backend, "_PREFERRED", "triton")
    with pytest.raises(ValueError, match="no triton here"):
        resolve("ema", "auto", CPU)


def test_nothing_falls_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the kernel failed")

    monkeypatch.setitem(_ops.EMA_UPDATE, "cpp", broken)
    ema = torch.zeros(1)
    with pytest.raises(RuntimeError, match="the kernel failed"):
        ema_update_(ema, torch.ones(1), 0.5)
    assert ema == 0


def run_python(code: str, **environment: str) -> None:
    """In a process of its own, outside the interpreter of Triton that other test files ask for."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_environment_is_read_once_at_import() -> None:
    run_python(
        """
import os, torch
from warp_fast._backend import resolve
cpu = torch.device("cpu")
assert resolve("ema", "auto", cpu) == "reference"
os.environ["WARP_FAST_BACKEND"] = "numpy"
assert resolve("slerp", "auto", cpu) == "reference"
""",
        WARP_FAST_BACKEND="reference",
    )


def test_preferred_backend_has_no_say_where_it_does_not_serve() -> None:
    """As in a merge on the CPU, in a process whose losses shall run in Triton."""
    run_python(
        """
import torch, warp_fast
from warp_fast._backend import resolve
cpu = torch.device("cpu")
assert resolve("slerp", "auto", cpu) in ("cpp", "reference")
warp_fast.lerp(torch.zeros(3), [torch.ones(3)])
assert resolve("linear_loss", "reference", cpu) == "reference"
""",
        WARP_FAST_BACKEND="triton",
    )


def test_preferred_backend_must_be_one() -> None:
    code = """
import torch, warp_fast
from warp_fast.doctor import chosen_row
assert "got 'numpy'" in str(chosen_row("ema", "cpu")), chosen_row("ema", "cpu")
try:
    warp_fast.lerp(torch.zeros(3), [torch.ones(3)])
except ValueError as error:
    assert "got 'numpy'" in str(error)
else:
    raise AssertionError
"""
    run_python(code, WARP_FAST_BACKEND="numpy")


def test_import_loads_neither_triton_nor_transformers() -> None:
    run_python(
        """
import sys, warp_fast
heavy = {"triton", "transformers", "safetensors", "matplotlib", "warp_fast.merge", "warp_fast.rl"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    )


PUBLIC = (
    "token_logprobs linear_token_logprobs warp_loss linear_warp_loss WarpLoss ema_update_ "
    "EMAAnchor slerp lerp gram slerp_coefficients SlerpReport FlatParameters merge_checkpoints"
).split()


def test_public_names() -> None:
    assert sorted(PUBLIC) == sorted(warp_fast.__all__)
    assert all(callable(getattr(warp_fast, name)) for name in PUBLIC)
    package: Any = warp_fast
    with pytest.raises(AttributeError, match="'warp_fast' has no attribute 'absent'"):
        _ = package.absent
