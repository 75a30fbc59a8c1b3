"""The precision of the matrix products in an op, whatever its caller allows elsewhere."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch

Precision: TypeAlias = tuple[str, str, bool]  # of fp32 products on GPU and CPU; fp16 sums
_GIVEN: Precision = ("ieee", "ieee", False)
_mkldnn: Any = torch.backends.mkldnn
# of products, and of all of a backend, which is what holds where nothing is set for products
_ON_GPU: Any = (torch.backends.cuda.matmul, torch.backends.cudnn)
_ON_CPU: Any = (_mkldnn.matmul, _mkldnn)


@contextlib.contextmanager
def as_given(device_type: str) -> Iterator[None]:
    """Products in the dtype of their operands: without autocast, TF32 or bf16 in place of fp32.

    Trainers allow those for the rest of a model. In the head they would round away the KL to a slow
    anchor, as bf16 logits do. Sums of fp16 products are in fp32, as the kernels ask for.
    """
    _flags.enter()
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        _flags.leave()


class _Flags:
    """Set by the first thread inside, restored by the last: torch has them once per process, while
    autograd runs a thread for each GPU."""

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, _GIVEN

    def enter(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.before = _allowed()
                _allow(_GIVEN)
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                _allow(self.before)


_flags = _Flags()


def _allowed() -> Precision:
    gpu, cpu = (
        "none" if products.fp32_precision == whole.fp32_precision else products.fp32_precision
        for products, whole in (_ON_GPU, _ON_CPU)
    )
    return gpu, cpu, torch.backends.cuda.matmul.allow_fp16_accumulation


def _allow(precision: Precision) -> None:
    _ON_GPU[0].fp32_precision, _ON_CPU[0].fp32_precision = precision[:2]
    torch.backends.cuda.matmul.allow_fp16_accumulation = precision[2]
