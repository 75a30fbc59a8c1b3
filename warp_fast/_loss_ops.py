"""The ops of the losses, with gradients made in the forward pass, in torch.library; see _ops.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warp_fast._define import Kernel, define, define_each, no_result, triton
from warp_fast._loss_checks import Terms
from warp_fast._loss_rows import Found
from warp_fast._objective import Tokens, exact_kl_of
from warp_fast._stats_ops import (
    LINEAR_TOKEN_STATS_BACKWARD,
    STATE_OF,
    Gradients,
    fake_gradients,
    gradient_dtypes,
    kept_state,
    rounded,
    save,
    upstream_of,
)
from warp_fast.native import linear_loss as native_linear_loss
from warp_fast.native import loss_cuda as native_loss_cuda
from warp_fast.reference import linear_loss as reference_linear_loss
from warp_fast.reference import loss as reference_loss
from warp_fast.reference.linear_loss import Heads, LinearLoss

_LINEAR_LOSS_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor? anchor_hidden, Tensor? anchor_weight, "
    "float temperature, float? softcap, Tensor token_ids, Tensor mask, Tensor sequence, "
    "Tensor? host_mask, Tensor? host_sequence, SymInt count, SymInt longest, Tensor advantages, "
    "Tensor? anchor_logprobs, Tensor? old_logprobs, float[]? clip_range, Tensor beta, str kl, "
    "bool entropy, bool needs_hidden, bool needs_weight) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class Call(NamedTuple):
    """The arguments of the linear_loss op in groups, as the kernels of the backends take them."""

    heads: Heads
    tokens: Tokens
    terms: Terms
    entropy: bool
    needs: tuple[bool, bool]

    @staticmethod
    def of(given: tuple[Any, ...]) -> Call:
        token_ids, mask, sequence, host_mask, host_sequence, count, longest = given[6:13]
        on_host = None if host_mask is None else (host_mask, host_sequence)
        tokens = Tokens(token_ids.shape, token_ids, mask, sequence, count, longest, on_host)
        advantages, anchor_logprobs, old_logprobs, clip_range, beta, kl = given[13:19]
        clip = None if clip_range is None else (clip_range[0], clip_range[1])
        terms = Terms(advantages, anchor_logprobs, old_logprobs, clip, beta, kl)
        entropy, needs_hidden, needs_weight = given[19:]
        return Call(Heads(*given[:6]), tokens, terms, entropy, (needs_hidden, needs_weight))

    def arguments(self) -> tuple[Any, ...]:
        """What `of` takes, in the order of the schema."""
        tokens, terms = self.tokens, self.terms
        on_host = tokens.on_host or (None, None)
        layout = (
            tokens.token_ids,
            tokens.mask,
            tokens.sequence,
            *on_host,
            tokens.count,
            tokens.longest,
        )
        given = (terms.advantages, terms.anchor_logprobs, terms.old_logprobs)
        # A tensor, since a trace is tied to the value of a number that an op takes. Outside of one
        # it is read from the CPU; in one, a tensor there would keep it from being a CUDA graph.
        place = self.heads.hidden.device if torch.compiler.is_compiling() else "cpu"
        beta = terms.beta * torch.ones((), dtype=torch.float64, device=place)
        how = (terms.clip_range, beta, terms.kl)
        return *self.heads, *layout, *given, *how, self.entropy, *self.needs


def _grouped(kernel: Kernel) -> Kernel:
    def run(*given: Any) -> LinearLoss:
        call = Call.of(given)
        beta = call.terms.beta
        if isinstance(beta, Tensor) and beta.is_cpu:
            call = call._replace(terms=replace(call.terms, beta=beta.item()))
        found: LinearLoss = kernel(*call)
        return found

    return run


def _fake_linear_loss(state: int) -> Kernel:
    def fake(*given: Any) -> LinearLoss:
        heads, tokens, _, _, needs = Call.of(given)
        dtype, count, like = heads.compute_dtype, tokens.mask.shape[0], heads.hidden
        total, slopes = (like.new_empty(shape, dtype=dtype) for shape in ((), (count, 3)))
        found = Found.empty(like, count, dtype, state)
        return LinearLoss(total, *found, slopes, *fake_gradients(heads[:2], needs, dtype))

    return fake


def _save_linear_loss(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    heads, tokens, terms, _, needs = Call.of(inputs)
    found = LinearLoss(*output)
    host_mask = None if tokens.on_host is None else tokens.on_host[0]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(found.anchor_logprobs, *found[5:])
    ctx.head = (heads.temperature, heads.softcap, exact_kl_of(terms.kl))
    anchor = heads[2:4] if ctx.head[2] else (None, None)
    ctx.dtypes = gradient_dtypes(heads[:2])
    rest = tokens.token_ids, tokens.mask, host_mask, found.state, found.slopes
    save(ctx, [*heads[:2], *anchor, *rest])
    # given away by the first backward pass, and so not among the saved tensors, which outlive it
    made = zip((found.dhidden, found.dweight), needs, strict=True)
    ctx.made = [part.detach() if need else None for part, need in made]


def _fake_scaled(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(values, dtype=dtype, memory_format=torch.contiguous_format)


# values * factor, rounded once: the gradient of a weight from its sum in fp32, in one pass
SCALED = define_each(
    "scaled_{}",
    "(Tensor values, Tensor factor, ScalarType dtype) -> Tensor",
    {
        "reference": reference_loss.scaled_reference,
        "triton": triton("loss", "scaled_triton"),
        "cpp": reference_loss.scaled_reference,
    },
    _fake_scaled,
)


def _linear_loss_autograd(backward: Any, scaled: Any) -> Kernel:
    def final(made: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
        """A gradient made in the forward pass, in one pass over it."""
        if made is None:
            return None
        found: Tensor = made.mul_(scale) if made.dtype == dtype else scaled(made, scale, dtype)
        return found

    def again(ctx: Any, dtotal: Tensor | None, *of_stats: Tensor | None) -> Gradients:
        """The gradients for any upstream, from the logits made again."""
        hidden, weight, *anchor, token_ids, mask, host_mask, state, slopes = ctx.saved_tensors
        none = torch.zeros_like(slopes[:, 0])
        upstream = upstream_of(mask, *[none if x is None else x for x in of_stats])
        if dtotal is not None:
            upstream = upstream + slopes * dtotal
        needs = ctx.needs_input_grad[:2]
        rest = (*anchor, *ctx.head, *needs, kept_state(state), host_mask, ctx.dtypes[1])
        found = backward(upstream, hidden, weight, token_ids, *rest)
        return rounded(found, ctx.dtypes, needs)

    def gradient(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dtotal, dlogprobs, dentropy, _, dkl, *_ = gradients
        of_stats = (dlogprobs, dentropy, dkl)
        needs = ctx.needs_input_grad[:2]
        made, ctx.made = ctx.made, [None, None]
        there = all(part is not None for part, need in zip(made, needs, strict=True) if need)
        of_total_alone = all(x is None for x in of_stats) and not torch.is_grad_enabled()
        parts: Gradients
        if there and of_total_alone and dtotal is not None:
            parts = [final(part, dtotal, to) for part, to in zip(made, ctx.dtypes, strict=True)]
        else:
            parts = again(ctx, dtotal, *of_stats)
        return *parts, *[None] * 20

    return gradient


LINEAR_LOSS = define_each(
    "linear_loss_{}",
    _LINEAR_LOSS_SCHEMA,
    {
        "reference": _grouped(reference_linear_loss.linear_loss_reference),
        "triton": _grouped(triton("linear_loss", "linear_loss_triton")),
        "cpp": _grouped(native_linear_loss.linear_loss_cpp),
    },
    {name: _fake_linear_loss(state) for name, state in STATE_OF.items()},
)
for _name, _op in LINEAR_LOSS.items():
    _gradient = _linear_loss_autograd(LINEAR_TOKEN_STATS_BACKWARD[_name], SCALED[_name])
    torch.library.register_autograd(_op, _gradient, setup_context=_save_linear_loss)

# --- a loss whose gradient is there already, over the logits

SCALE = define_each(
    "scale_{}_",
    "(Tensor(a!) values, Tensor factor) -> ()",
    {
        "reference": reference_loss.scale_reference_,
        "triton": triton("loss", "scale_triton_"),
        "cpp": reference_loss.scale_reference_,
        "cuda": native_loss_cuda.scale_cuda_,
    },
    no_result,
)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, of, gradient, ctx.backend = inputs
    ctx.shape, ctx.given = of.shape, False
    # autograd refuses it in the backward pass if it has been written over
    ctx.save_for_backward(gradient)


def _give_gradient(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.given or torch.is_grad_enabled():
        raise RuntimeError(
            "a loss that is in_place has its gradient once: neither retain_graph nor create_graph "
            "can have it again; call the loss without in_place"
        )
    try:
        (made,), ctx.given = ctx.saved_tensors, True
    except RuntimeError as error:
        # a checkpoint makes the logits again here, which may fail in any way
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "the gradient of a loss in_place lies where its logits were, which have been written "
            "since; make one such loss for all rows of one tensor, and write nothing to it before "
            "the backward pass"
        ) from error
    SCALE[ctx.backend](made, upstream)
    return None, made.view(ctx.shape), None, None


GIVEN_GRADIENT = define(
    "given_gradient",
    "(Tensor value, Tensor of, Tensor gradient, str backend) -> Tensor",
    lambda value, *_: value.clone(),
    lambda value, *_: torch.empty_like(value),
)
torch.library.register_autograd(GIVEN_GRADIENT, _give_gradient, setup_context=_save_gradient)
