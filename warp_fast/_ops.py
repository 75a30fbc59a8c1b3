"""The ops of warp_fast in torch.library: schema, fake and kernels of each; the table of contents.

An op id carries its backend (`warp_fast::ema_update_reference_`); the backends of one op share its
schema, its fake and its autograd formula, all written here in Python, so every op exists and traces
whether or not its compiled kernel does.
"""

from __future__ import annotations

import importlib
import operator
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from warp_fast._backend import TRITON_DEVICE
from warp_fast.native import ema as native_ema
from warp_fast.native import loss as native_loss
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


def byte_range(tensor: Tensor) -> tuple[int, int]:
    """First and one-past-last byte address that the tensor spans."""
    if tensor.numel() == 0:
        return 0, 0
    if tensor.is_contiguous():
        return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def refuse_overlap(written: Sequence[Tensor], read: Sequence[Tensor], *, same: bool) -> None:
    """Raise ValueError where a written tensor shares bytes with another written or read one.

    same: allow read[i] to occupy exactly the bytes of written[i] (elementwise in-place).
    """
    # (start, stop, whether written, position, dtype); called for every update, so plain tuples
    ranges = [(*byte_range(t), True, i, t.dtype) for i, t in enumerate(written)]
    ranges += [(*byte_range(t), False, i, t.dtype) for i, t in enumerate(read)]
    ranges.sort(key=_START)
    open_ranges: list[_Range] = []
    for current in ranges:
        start = current[0]
        if start == current[1]:
            continue
        open_ranges = [other for other in open_ranges if other[1] > start]
        for other in open_ranges:
            if (current[2] or other[2]) and not (same and _in_place(current, other)):
                raise ValueError(
                    "a tensor that is written must not share memory with another argument; bytes "
                    f"{start:#x}..{min(current[1], other[1]):#x} are in two of them (tied weights "
                    "are passed once)"
                )
        open_ranges.append(current)


_Range: TypeAlias = tuple[int, int, bool, int, torch.dtype]
_START = operator.itemgetter(0, 1)


def _in_place(a: _Range, b: _Range) -> bool:
    return a[:2] == b[:2] and a[2] != b[2] and a[3:] == b[3:]


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


def _define_stats(
    backend: str, kernels: Sequence[Kernel], device: str | None, state: int = 0
) -> tuple[Any, Any]:
    """Register the two statistics ops of a backend with their gradients; (logits, linear).

    state: the columns of the fp64 rows that its forward ops return last and its gradients take
    last; 0 where they have none.
    """
    forward, backward, linear, linear_backward = kernels
    if not state:
        forward, linear = _stateless(forward), _stateless(linear)
    name = f"token_stats_{backend}"
    op = _define(name, _STATS_SCHEMA, forward, _fake_stats(state), device)
    back = _define(
        f"token_stats_backward_{backend}",
        _STATS_BACKWARD_SCHEMA,
        backward,
        lambda upstream, logits, *_: torch.empty_like(logits),
        device,
    )
    torch.library.register_autograd(op, _stats_autograd(back), setup_context=_save_stats)
    linear_op = _define(f"linear_{name}", _LINEAR_STATS_SCHEMA, linear, _fake_stats(state), device)
    back = _define(
        f"linear_token_stats_backward_{backend}",
        _LINEAR_STATS_BACKWARD_SCHEMA,
        linear_backward,
        _fake_linear_backward,
        device,
    )
    torch.library.register_autograd(
        linear_op, _linear_stats_autograd(back), setup_context=_save_stats
    )
    return op, linear_op


TOKEN_STATS: dict[str, Any] = {}
LINEAR_TOKEN_STATS: dict[str, Any] = {}
TOKEN_STATS["reference"], LINEAR_TOKEN_STATS["reference"] = _define_stats(
    "reference",
    (
        reference_loss.token_stats_reference,
        reference_loss.token_stats_backward_reference,
        reference_loss.linear_token_stats_reference,
        reference_loss.linear_token_stats_backward_reference,
    ),
    None,
)
TOKEN_STATS["triton"], LINEAR_TOKEN_STATS["triton"] = _define_stats(
    "triton",
    (
        _triton("loss", "token_stats_triton"),
        _triton("loss", "token_stats_backward_triton"),
        _triton("linear_loss", "linear_token_stats_triton"),
        _triton("linear_loss", "linear_token_stats_backward_triton"),
    ),
    TRITON_DEVICE,
    state=8,
)
TOKEN_STATS["cpp"], LINEAR_TOKEN_STATS["cpp"] = _define_stats(
    "cpp",
    (
        native_loss.token_stats_cpp,
        native_loss.token_stats_backward_cpp,
        native_loss.linear_token_stats_cpp,
        native_loss.linear_token_stats_backward_cpp,
    ),
    "cpu",
    native_loss.STATE,
)
