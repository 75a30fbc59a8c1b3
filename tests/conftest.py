"""What every test gets: one reason to skip without a GPU, a fixed seed, and poisoned outputs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import warp_fast
from tests.cuda_on_cpu import cuda_kernels as cuda_kernels

_NO_GPU = pytest.mark.skip(reason="needs a CUDA device")
_PACKAGE = Path(warp_fast.__file__).parent
_SOURCES = tuple(str(path) + "/" for path in (_PACKAGE, (_PACKAGE / "kernels").resolve()))

# dynamo must meet the functions of torch unpoisoned; it and much else of torch import triton, which
# decides then whether its own library is interpreted, as test_triton_*.py need it without a GPU
with pytest.MonkeyPatch.context() as _patch:
    if not torch.cuda.is_available():
        _patch.setenv("TRITON_INTERPRET", "1")
    importlib.import_module("torch._dynamo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(_NO_GPU)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`allocate`, but NaN wherever warp_fast asks for memory that it must then write."""

    def poisoned(*arguments: object, **options: object) -> Tensor:
        made = allocate(*arguments, **options)
        # a traced or fake tensor has no memory to fill
        if torch.compiler.is_compiling() or type(made) is not Tensor:
            return made
        if sys._getframe(1).f_code.co_filename.startswith(_SOURCES) and made.is_floating_point():
            with torch.no_grad():
                made.fill_(float("nan"))
        return made

    return poisoned


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element that warp_fast allocates and does not write turns the test red."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
