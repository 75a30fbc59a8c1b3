"""The ops of warp_fast in torch.library: schema, fake and kernels of each; the table of contents.

An op id carries its backend (`warp_fast::ema_update_reference_`); the backends of one op share its
schema, its fake and its autograd formula, all written here in Python, so every op exists and traces
whether or not its compiled kernel does. Those of the losses are in _stats_ops.py and _loss_ops.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from warp_fast._backend import TRITON_DEVICE
from warp_fast._define import Kernel, define, no_result, triton
from warp_fast._overlap import refuse_overlap
from warp_fast.native import ema as native_ema
from warp_fast.native import slerp as native_slerp
from warp_fast.reference import ema as reference_ema
from warp_fast.reference import slerp as reference_slerp

# --- ema ---------------------------------------------------------------------------------------

_EMA_SCHEMA = (
    "(Tensor(a!)[] ema, Tensor[] params, Tensor(b!)[] residual, float rate, Tensor? device_rate, "
    "bool stochastic, int seed, int step, int[] first_index) -> ()"
)


def _checked_ema(kernel: Kernel) -> Kernel:
    def run(ema: list[Tensor], params: list[Tensor], residual: list[Tensor], *rest: Any) -> None:
        refuse_overlap([*ema, *residual], params, same=False)
        kernel(ema, params, residual, *rest)
        increment_version([*ema, *residual])

    return run


EMA_UPDATE = {
    "reference": define(
        "ema_update_reference_",
        _EMA_SCHEMA,
        _checked_ema(reference_ema.ema_update_reference_),
        no_result,
    ),
    "triton": define(
        "ema_update_triton_",
        _EMA_SCHEMA,
        _checked_ema(triton("ema", "ema_update_triton_")),
        no_result,
        TRITON_DEVICE,
    ),
    "cpp": define(
        "ema_update_cpp_", _EMA_SCHEMA, _checked_ema(native_ema.ema_update_cpp_), no_result, "cpu"
    ),
    "cuda": define(
        "ema_update_cuda_",
        _EMA_SCHEMA,
        _checked_ema(native_ema.ema_update_cuda_),
        no_result,
        "cuda",
    ),
}

# --- slerp -------------------------------------------------------------------------------------

_GRAM_SCHEMA = "(Tensor[] init, Tensor[] policies, int[] segment, int count) -> Tensor"
_APPLY_SCHEMA = (
    "(Tensor(a!)[] out, Tensor[] init, Tensor[] policies, Tensor coefficients, int[] segment) -> ()"
)
_SLERP_SCHEMA = (
    "(Tensor(a!)[] out, Tensor[] init, Tensor[] policies, Tensor gram, float[] etas, str[] names, "
    "int[] segment) -> Tensor"
)


def _fake_gram(
    init: list[Tensor], policies: list[Tensor], segment: list[int], count: int
) -> Tensor:
    runs = len(policies) // len(init)
    return init[0].new_empty((count, runs, runs), dtype=torch.float64)


def _checked_apply(kernel: Kernel) -> Kernel:
    def run(out: list[Tensor], init: list[Tensor], policies: list[Tensor], *rest: Any) -> None:
        refuse_overlap(out, [*init, *policies], same=len(out) == len(init))
        kernel(out, init, policies, *rest)
        increment_version(out)

    return run


def _apply(kernel: Kernel) -> Kernel:
    """The op of the apply pass alone: its coefficients are known."""

    def run(*arguments: Any) -> None:
        *lists, coefficients, segment = arguments
        kernel(*lists, lambda: coefficients, segment)

    return run


def _slerp(kernel: Kernel) -> Kernel:
    """The op that waits for a Gram pass, when all that its apply pass needs is ready to go."""

    def run(
        out: list[Tensor],
        init: list[Tensor],
        policies: list[Tensor],
        gram: Tensor,
        etas: list[float],
        names: list[str],
        segment: list[int],
    ) -> Tensor:
        solved = []

        def coefficients() -> Tensor:
            solved.append(_slerp_coefficients(gram.cpu(), names))
            return torch.tensor(etas, dtype=torch.float64, device="cpu").view(-1, 1, 1) * solved[0]

        kernel(out, init, policies, coefficients, segment)
        return solved[0]

    return run


def _slerp_coefficients(gram: Tensor, names: Sequence[str]) -> Tensor:
    """Solve on the host, refuse NaN and inf, and warn where the linear rule was taken."""
    host = gram.cpu()
    for s in (~host.isfinite()).flatten(1).any(1).nonzero().flatten().tolist():
        where = (~host[s].diagonal().isfinite()).nonzero().flatten().tolist()
        raise ValueError(
            f"task vectors must be finite, and their squares fit fp64; in {names[s]} those of "
            f"policies {where} (or init) hold NaN, inf or numbers too large for that"
        )
    coefficients, degenerate = reference_slerp.slerp_coefficients_reference(host)
    found = degenerate.any(1).nonzero().flatten().tolist()
    if found:
        shown = ", ".join(names[s] for s in found[:5]) + (", ..." if len(found) > 5 else "")
        warnings.warn(
            f"slerp: zero, parallel or antiparallel task vectors in {len(found)} of {len(names)} "
            f"segments ({shown}); these were merged linearly",
            stacklevel=2,
        )
    return coefficients.to(gram.device)


def _fake_slerp(
    out: list[Tensor], init: list[Tensor], policies: list[Tensor], gram: Tensor, *_: Any
) -> Tensor:
    return gram.new_empty(gram.shape[:2], device="cpu")


SLERP_COEFFICIENTS = define(
    "slerp_coefficients",
    "(Tensor gram, str[] names) -> Tensor",
    _slerp_coefficients,
    lambda gram, names: gram.new_empty(gram.shape[:2]),
)
GRAM = {
    "reference": define("gram_reference", _GRAM_SCHEMA, reference_slerp.gram_reference, _fake_gram),
    "triton": define(
        "gram_triton", _GRAM_SCHEMA, triton("gram", "gram_triton"), _fake_gram, TRITON_DEVICE
    ),
    "cpp": define("gram_cpp", _GRAM_SCHEMA, native_slerp.gram_cpp, _fake_gram, "cpu"),
    "cuda": define("gram_cuda", _GRAM_SCHEMA, native_slerp.gram_cuda, _fake_gram, "cuda"),
}
_APPLY_KERNELS: dict[str, tuple[Kernel, str | None]] = {
    "reference": (_checked_apply(reference_slerp.slerp_apply_reference_), None),
    "triton": (_checked_apply(triton("slerp", "slerp_apply_triton_")), TRITON_DEVICE),
    "cpp": (_checked_apply(native_slerp.slerp_apply_cpp_), "cpu"),
    "cuda": (_checked_apply(native_slerp.slerp_apply_cuda_), "cuda"),
}
SLERP_APPLY = {
    name: define(f"slerp_apply_{name}_", _APPLY_SCHEMA, _apply(kernel), no_result, device)
    for name, (kernel, device) in _APPLY_KERNELS.items()
}
SLERP = {
    name: define(f"slerp_{name}_", _SLERP_SCHEMA, _slerp(kernel), _fake_slerp, device)
    for name, (kernel, device) in _APPLY_KERNELS.items()
}
