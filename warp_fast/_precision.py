"""The precision of the matrix products in an op, whatever its caller allows elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def as_given(device_type: str) -> Iterator[None]:
    """Products in the dtype of their operands: without autocast, TF32 or bf16 in place of fp32.

    Trainers allow those for the rest of a model. In the head they would round away the KL to a slow
    anchor, as bf16 logits do.
    """
    mkldnn: Any = torch.backends.mkldnn
    backends = torch.backends.cuda.matmul, mkldnn.matmul
    allowed = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, before in zip(backends, allowed, strict=True):
            backend.fp32_precision = before
