"""The ops of warp_fast in torch.library: schema, fake and kernels of each; the table of contents.

An op id carries its backend (`warp_fast::ema_update_reference_`); the backends of one op share its
schema, its fake and its autograd formula, all written here in Python, so every op exists and traces
whether or not its compiled kernel does.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from warp_fast._backend import TRITON_DEVICE
from warp_fast._overlap import refuse_overlap
from warp_fast.native import ema as native_ema
from warp_fast.native import loss as native_loss
from warp_fast.native import loss_cuda as native_loss_cuda
from warp_fast.native import slerp as native_slerp
from warp_fast.reference import ema as reference_ema
from warp_fast.reference import loss as reference_loss
from warp_fast.reference import slerp as reference_slerp

Kernel = Callable[..., Any]


def _define(name: str, schema: str, kernel: Kernel, fake: Kernel, device: str | None = None) -> Any:
    """Register one op id and return its overload; device None serves every device."""
    qualified = f"warp_fast::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, device or "default", _untraced(kernel))
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.warp_fast, name).default


def _untraced(kernel: Kernel) -> Kernel:
    """Keep dynamo out of a kernel; unlike register_kernel, without importing it (seconds) first."""
    untraced: Kernel = _disable_dynamo(kernel)

    def run(*arguments: Any) -> Any:
        return (untraced if "torch._dynamo" in sys.modules else kernel)(*arguments)

    return run


def _triton(stem: str, launcher: str) -> Kernel:
    """The launcher in kernels/<stem>.py; the first call imports it, and Triton with it."""

    def run(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"warp_fast.kernels.{stem}"), launcher)(*arguments)

    return run


def _no_result(*_: object) -> None:
    """Fake of an in-place op."""


# --- ema ---------------------------------------------------------------------------------------

_EMA_SCHEMA = (
    "(Tensor(a!)[] ema, Tensor[] params, Tensor(b!)[] residual, float rate, Tensor? device_rate, "
    "bool stochastic, int seed, int step, int[] first_index) -> ()"
)


def _checked_ema(kernel: Kernel) -> Kernel:
    def run(ema: list[Tensor], params: list[Tensor], residual: list[Tensor], *rest: Any) -> None:
        refuse_overlap([*ema, *residual], params, same=False)
        kernel(ema, params, residual, *rest)

    return run


EMA_UPDATE = {
    "reference": _define(
        "ema_update_reference_",
        _EMA_SCHEMA,
        _checked_ema(reference_ema.ema_update_reference_),
        _no_result,
    ),
    "triton": _define(
        "ema_update_triton_",
        _EMA_SCHEMA,
        _checked_ema(_triton("ema", "ema_update_triton_")),
        _no_result,
        TRITON_DEVICE,
    ),
    "cpp": _define(
        "ema_update_cpp_", _EMA_SCHEMA, _checked_ema(native_ema.ema_update_cpp_), _no_result, "cpu"
    ),
    "cuda": _define(
        "ema_update_cuda_",
        _EMA_SCHEMA,
        _checked_ema(native_ema.ema_update_cuda_),
        _no_result,
        "cuda",
    ),
}

# --- slerp -------------------------------------------------------------------------------------

_GRAM_SCHEMA = "(Tensor[] init, Tensor[] policies, int[] segment, int count) -> Tensor"
_APPLY_SCHEMA = (
    "(Tensor(a!)[] out, Tensor[] init, Tensor[] policies, Tensor coefficients, int[] segment) -> ()"
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


def _slerp_coefficients(gram: Tensor, names: Sequence[str]) -> Tensor:
    """Solve on the host, refuse NaN and inf, and warn where the linear rule was taken."""
    host = gram.cpu()
    for s in (~host.isfinite()).flatten(1).any(1).nonzero().flatten().tolist():
        where = (~host[s].diagonal().isfinite()).nonzero().flatten().tolist()
        raise ValueError(
            f"task vectors must be finite; in {names[s]} those of policies {where} (or init) hold "
            "NaN or inf"
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


SLERP_COEFFICIENTS = _define(
    "slerp_coefficients",
    "(Tensor gram, str[] names) -> Tensor",
    _slerp_coefficients,
    lambda gram, names: gram.new_empty(gram.shape[:2]),
)
GRAM = {
    "reference": _define(
        "gram_reference", _GRAM_SCHEMA, reference_slerp.gram_reference, _fake_gram
    ),
    "triton": _define(
        "gram_triton", _GRAM_SCHEMA, _triton("gram", "gram_triton"), _fake_gram, TRITON_DEVICE
    ),
    "cpp": _define("gram_cpp", _GRAM_SCHEMA, native_slerp.gram_cpp, _fake_gram, "cpu"),
    "cuda": _define("gram_cuda", _GRAM_SCHEMA, native_slerp.gram_cuda, _fake_gram, "cuda"),
}
SLERP_APPLY = {
    "reference": _define(
        "slerp_apply_reference_",
        _APPLY_SCHEMA,
        _checked_apply(reference_slerp.slerp_apply_reference_),
        _no_result,
    ),
    "triton": _define(
        "slerp_apply_triton_",
        _APPLY_SCHEMA,
        _checked_apply(_triton("slerp", "slerp_apply_triton_")),
        _no_result,
        TRITON_DEVICE,
    ),
    "cpp": _define(
        "slerp_apply_cpp_",
        _APPLY_SCHEMA,
        _checked_apply(native_slerp.slerp_apply_cpp_),
        _no_result,
        "cpu",
    ),
    "cuda": _define(
        "slerp_apply_cuda_",
        _APPLY_SCHEMA,
        _checked_apply(native_slerp.slerp_apply_cuda_),
        _no_result,
        "cuda",
    ),
}

# --- loss --------------------------------------------------------------------------------------

_HEAD = "float temperature, float? softcap, str exact_kl"
_STATS_SCHEMA = (
    "(Tensor logits, Tensor token_ids, Tensor mask, Tensor? anchor_logits, "
    f"{_HEAD}, bool entropy) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_STATS_BACKWARD_SCHEMA = (
    f"(Tensor upstream, Tensor logits, Tensor token_ids, Tensor? anchor_logits, {_HEAD}, "
    "Tensor? state=None) -> Tensor"
)
_LINEAR_STATS_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor token_ids, Tensor mask, Tensor? anchor_hidden, "
    f"Tensor? anchor_weight, {_HEAD}, bool entropy) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LINEAR_STATS_BACKWARD_SCHEMA = (
    "(Tensor upstream, Tensor hidden, Tensor weight, Tensor token_ids, Tensor? anchor_hidden, "
    f"Tensor? anchor_weight, {_HEAD}, bool needs_hidden, bool needs_weight, "
    "Tensor? state=None) -> (Tensor, Tensor)"
)


def _fake_stats(state: int) -> Kernel:
    """state: the columns of the last output, which the gradient takes back."""

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        tensors = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
        rows, dtype = tensors[0].shape[0], reference_loss.compute_dtype(*tensors)
        found = [tensors[0].new_empty(rows, dtype=dtype) for _ in range(4)]
        return *found, tensors[0].new_empty((rows, state), dtype=torch.float64)

    return fake


def _fake_linear_backward(
    upstream: Tensor, hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    needs_hidden, needs_weight = rest[6:8]
    dhidden = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
    return dhidden, torch.empty_like(weight) if needs_weight else weight.new_empty(0)


def _stateless(forward: Kernel) -> Kernel:
    """The forward op of a backend whose gradient needs the inputs alone."""

    def run(first: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return *forward(first, *rest), first.new_empty((len(first), 0), dtype=torch.float64)

    return run


def _save_stats(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, temperature, softcap, exact_kl, _ = inputs
    ctx.save_for_backward(*tensors, output[4])
    ctx.head = (temperature, softcap, exact_kl)


def _upstream(ctx: Any, mask: Tensor, gradients: tuple[Tensor, ...]) -> Tensor:
    """[N, 3]: gradients of logprobs, entropy and kl, exactly 0 where masked."""
    dlogprobs, dentropy, _, dkl, _ = gradients
    stacked = torch.stack([dlogprobs, dentropy, dkl], dim=1)
    return torch.where(mask[:, None], stacked, 0)


def _kept(state: Tensor) -> tuple[Tensor, ...]:
    return (state,) if state.shape[1] else ()


def _stats_autograd(backward: Any) -> Kernel:
    def gradient(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, token_ids, mask, anchor_logits, state = ctx.saved_tensors
        upstream = _upstream(ctx, mask, gradients)
        dlogits = backward(upstream, logits, token_ids, anchor_logits, *ctx.head, *_kept(state))
        return dlogits, *[None] * 7

    return gradient


def _linear_stats_autograd(backward: Any) -> Kernel:
    def gradient(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, token_ids, mask, *anchor, state = ctx.saved_tensors
        upstream = _upstream(ctx, mask, gradients)
        needs = tuple(ctx.needs_input_grad[:2])
        found = backward(
            upstream, hidden, weight, token_ids, *anchor, *ctx.head, *needs, *_kept(state)
        )
        used = [part if need else None for part, need in zip(found, needs, strict=True)]
        return *used, *[None] * 8

    return gradient


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("the losses have a first derivative alone; got create_graph=True")


# op -> its schema, that of its gradient, the fake of the gradient, and what registers it
_STATS: dict[str, tuple[str, str, Kernel, Callable[[Any], Kernel]]] = {
    "token_stats": (
        _STATS_SCHEMA,
        _STATS_BACKWARD_SCHEMA,
        lambda upstream, logits, *_: torch.empty_like(logits),
        _stats_autograd,
    ),
    "linear_token_stats": (
        _LINEAR_STATS_SCHEMA,
        _LINEAR_STATS_BACKWARD_SCHEMA,
        _fake_linear_backward,
        _linear_stats_autograd,
    ),
}


def _define_stats(
    name: str,
    backend: str,
    forward: Kernel,
    backward: Kernel,
    device: str | None,
    state: int = 0,
) -> Any:
    """Register the op of one backend with its gradient.

    state: the columns of the fp64 rows that `forward` returns last and `backward` takes last; 0
    where they have none.
    """
    schema, backward_schema, fake_backward, autograd = _STATS[name]
    if not state:
        forward = _stateless(forward)
    op = _define(f"{name}_{backend}", schema, forward, _fake_stats(state), device)
    back = _define(f"{name}_backward_{backend}", backward_schema, backward, fake_backward, device)
    torch.library.register_autograd(op, autograd(back), setup_context=_save_stats)
    torch.library.register_autograd(back, _no_second_derivative)
    return op


TOKEN_STATS = {
    "reference": _define_stats(
        "token_stats",
        "reference",
        reference_loss.token_stats_reference,
        reference_loss.token_stats_backward_reference,
        None,
    ),
    "triton": _define_stats(
        "token_stats",
        "triton",
        _triton("loss", "token_stats_triton"),
        _triton("loss", "token_stats_backward_triton"),
        TRITON_DEVICE,
        native_loss.STATE,
    ),
    "cpp": _define_stats(
        "token_stats",
        "cpp",
        native_loss.token_stats_cpp,
        native_loss.token_stats_backward_cpp,
        "cpu",
        native_loss.STATE,
    ),
    "cuda": _define_stats(
        "token_stats",
        "cuda",
        native_loss_cuda.token_stats_cuda,
        native_loss_cuda.token_stats_backward_cuda,
        "cuda",
        native_loss.STATE,
    ),
}
LINEAR_TOKEN_STATS = {
    "reference": _define_stats(
        "linear_token_stats",
        "reference",
        reference_loss.linear_token_stats_reference,
        reference_loss.linear_token_stats_backward_reference,
        None,
    ),
    "triton": _define_stats(
        "linear_token_stats",
        "triton",
        _triton("linear_loss", "linear_token_stats_triton"),
        _triton("linear_loss", "linear_token_stats_backward_triton"),
        TRITON_DEVICE,
        native_loss.STATE,
    ),
    "cpp": _define_stats(
        "linear_token_stats",
        "cpp",
        native_loss.linear_token_stats_cpp,
        native_loss.linear_token_stats_backward_cpp,
        "cpu",
        native_loss.STATE,
    ),
}

# an op, since the number of its steps would tie a trace to a range of sizes
SUMS_TO_GO = _define(
    "sums_to_go",
    "(Tensor values, Tensor sequence, SymInt longest) -> Tensor",
    reference_loss.sums_to_go_reference,
    lambda values, *_: torch.empty_like(values),
)
