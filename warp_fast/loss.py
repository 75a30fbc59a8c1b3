"""Log-probabilities of sampled tokens, and the KL-to-anchor policy-gradient loss built on them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from warp_fast import _loss_checks as checks
from warp_fast import _loss_ops, _stats_ops
from warp_fast._backend import resolve
from warp_fast._in_place import loss_in_place
from warp_fast._loss_rows import rows_of
from warp_fast._objective import (
    Tokens,
    divergence,
    exact_kl_of,
    normalizer_of,
    objective,
    with_given_anchor,
)
from warp_fast.reference.linear_loss import Heads
from warp_fast.reference.loss import Stats

Kl: TypeAlias = checks.Kl
Normalizer: TypeAlias = Literal["sequence", "token"] | float | Tensor


class WarpLoss(NamedTuple):
    """What the losses return.

    Attributes:
        loss: () fp32, as the rest (fp64 for fp64 inputs).
        logprobs, anchor_logprobs: log pi(y_t) and log pi_anchor(y_t), nats, in the shape of
            token_ids, 0 where masked; anchor_logprobs is 0 without an anchor.
        kl: per token, nats, the estimate that `kl` names (see `warp_loss`).
        entropy: per token, nats; None unless asked for.
    """

    loss: Tensor
    logprobs: Tensor
    anchor_logprobs: Tensor
    kl: Tensor
    entropy: Tensor | None


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    backend: str = "auto",
) -> Any:
    """Log-probability of each token under its row of logits.

        u = softcap tanh(logits / softcap) / temperature;  logp = u_y - logsumexp(u)

    Args:
        logits: [..., V] fp32, bf16, fp16 or fp64.
        token_ids: [...] integers in [0, V); row t of logits predicts token_ids t.
        temperature: from 1e-12 to 1e12.
        softcap: final-logit softcap (30 for Gemma 2), from 1e-12 to 1e12, or None.
        return_entropy: also return the entropy of each row.
        backend: "auto" or the name of a backend.

    Returns: [...] fp32 (fp64 for fp64 logits), nats, never positive; with return_entropy a pair.

    Raises:
        ValueError: shapes, devices or values do not fit; an id outside the vocabulary (-100 too:
            give any id and drop the result) names its row. On a GPU, which nothing waits for, its
            log-prob is NaN. TypeError: dtypes do not fit.

    Traffic: reads the logits once (2 bytes per bf16 logit), of a slice such as logits[:, :-1] where
        they are; the gradient reads them again and writes as much. The gradient of a slice autograd
        copies into zeros of the whole: slice hidden states instead, or mask the last token.
    Numerics: fp32 throughout (fp64 for fp64 logits), max subtracted. Gradients flow to logits.
    """
    temperature, softcap = checks.head(temperature, softcap)
    checks.rows(logits, "logits")
    checks.token_ids(token_ids, logits.shape[:-1], logits.device, "logits")
    op = _stats_ops.TOKEN_STATS[resolve("loss", backend, logits.device)]
    rows, ids = rows_of(logits), token_ids.reshape(-1).long()
    everything = torch.ones_like(ids, dtype=torch.bool)
    stats = op(rows, ids, everything, None, temperature, softcap, "", return_entropy)
    return _shaped(Stats(*stats[:4]), token_ids.shape, return_entropy)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    backend: str = "auto",
) -> Any:
    """`token_logprobs` of hidden @ weight.T, without the logits of all rows in memory.

    Args:
        hidden: [..., D] fp32, bf16, fp16 or fp64.
        weight: [V, D] head weight; any of these dtypes.
        token_ids: [...] integers in [0, V).
        temperature, softcap, return_entropy, backend: as in `token_logprobs`.

    Returns: [...] fp32 (fp64 for fp64 inputs), nats, never positive; with return_entropy a pair.

    Raises: as `token_logprobs`.

    Traffic: 2 N V D flops forward, 6 N V D backward (the logits are made again).
    Numerics: products in fp32, so that log-ratios of near-equal policies are right. Gradients flow
        to hidden and weight, each only if it requires one.
    """
    temperature, softcap = checks.head(temperature, softcap)
    checks.linear(hidden, weight, "hidden", "weight")
    checks.token_ids(token_ids, hidden.shape[:-1], hidden.device, "hidden")
    op = _stats_ops.LINEAR_TOKEN_STATS[resolve("linear_loss", backend, hidden.device)]
    rows, ids = hidden.reshape(-1, hidden.shape[-1]), token_ids.reshape(-1).long()
    kept = torch.ones_like(ids, dtype=torch.bool)
    stats = op(rows, weight, ids, kept, None, None, temperature, softcap, "", return_entropy)
    return _shaped(Stats(*stats[:4]), token_ids.shape, return_entropy)


def _shaped(stats: Stats, shape: torch.Size, return_entropy: bool) -> Any:
    logprobs = stats.logprobs.view(shape)
    return (logprobs, stats.entropy.view(shape)) if return_entropy else logprobs


def warp_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    anchor_logits: Tensor | None = None,
    anchor_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float | Tensor = 0.1,
    kl: Kl = "reward",
    temperature: float = 1.0,
    softcap: float | None = None,
    old_logprobs: Tensor | None = None,
    clip_range: float | tuple[float, float] | None = None,
    normalizer: Normalizer = "sequence",
    return_entropy: bool = False,
    in_place: bool = False,
    backend: str = "auto",
) -> WarpLoss:
    """Policy-gradient loss with a KL penalty toward an anchor.

        d_t = log pi(y_t) - log pi_anchor(y_t)
        kl="reward":        -1/Z sum_i c_i sum_t log pi(y_t),  c_i = A_i - beta sum_t d_t, detached
        kl="reward_to_go":  the same with c_it = A_i - beta sum_{s >= t} d_s
        kl="k2", "k3":      -1/Z sum A log pi + beta/Z sum k(d_t),  d^2/2 or exp(-d) - 1 + d
        kl="reverse", "forward":  the same with the exact KL(pi || anchor) or KL(anchor || pi)
        kl="none":          -1/Z sum A log pi

    "reward" is Algorithm 1 of arXiv 2406.16768. On-policy, the gradients of reward and reward_to_go
    estimate that of the reverse KL of the sequence; those of k2 and reverse that of the reverse KL
    of each token after its prefix, and those of k3 and forward that of the forward KL: what a token
    does to later KLs is not in them. With old_logprobs the policy-gradient term is
    -min(r c, clip(r, 1 - low, 1 + high) c), r = pi(y_t) / exp(old_logprobs).

    Args:
        logits: [B, T, V], or packed [N, V] with cu_seqlens; fp32, bf16, fp16 or fp64.
        token_ids: [B, T] or [N] integers; anything where masked.
        advantages: [B], or per token; packed with N = B (some sequence is empty), one per sequence.
        anchor_logits: like logits. Needed for "reverse" and "forward".
        anchor_logprobs: [B, T] or [N] fp32 or fp64, at the same temperature; instead of
            anchor_logits.
        mask: [B, T] or [N], bool or 0/1; default everything counts. It may be on the CPU.
        cu_seqlens: [B + 1] integers from 0 to N, the bounds of packed sequences; where the mask is.
        beta: strength of the KL term, finite and >= 0; a number or a 0-dim tensor, whose value is
            not looked at on GPUs nor in a trace.
        kl: see above.
        temperature, softcap: of policy and anchor alike; softcap first.
        old_logprobs: [B, T] or [N] fp32 or fp64, of the policy that sampled.
        clip_range: one number or (low, high); needs old_logprobs.
        normalizer: Z; "sequence" (B), "token" (mask sum), or a number or 0-dim tensor, such as a
            count over all ranks and accumulation steps; 0 if nothing counts, and the loss is 0.
        return_entropy: also return the entropy per token.
        in_place: make the gradient now and write it over the logits, which are lost (later reads
            find the gradient): no second [N, V] in memory. For one loss per tensor of logits, not
            one for each slice of it. The gradient can be had once, and the per-token values have
            none. Without a gradient to make, nothing is written.
        backend: "auto" or the name of a backend.

    Returns: a WarpLoss. Its kl is d_t for "reward" and "reward_to_go", k(d_t) for "k2" and "k3",
        the exact value for "reverse" and "forward", 0 for "none".

    Raises:
        ValueError: shapes, devices or values do not fit; where the mask is set, NaN advantages,
            log-probs of NaN or inf, ids outside the vocabulary (not looked for on GPUs, which
            would wait for it). TypeError: dtypes do not fit. kl="k1" is refused: its gradient is
            zero in expectation. in_place is for logits whose rows are contiguous and apart, that
            are no leaf nor a view of one (which torch.compile does not see) nor made by chunk,
            split or unbind, share nothing with the anchor's and are not fp16.

    Traffic: reads policy and anchor logits once, the gradient reads the policy (for exact KL the
        anchor too) and writes as much; slices as in `token_logprobs`. In place the backward pass
        costs nothing if what it is given is 1 (so divide by `normalizer`, not the loss), else a
        read and a write; and backend "cuda" takes one pass for both, 6 bytes per bf16 logit, if kl
        is "reverse", "forward" or "none" and there are no old_logprobs.
    Numerics: fp32; log-probs never positive. Gradients flow to logits alone, unless in place also
        through the returned per-token values; an all-masked batch gives 0 and zero gradients.
    """
    temperature, softcap = checks.head(temperature, softcap)
    checks.rows(logits, "logits")
    if anchor_logits is not None:
        checks.floating("anchor_logits", anchor_logits)
    tokens = Tokens.of(token_ids, mask, cu_seqlens, logits.shape[:-1], logits.device, "logits")
    checks.same_shape(anchor_logits, "anchor_logits", logits, "logits")
    terms = checks.terms(
        tokens, advantages, anchor_logits is not None, anchor_logprobs, old_logprobs, beta, kl,
        clip_range,
    )  # fmt: skip
    checks.normalizer(normalizer, tokens.mask)
    backend = resolve("loss", backend, logits.device)
    anchor = None if anchor_logits is None else rows_of(anchor_logits.detach())
    if in_place and logits.requires_grad and torch.is_grad_enabled():
        head = (temperature, softcap, exact_kl_of(kl))
        loss, found = loss_in_place(
            logits, anchor, tokens, terms, head, normalizer, return_entropy, backend
        )
        return _in_shape(tokens, loss, found, terms, return_entropy)
    stats = _stats_ops.TOKEN_STATS[backend](
        rows_of(logits),
        tokens.token_ids,
        tokens.mask,
        anchor,
        temperature,
        softcap,
        exact_kl_of(kl),
        return_entropy,
    )
    found = with_given_anchor(Stats(*stats[:4]), terms)
    total = objective(tokens, found, terms)
    loss = total / normalizer_of(tokens, normalizer, total.dtype)
    return _in_shape(tokens, loss, found, terms, return_entropy)


def linear_warp_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    anchor_hidden: Tensor | None = None,
    anchor_weight: Tensor | None = None,
    anchor_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float | Tensor = 0.1,
    kl: Kl = "reward",
    temperature: float = 1.0,
    softcap: float | None = None,
    old_logprobs: Tensor | None = None,
    clip_range: float | tuple[float, float] | None = None,
    normalizer: Normalizer = "sequence",
    return_entropy: bool = False,
    low_memory: bool = False,
    backend: str = "auto",
) -> WarpLoss:
    """`warp_loss` of hidden @ weight.T, without the logits of all rows in memory.

    Args:
        hidden: [B, T, D], or packed [N, D] with cu_seqlens; fp32, bf16, fp16 or fp64.
        weight: [V, D] head weight of the policy.
        anchor_hidden: like hidden, of the anchor; instead of anchor_logprobs. Needed for "reverse"
            and "forward".
        anchor_weight: [V, D] head weight of the anchor; None means the policy's, detached (a frozen
            head).
        low_memory: make the gradients in the backward pass, from logits made again. That is also
            the faster way where a bonus of the per-token values (entropy, say) joins the loss.
        The others: as in `warp_loss`.

    Returns, Raises: as `warp_loss`.

    Traffic: 8 N V D flops with an anchor and both gradients, all in the forward pass: the gradients
        are made while the logits are there, and only scaled in the backward pass. Making the logits
        again costs 2 N V D more: for low_memory, and for "reward" and "reward_to_go" where a
        sequence has more tokens than stay in memory (384 on CPU, 2048 on GPUs). A gradient through
        the per-token values costs 6 N V D. Masked rows cost nothing if the mask is on the CPU; if
        it is on a GPU they are multiplied too, since counting them would wait for the GPU. On CPU
        rows whose coefficient is 0 cost no gradient.
    Memory: beside the gradients, which are in fp32, some logits: 1.5 KiB times V on CPU, 5.5 KiB (7
        for an exact KL) times V on GPUs; with low_memory 16 MiB, and on GPUs, where the gradient of
        weight is then never in fp32 whole, 0.4 GiB for V 256k and D 2304.
        On GPUs fp16 takes a copy of the head in fp32 besides, mixed dtypes one of both heads.
    Numerics: products in fp32, where TF32 is allowed too, so that a KL of 1e-5 nats per token is
        right; the gradient of weight is summed in fp32, and returned so where weight.grad_dtype is
        torch.float32 (a trace does not see it): micro-batches then add up in weight.grad, which may
        be a buffer of the caller's, without a rounding.
        Gradients flow to hidden and weight, each only if it requires one.
    """
    temperature, softcap = checks.head(temperature, softcap)
    checks.linear(hidden, weight, "hidden", "weight")
    tokens = Tokens.of(token_ids, mask, cu_seqlens, hidden.shape[:-1], hidden.device, "hidden")
    checks.same_shape(anchor_hidden, "anchor_hidden", hidden, "hidden", last=False)
    if anchor_hidden is not None:
        anchor_weight = weight if anchor_weight is None else anchor_weight
        checks.linear(anchor_hidden, anchor_weight, "anchor_hidden", "anchor_weight")
        checks.vocabulary(anchor_weight, weight)
    elif anchor_weight is not None:
        raise ValueError("anchor_weight must come with anchor_hidden; it came alone")
    terms = checks.terms(
        tokens, advantages, anchor_hidden is not None, anchor_logprobs, old_logprobs, beta, kl,
        clip_range,
    )  # fmt: skip
    checks.normalizer(normalizer, tokens.mask)
    heads = Heads(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        None if anchor_hidden is None else anchor_hidden.detach().flatten(0, -2),
        None if anchor_weight is None else anchor_weight.detach(),
        temperature,
        softcap,
    )
    make = torch.is_grad_enabled() and not low_memory
    needs = (make and hidden.requires_grad, make and weight.requires_grad)
    call = _loss_ops.Call(heads, tokens, terms, return_entropy, needs)
    op = _loss_ops.LINEAR_LOSS[resolve("linear_loss", backend, hidden.device)]
    total, *stats = op(*call.arguments())
    found = with_given_anchor(Stats(*stats[:4]), terms)
    loss = total / normalizer_of(tokens, normalizer, total.dtype)
    return _in_shape(tokens, loss, found, terms, return_entropy)


def _in_shape(
    tokens: Tokens, loss: Tensor, stats: Stats, terms: checks.Terms, return_entropy: bool
) -> WarpLoss:
    """Everything in the caller's shape."""
    return WarpLoss(
        loss,
        stats.logprobs.view(tokens.shape),
        stats.anchor_logprobs.view(tokens.shape),
        divergence(stats, terms.kl).view(tokens.shape),
        stats.entropy.view(tokens.shape) if return_entropy else None,
    )
