"""The ops of the losses in torch.library; see _ops.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from warp_fast._backend import TRITON_DEVICE
from warp_fast._define import Kernel, define, triton
from warp_fast._loss_checks import Terms
from warp_fast._objective import Rows, exact_kl_of
from warp_fast.native import linear_loss as native_linear_loss
from warp_fast.native import loss as native_loss
from warp_fast.native import loss_cuda as native_loss_cuda
from warp_fast.native._state import STATE
from warp_fast.reference import linear_loss as reference_linear_loss
from warp_fast.reference import loss as reference_loss
from warp_fast.reference.linear_loss import Heads, LinearLoss

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
    "Tensor? state=None, Tensor? host_mask=None) -> (Tensor, Tensor)"
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
    return _fake_gradients((hidden, weight), rest[6:8], upstream.dtype)


def _fake_gradients(
    of: tuple[Tensor, Tensor], needs: tuple[bool, bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    first, second = (
        x.new_empty(x.shape if need else 0, dtype=dtype) for x, need in zip(of, needs, strict=True)
    )
    return first, second


def _on_heads(kernel: Kernel) -> Kernel:
    """The statistics by a kernel that takes (heads, token_ids, mask, exact_kl, entropy)."""

    def run(hidden: Tensor, weight: Tensor, token_ids: Tensor, mask: Tensor, *rest: Any) -> Any:
        return kernel(Heads(hidden, weight, *rest[:4]), token_ids, mask, *rest[4:])

    return run


def _backward_on_heads(kernel: Kernel) -> Kernel:
    """Their gradient by one of (upstream, heads, token_ids, exact_kl, needs, state, host_mask)."""

    def run(upstream: Tensor, hidden: Tensor, weight: Tensor, token_ids: Tensor, *rest: Any) -> Any:
        *anchor_and_head, exact_kl, needs_hidden, needs_weight = rest[:7]
        heads, needs = Heads(hidden, weight, *anchor_and_head), (needs_hidden, needs_weight)
        return kernel(upstream, heads, token_ids, exact_kl, needs, *rest[7:])

    return run


def _stateless(forward: Kernel) -> Kernel:
    """The forward op of a backend whose gradient needs the inputs alone."""

    def run(first: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return *forward(first, *rest), first.new_empty((len(first), 0), dtype=torch.float64)

    return run


def _save_stats(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, temperature, softcap, exact_kl, _ = inputs
    if not exact_kl:  # the gradient needs no anchor, which the caller may drop or write to
        first = 3 if len(tensors) == 4 else 4
        tensors[first:] = [None] * len(tensors[first:])
    ctx.mark_non_differentiable(output[2], output[4])
    ctx.save_for_backward(*tensors, output[4])
    ctx.head = (temperature, softcap, exact_kl)


def _upstream(mask: Tensor, dlogprobs: Tensor, dentropy: Tensor, dkl: Tensor) -> Tensor:
    """[N, 3]: gradients of logprobs, entropy and kl, exactly 0 where masked."""
    stacked = torch.stack([dlogprobs, dentropy, dkl], dim=1)
    return torch.where(mask[:, None], stacked, 0)


def _kept(state: Tensor) -> Tensor | None:
    return state if state.shape[1] else None


def _stats_autograd(backward: Any) -> Kernel:
    def gradient(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, token_ids, mask, anchor_logits, state = ctx.saved_tensors
        upstream = _upstream(mask, gradients[0], gradients[1], gradients[3])
        dlogits = backward(upstream, logits, token_ids, anchor_logits, *ctx.head, _kept(state))
        return dlogits, *[None] * 7

    return gradient


def _gradient_dtype(of: Tensor) -> torch.dtype:
    """That of the tensor, unless the caller asks for another one by its grad_dtype."""
    asked: torch.dtype | None = getattr(of, "grad_dtype", None) if of.is_leaf else None
    return of.dtype if asked is None else asked


def _rounded(
    found: Sequence[Tensor], of: tuple[Tensor, Tensor], needs: Sequence[bool]
) -> Gradients:
    """What autograd takes of the gradients of hidden and weight."""
    triples = zip(found, of, needs, strict=True)
    return [part.to(_gradient_dtype(like)) if need else None for part, like, need in triples]


def _linear_stats_autograd(backward: Any) -> Kernel:
    def gradient(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, token_ids, mask, *anchor, state = ctx.saved_tensors
        upstream = _upstream(mask, gradients[0], gradients[1], gradients[3])
        needs = tuple(ctx.needs_input_grad[:2])
        found = backward(
            upstream, hidden, weight, token_ids, *anchor, *ctx.head, *needs, _kept(state)
        )
        return *_rounded(found, (hidden, weight), needs), *[None] * 8

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
    device: str | None = None,
    state: int = 0,
) -> Any:
    """Register the op of one backend with its gradient.

    state: the columns of the fp64 rows that `forward` returns last and `backward` takes last; 0
    where they have none.
    """
    schema, backward_schema, fake_backward, autograd = _STATS[name]
    if not state:
        forward = _stateless(forward)
    op = define(f"{name}_{backend}", schema, forward, _fake_stats(state), device)
    back = define(f"{name}_backward_{backend}", backward_schema, backward, fake_backward, device)
    torch.library.register_autograd(op, autograd(back), setup_context=_save_stats)
    torch.library.register_autograd(back, _no_second_derivative)
    return op


TOKEN_STATS = {
    "reference": _define_stats(
        "token_stats",
        "reference",
        reference_loss.token_stats_reference,
        reference_loss.token_stats_backward_reference,
    ),
    "triton": _define_stats(
        "token_stats",
        "triton",
        triton("loss", "token_stats_triton"),
        triton("loss", "token_stats_backward_triton"),
        TRITON_DEVICE,
        STATE,
    ),
    "cpp": _define_stats(
        "token_stats",
        "cpp",
        native_loss.token_stats_cpp,
        native_loss.token_stats_backward_cpp,
        "cpu",
        STATE,
    ),
    "cuda": _define_stats(
        "token_stats",
        "cuda",
        native_loss_cuda.token_stats_cuda,
        native_loss_cuda.token_stats_backward_cuda,
        "cuda",
        STATE,
    ),
}
LINEAR_TOKEN_STATS = {
    "reference": _define_stats(
        "linear_token_stats",
        "reference",
        _on_heads(reference_linear_loss.linear_token_stats_reference),
        _backward_on_heads(reference_linear_loss.linear_token_stats_backward_reference),
    ),
    "triton": _define_stats(
        "linear_token_stats",
        "triton",
        _on_heads(triton("linear_loss", "linear_token_stats_triton")),
        _backward_on_heads(triton("linear_loss", "linear_token_stats_backward_triton")),
        TRITON_DEVICE,
        STATE,
    ),
    "cpp": _define_stats(
        "linear_token_stats",
        "cpp",
        _on_heads(native_linear_loss.linear_token_stats_cpp),
        _backward_on_heads(native_linear_loss.linear_token_stats_backward_cpp),
        "cpu",
        STATE,
    ),
}

# --- the loss itself, with its gradients made in the forward pass

_LINEAR_LOSS_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor? anchor_hidden, Tensor? anchor_weight, "
    "float temperature, float? softcap, Tensor token_ids, Tensor mask, Tensor sequence, "
    "Tensor? host_mask, Tensor? host_sequence, SymInt count, SymInt longest, Tensor advantages, "
    "Tensor? anchor_logprobs, Tensor? old_logprobs, float[]? clip_range, float beta, str kl, "
    "bool entropy, bool needs_hidden, bool needs_weight) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class _Call(NamedTuple):
    """The arguments of an op, in groups; so the kernel of a backend takes them."""

    heads: Heads
    rows: Rows
    terms: Terms
    entropy: bool
    needs: tuple[bool, bool]

    @staticmethod
    def of(given: tuple[Any, ...]) -> _Call:
        token_ids, mask, sequence, host_mask, host_sequence, count, longest = given[6:13]
        on_host = None if host_mask is None else (host_mask, host_sequence)
        rows = Rows(token_ids.shape, token_ids, mask, sequence, count, longest, on_host)
        advantages, anchor_logprobs, old_logprobs, clip_range, beta, kl = given[13:19]
        clip = None if clip_range is None else (clip_range[0], clip_range[1])
        terms = Terms(advantages, anchor_logprobs, old_logprobs, clip, beta, kl)
        entropy, needs_hidden, needs_weight = given[19:]
        return _Call(Heads(*given[:6]), rows, terms, entropy, (needs_hidden, needs_weight))


def _grouped(kernel: Kernel) -> Kernel:
    def run(*given: Any) -> LinearLoss:
        found: LinearLoss = kernel(*_Call.of(given))
        return found

    return run


def _fake_linear_loss(state: int) -> Kernel:
    def fake(*given: Any) -> LinearLoss:
        heads, rows, _, _, needs = _Call.of(given)
        dtype, count, like = heads.compute_dtype, rows.mask.shape[0], heads.hidden
        stats = [like.new_empty(count, dtype=dtype) for _ in range(4)]
        made = _fake_gradients(heads[:2], needs, dtype)
        saved = like.new_empty((count, state), dtype=torch.float64)
        slopes = like.new_empty((count, 3), dtype=dtype)
        return LinearLoss._make([like.new_empty((), dtype=dtype), *stats, saved, slopes, *made])

    return fake


def _save_linear_loss(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    heads, rows, terms, _, needs = _Call.of(inputs)
    found = LinearLoss(*output)
    host_mask = None if rows.on_host is None else rows.on_host[0]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(found.anchor_logprobs, *found[5:])
    ctx.head = (heads.temperature, heads.softcap, exact_kl_of(terms.kl))
    anchor = heads[2:4] if ctx.head[2] else (None, None)
    rest = rows.token_ids, rows.mask, host_mask, found.state, found.slopes
    ctx.save_for_backward(*heads[:2], *anchor, *rest)
    # given away by the first backward pass, and so not among the saved tensors, which outlive it
    made = zip((found.dhidden, found.dweight), needs, strict=True)
    ctx.made = [part.detach() if need else None for part, need in made]


def _scaled(made: Tensor | None, scale: Tensor, of: Tensor) -> Tensor | None:
    """A gradient made in the forward pass, in one pass over it."""
    if made is None:
        return None
    dtype = _gradient_dtype(of)
    if made.dtype == dtype:
        return made.mul_(scale)
    return torch.mul(made, scale, out=torch.empty_like(made, dtype=dtype))


def _linear_loss_autograd(backward: Any) -> Kernel:
    def again(ctx: Any, dtotal: Tensor | None, *of_stats: Tensor | None) -> Gradients:
        """The gradients for any upstream, from the logits made again."""
        hidden, weight, *anchor, token_ids, mask, host_mask, state, slopes = ctx.saved_tensors
        none = torch.zeros_like(slopes[:, 0])
        upstream = _upstream(mask, *[none if x is None else x for x in of_stats])
        if dtotal is not None:
            upstream = upstream + slopes * dtotal
        needs = ctx.needs_input_grad[:2]
        rest = (*anchor, *ctx.head, *needs, _kept(state), host_mask)
        found = backward(upstream, hidden, weight, token_ids, *rest)
        return _rounded(found, (hidden, weight), needs)

    def gradient(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dtotal, dlogprobs, dentropy, _, dkl, *_ = gradients
        of_stats = (dlogprobs, dentropy, dkl)
        needs = ctx.needs_input_grad[:2]
        made, ctx.made = ctx.made, [None, None]
        there = all(part is not None for part, need in zip(made, needs, strict=True) if need)
        of_total_alone = all(x is None for x in of_stats) and not torch.is_grad_enabled()
        parts: Gradients
        if there and of_total_alone and dtotal is not None:
            of = ctx.saved_tensors[:2]
            parts = [_scaled(part, dtotal, like) for part, like in zip(made, of, strict=True)]
        else:
            parts = again(ctx, dtotal, *of_stats)
        return *parts, *[None] * 20

    return gradient


def _define_loss(backend: str, kernel: Kernel, device: str | None = None, state: int = 0) -> Any:
    """state: as in `_define_stats`, whose backward op the gradient may need."""
    name, fake = f"linear_loss_{backend}", _fake_linear_loss(state)
    op = define(name, _LINEAR_LOSS_SCHEMA, _grouped(kernel), fake, device)
    back = getattr(torch.ops.warp_fast, f"linear_token_stats_backward_{backend}").default
    gradient = _linear_loss_autograd(back)
    torch.library.register_autograd(op, gradient, setup_context=_save_linear_loss)
    return op


LINEAR_LOSS = {
    "reference": _define_loss("reference", reference_linear_loss.linear_loss_reference),
    "triton": _define_loss(
        "triton", triton("linear_loss", "linear_loss_triton"), TRITON_DEVICE, STATE
    ),
    "cpp": _define_loss("cpp", native_linear_loss.linear_loss_cpp, "cpu", STATE),
}

# an op, since torch.compile has no segment_reduce
SEQUENCE_SUMS = define(
    "sequence_sums",
    "(Tensor values, Tensor sequence, SymInt count) -> Tensor",
    reference_loss.sequence_sums_reference,
    lambda values, _, count: values.new_empty(count),
)
# an op, since the number of its steps would tie a trace to a range of sizes
SUMS_TO_GO = define(
    "sums_to_go",
    "(Tensor values, Tensor sequence, SymInt longest) -> Tensor",
    reference_loss.sums_to_go_reference,
    lambda values, *_: torch.empty_like(values),
)
