"""How the launchers hand tensors to warp_fast._C: contiguous, as addresses and dtype codes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from warp_fast._table import CODE


def extension() -> Any:
    """The compiled module; `_backend.MISSING` says why where it cannot be imported."""
    return importlib.import_module("warp_fast._C")


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def codes(tensors: Sequence[Tensor]) -> list[int]:
    return [CODE[tensor.dtype] for tensor in tensors]


def sizes(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.numel() for tensor in tensors]
