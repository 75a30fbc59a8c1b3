"""How an op of warp_fast is made known to torch.library."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from warp_fast._backend import TRITON_DEVICE

Kernel: TypeAlias = Callable[..., Any]

# backend -> the type of device that its kernels are for; None: any
DEVICE = {"reference": None, "triton": TRITON_DEVICE, "cpp": "cpu", "cuda": "cuda"}


def define(name: str, schema: str, kernel: Kernel, fake: Kernel, device: str | None = None) -> Any:
    """Register one op id and return its overload; device None serves every device."""
    qualified = f"warp_fast::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, device or "default", _untraced(kernel))
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.warp_fast, name).default


def define_each(
    name: str, schema: str, kernels: Mapping[str, Kernel], fake: Kernel | Mapping[str, Kernel]
) -> dict[str, Any]:
    """Register one op by backend and return the overloads by backend.

    name: with {} where that of the backend goes.
    fake: one for all, or by backend.
    """
    fakes = fake if isinstance(fake, Mapping) else dict.fromkeys(kernels, fake)
    return {
        backend: define(name.format(backend), schema, kernel, fakes[backend], DEVICE[backend])
        for backend, kernel in kernels.items()
    }


def _untraced(kernel: Kernel) -> Kernel:
    """Keep dynamo out of a kernel; unlike register_kernel, without importing it (seconds) first."""
    untraced: Kernel = _disable_dynamo(kernel)

    def run(*arguments: Any) -> Any:
        return (untraced if "torch._dynamo" in sys.modules else kernel)(*arguments)

    return run


def triton(stem: str, launcher: str) -> Kernel:
    """The launcher in kernels/<stem>.py; the first call imports it, and Triton with it."""

    def run(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"warp_fast.kernels.{stem}"), launcher)(*arguments)

    return run


def written(kernel: Kernel) -> Kernel:
    """One that writes its first argument, so that autograd knows of it."""

    def run(first: Tensor, *rest: Any) -> Any:
        found = kernel(first, *rest)
        torch.autograd.graph.increment_version(first)
        return found

    return run


def no_result(*_: object) -> None:
    """Fake of an in-place op."""
