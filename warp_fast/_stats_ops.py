"""The ops of the statistics of rows in torch.library, and of their gradient; see _ops.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from warp_fast._define import DEVICE, Kernel, define_each, no_result, triton
from warp_fast._loss_rows import STATE, Found
from warp_fast.native import linear_loss as native_linear_loss
from warp_fast.native import loss as native_loss
from warp_fast.native import loss_cuda as native_loss_cuda
from warp_fast.reference import linear_loss as reference_linear_loss
from warp_fast.reference import loss as reference_loss
from warp_fast.reference.linear_loss import Heads

Gradients: TypeAlias = Sequence[Tensor | None]  # of hidden and weight

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
    "Tensor? state=None, Tensor? host_mask=None, ScalarType? weight_dtype=None) -> (Tensor, Tensor)"
)


# backend -> the columns of the fp64 rows that its forward op gives to its gradient
STATE_OF = {name: 0 if name == "reference" else STATE for name in DEVICE}


def _fake_stats(state: int) -> Kernel:
    """state: the columns of the last output."""

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        tensors = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
        # torch.Size.numel() would tie a trace to one number of rows
        rows = math.prod(tensors[0].shape[:-1])
        dtype = reference_loss.compute_dtype(*tensors)
        return Found.empty(tensors[0], rows, dtype, state)

    return fake


def fake_gradients(
    of: tuple[Tensor, Tensor], needs: tuple[bool, bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    first, second = (
        x.new_empty(x.shape if need else 0, dtype=dtype) for x, need in zip(of, needs, strict=True)
    )
    return first, second


def _fake_linear_backward(
    upstream: Tensor,
    heads: Heads,
    token_ids: Tensor,
    exact_kl: str,
    needs: tuple[bool, bool],
    state: Tensor | None = None,
    host_mask: Tensor | None = None,
    weight_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    dhidden, dweight = fake_gradients(heads[:2], needs, upstream.dtype)
    return dhidden, dweight.to(weight_dtype or upstream.dtype)


def _on_heads(kernel: Kernel) -> Kernel:
    """The statistics by a kernel that takes (heads, token_ids, mask, exact_kl, entropy)."""

    def run(hidden: Tensor, weight: Tensor, token_ids: Tensor, mask: Tensor, *rest: Any) -> Any:
        return kernel(Heads(hidden, weight, *rest[:4]), token_ids, mask, *rest[4:])

    return run


def _backward_on_heads(kernel: Kernel) -> Kernel:
    """Their gradient by one that takes (upstream, heads, token_ids, exact_kl, needs, state,
    host_mask, weight_dtype)."""

    def run(upstream: Tensor, hidden: Tensor, weight: Tensor, token_ids: Tensor, *rest: Any) -> Any:
        *anchor_and_head, exact_kl, needs_hidden, needs_weight = rest[:7]
        heads, needs = Heads(hidden, weight, *anchor_and_head), (needs_hidden, needs_weight)
        return kernel(upstream, heads, token_ids, exact_kl, needs, *rest[7:])

    return run


def _stateless(forward: Kernel) -> Kernel:
    """The forward op of a backend whose gradient needs the inputs alone."""

    def run(first: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        state = first.new_empty((first.shape[:-1].numel(), 0), dtype=torch.float64)
        return *forward(first, *rest), state

    return run


def save(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """Save for the backward pass; inference tensors, which autograd refuses, as normal ones."""
    kept = [_normal(x) if x is not None and x.is_inference() else x for x in tensors]
    ctx.save_for_backward(*kept)


def _normal(tensor: Tensor) -> Tensor:
    """A tensor in the same memory that is not of inference mode."""
    new = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    place = tensor.storage_offset(), tensor.shape, tensor.stride()
    return new.set_(tensor.untyped_storage(), *place)


def _save_stats(policy: int) -> Kernel:
    """policy: how many tensors come before those of the anchor."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, temperature, softcap, exact_kl, _ = inputs
        ctx.dtypes = gradient_dtypes(tensors[:2])
        if not exact_kl:  # the gradient needs no anchor, which the caller may drop or write to
            tensors[policy:] = [None] * len(tensors[policy:])
        ctx.mark_non_differentiable(output[2], output[4])
        save(ctx, [*tensors, output[4]])
        ctx.head = (temperature, softcap, exact_kl)

    return setup


def upstream_of(mask: Tensor, dlogprobs: Tensor, dentropy: Tensor, dkl: Tensor) -> Tensor:
    """[N, 3]: gradients of logprobs, entropy and kl, exactly 0 where masked."""
    stacked = torch.stack([dlogprobs, dentropy, dkl], dim=1)
    return torch.where(mask[:, None], stacked, 0)


def kept_state(state: Tensor) -> Tensor | None:
    return state if state.shape[1] else None


def _stats_autograd(backward: Any) -> Kernel:
    def gradient(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, token_ids, mask, anchor_logits, state = ctx.saved_tensors
        upstream = upstream_of(mask, gradients[0], gradients[1], gradients[3])
        dlogits = backward(upstream, logits, token_ids, anchor_logits, *ctx.head, kept_state(state))
        return dlogits, *[None] * 7

    return gradient


def gradient_dtypes(of: Sequence[Tensor]) -> list[torch.dtype]:
    """Those of the tensors, unless the caller asks for another one by the grad_dtype of a leaf.

    For the forward pass: what a checkpoint or a hook gives the backward pass has none.
    """
    asked = [getattr(x, "grad_dtype", None) if x.is_leaf else None for x in of]
    return [dtype or x.dtype for dtype, x in zip(asked, of, strict=True)]


def rounded(
    found: Sequence[Tensor], dtypes: Sequence[torch.dtype], needs: Sequence[bool]
) -> Gradients:
    """What autograd takes of the gradients of hidden and weight."""
    triples = zip(found, dtypes, needs, strict=True)
    return [part.to(dtype) if need else None for part, dtype, need in triples]


def _linear_stats_autograd(backward: Any) -> Kernel:
    def gradient(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, token_ids, mask, *anchor, state = ctx.saved_tensors
        upstream = upstream_of(mask, gradients[0], gradients[1], gradients[3])
        needs = tuple(ctx.needs_input_grad[:2])
        rest = (*anchor, *ctx.head, *needs, kept_state(state), None, ctx.dtypes[1])
        found = backward(upstream, hidden, weight, token_ids, *rest)
        return *rounded(found, ctx.dtypes, needs), *[None] * 8

    return gradient


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("the losses have a first derivative alone; got create_graph=True")


def _differentiate(
    ops: Mapping[str, Any],
    backward: Mapping[str, Any],
    autograd: Callable[[Any], Kernel],
    setup: Kernel,
) -> None:
    """Register the gradient of each op by that of the same backend in `backward`."""
    for name, op in ops.items():
        torch.library.register_autograd(op, autograd(backward[name]), setup_context=setup)
        torch.library.register_autograd(backward[name], _no_second_derivative)


_STATS_FAKES = {name: _fake_stats(state) for name, state in STATE_OF.items()}
_BACKWARD = {
    "reference": reference_loss.token_stats_backward_reference,
    "triton": triton("loss", "token_stats_backward_triton"),
    "cpp": native_loss.token_stats_backward_cpp,
    "cuda": native_loss_cuda.token_stats_backward_cuda,
}
TOKEN_STATS = define_each(
    "token_stats_{}",
    _STATS_SCHEMA,
    {
        "reference": _stateless(reference_loss.token_stats_reference),
        "triton": triton("loss", "token_stats_triton"),
        "cpp": native_loss.token_stats_cpp,
        "cuda": native_loss_cuda.token_stats_cuda,
    },
    _STATS_FAKES,
)
TOKEN_STATS_BACKWARD = define_each(
    "token_stats_backward_{}",
    _STATS_BACKWARD_SCHEMA,
    _BACKWARD,
    lambda upstream, logits, *_: torch.empty_like(logits),
)
_differentiate(TOKEN_STATS, TOKEN_STATS_BACKWARD, _stats_autograd, _save_stats(policy=3))

LINEAR_TOKEN_STATS = define_each(
    "linear_token_stats_{}",
    _LINEAR_STATS_SCHEMA,
    {
        "reference": _stateless(_on_heads(reference_linear_loss.linear_token_stats_reference)),
        "triton": _on_heads(triton("linear_loss", "linear_token_stats_triton")),
        "cpp": _on_heads(native_linear_loss.linear_token_stats_cpp),
    },
    _STATS_FAKES,
)
LINEAR_TOKEN_STATS_BACKWARD = define_each(
    "linear_token_stats_backward_{}",
    _LINEAR_STATS_BACKWARD_SCHEMA,
    {
        "reference": _backward_on_heads(
            reference_linear_loss.linear_token_stats_backward_reference
        ),
        "triton": _backward_on_heads(triton("linear_loss", "linear_token_stats_backward_triton")),
        "cpp": _backward_on_heads(native_linear_loss.linear_token_stats_backward_cpp),
    },
    _backward_on_heads(_fake_linear_backward),
)
_differentiate(
    LINEAR_TOKEN_STATS, LINEAR_TOKEN_STATS_BACKWARD, _linear_stats_autograd, _save_stats(policy=4)
)

# --- the same from logits that the gradient is written over

_GRADIENT_SCHEMA = (
    "(Tensor(a!) logits, Tensor upstream, Tensor token_ids, Tensor? anchor_logits, "
    f"{_HEAD}, Tensor? state) -> ()"
)
_FUSED_SCHEMA = (
    "(Tensor(a!) logits, Tensor upstream, Tensor token_ids, Tensor mask, Tensor? anchor_logits, "
    f"{_HEAD}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _over_logits(backward: Kernel) -> Kernel:
    def run(logits: Tensor, upstream: Tensor, *rest: Any) -> None:
        backward(upstream, logits, *rest, logits)

    return run


TOKEN_GRADIENT = define_each(
    "token_gradient_{}_",
    _GRADIENT_SCHEMA,
    {name: _over_logits(backward) for name, backward in _BACKWARD.items()},
    no_result,
)
TOKEN_FUSED = define_each(
    "token_stats_fused_{}_",
    _FUSED_SCHEMA,
    {"cuda": native_loss_cuda.token_stats_fused_cuda_},
    lambda logits, *rest: _fake_stats(0)(logits, *rest)[:4],
)
