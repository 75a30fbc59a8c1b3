"""The ops of warp_fast in torch.library: schema, fake and kernels of each; the table of contents.

An op id carries its backend (`warp_fast::ema_update_reference_`); the backends of one op share its
schema, its fake and its autograd formula, all written here in Python, so every op exists and traces
whether or not its compiled kernel does. Those of the losses are in _stats_ops.py and _loss_ops.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warp_fast._backend import resolve
from warp_fast._define import Kernel, define, define_each, no_result, triton
from warp_fast._overlap import refuse_overlap
from warp_fast._solve import solved_and_applied, solved_on_host
from warp_fast.native import ema as native_ema
from warp_fast.native import slerp as native_slerp
from warp_fast.reference import ema as reference_ema
from warp_fast.reference import slerp as reference_slerp

# --- ema ---------------------------------------------------------------------------------------

_EMA_SCHEMA = (
    "(Tensor(a!)[] ema, Tensor[] params, Tensor(b!)[] residual, float rate, Tensor? device_rate, "
    "bool stochastic, SymInt seed, SymInt step, int[] first_index) -> ()"
)


def _checked_ema(kernel: Kernel) -> Kernel:
    def run(ema: list[Tensor], params: list[Tensor], residual: list[Tensor], *rest: Any) -> None:
        refuse_overlap([*ema, *residual], params, same=False)
        kernel(ema, params, residual, *rest)

    return run


EMA_UPDATE = define_each(
    "ema_update_{}_",
    _EMA_SCHEMA,
    {
        "reference": _checked_ema(reference_ema.ema_update_reference_),
        "triton": _checked_ema(triton("ema", "ema_update_triton_")),
        "cpp": _checked_ema(native_ema.ema_update_cpp_),
        "cuda": _checked_ema(native_ema.ema_update_cuda_),
    },
    no_result,
)

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

    return run


def _fake_slerp(
    out: list[Tensor], init: list[Tensor], policies: list[Tensor], gram: Tensor, *_: Any
) -> Tensor:
    return gram.new_empty(gram.shape[:2], device="cpu")


# between the passes; merges call these as functions, under what default device there is
SOLVE: dict[str, Kernel] = {
    "reference": reference_slerp.slerp_coefficients_reference,
    "triton": triton("coefficients", "slerp_coefficients_triton"),
    "cpp": native_slerp.slerp_coefficients_cpp,
    "cuda": reference_slerp.slerp_coefficients_reference,
}
SLERP_COEFFICIENTS = define(
    "slerp_coefficients",
    "(Tensor gram, str[] names) -> Tensor",
    solved_on_host(lambda gram: SOLVE[resolve("slerp", "auto", gram.device)](gram)),
    lambda gram, names: gram.new_empty(gram.shape[:2]),
)
GRAM = define_each(
    "gram_{}",
    _GRAM_SCHEMA,
    {
        "reference": reference_slerp.gram_reference,
        "triton": triton("gram", "gram_triton"),
        "cpp": native_slerp.gram_cpp,
        "cuda": native_slerp.gram_cuda,
    },
    _fake_gram,
)
_APPLY = {
    "reference": _checked_apply(reference_slerp.slerp_apply_reference_),
    "triton": _checked_apply(triton("slerp", "slerp_apply_triton_")),
    "cpp": _checked_apply(native_slerp.slerp_apply_cpp_),
    "cuda": _checked_apply(native_slerp.slerp_apply_cuda_),
}
SLERP_APPLY = define_each("slerp_apply_{}_", _APPLY_SCHEMA, _APPLY, no_result)
SLERP = define_each(
    "slerp_{}_",
    _SLERP_SCHEMA,
    {name: solved_and_applied(SOLVE[name], apply) for name, apply in _APPLY.items()},
    _fake_slerp,
)
