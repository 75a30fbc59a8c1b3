"""How an op of warp_fast is made known to torch.library."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch._compile import _disable_dynamo

from warp_fast._backend import TRITON_DEVICE

Kernel: TypeAlias = Callable[..., Any]

_LIBRARY: Any = torch.library.Library("warp_fast", "FRAGMENT")  # type: ignore[no-untyped-call]

# backend -> the type of device that its kernels are for; None: any
DEVICE = {"reference": None, "triton": TRITON_DEVICE, "cpp": "cpu", "cuda": "cuda"}


def define(name: str, schema: str, kernel: Kernel, fake: Kernel, device: str | None = None) -> Any:
    """Register one op id and return its overload; device None serves every device."""
    qualified = f"warp_fast::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, device or "default", _untraced(kernel))
    torch.library.register_fake(qualified, fake)
    op = getattr(torch.ops.warp_fast, name).default
    _mark_written(name, op)
    return op


def _mark_written(name: str, op: Any) -> None:
    """Let autograd know which arguments an op writes, in a trace too, as it does of torch's own."""
    arguments = op._schema.arguments
    places = [i for i, x in enumerate(arguments) if x.alias_info and x.alias_info.is_write]

    def run(keys: Any, *given: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            found = op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *given)
        for i in places:
            torch.autograd.graph.increment_version(given[i])
        return found

    if places:
        _LIBRARY.impl(name, run, "ADInplaceOrView", with_keyset=True)


def define_each(
    name: str, schema: str, kernels: Mapping[str, Kernel], fake: Kernel | Mapping[str, Kernel]
) -> dict[str, Any]:
    """Register one op by backend and return the overloads by backend.

    name: has {} where the name of the backend goes.
    fake: one for all backends, or one for each.
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


def no_result(*_: object) -> None:
    """Fake of an in-place op."""
