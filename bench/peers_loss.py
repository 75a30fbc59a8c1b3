"""Other people's heads for the policy-gradient loss, by name; packages are imported when asked for.

Each computes REINFORCE with the KL to an anchor in the reward from hidden states. None does policy,
anchor and KL in one call, so each is composed of its own as its users would: log-probabilities of
the policy with gradients, those of the anchor without, and `reinforce` of them. Checked with trl
1.16.0, liger-kernel 0.8.5, verl 0.9.1, cut-cross-entropy 25.1.1, torch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Absent
from bench.peers import missing

BETA, IGNORED = 0.1, -100
EAGER, COMPILED, FORMULA = "torch eager", "torch.compile", "TRL formula, chunked"


@dataclass
class Batch:
    """Arguments of a loss; gradients flow to hidden [B, T, D] and weight [V, D]."""

    hidden: Tensor
    weight: Tensor
    anchor_hidden: Tensor
    anchor_weight: Tensor
    token_ids: Tensor
    advantages: Tensor
    mask: Tensor
    mask_on_host: Tensor


Loss = Callable[[Batch], Tensor]
# (hidden [B, T, D], weight [V, D], token_ids [B, T], mask [B, T]) -> [B, T], anything where masked
Logprobs = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LossPeer:
    """logprobs is what it is composed of; `there` says why it is absent, or None."""

    name: str
    logprobs: Logprobs
    loss: Loss
    there: Callable[[], str | None] = lambda: None


def coefficients(batch: Batch, logp: Tensor, logprobs: Logprobs) -> Tensor:
    """[B, 1]: A_i - beta sum_t d_t, from log-probabilities that are 0 where masked."""
    with torch.no_grad():
        anchor = logprobs(batch.anchor_hidden, batch.anchor_weight, batch.token_ids, batch.mask)
        penalty = (logp - torch.where(batch.mask, anchor, 0)).sum(1)
        return (batch.advantages - BETA * penalty)[:, None]


def reinforce(batch: Batch, logprobs: Logprobs) -> Tensor:
    """The loss from any function that gives log-probabilities of all tokens."""
    found = logprobs(batch.hidden, batch.weight, batch.token_ids, batch.mask)
    logp = torch.where(batch.mask, found, 0)
    return -(coefficients(batch, logp, logprobs) * logp).sum() / len(logp)


def log_softmax(logits: Tensor) -> Tensor:
    """In fp32 or better, as trainers have it."""
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


def full_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
    """All logits in the dtype of the inputs, the rest in fp32 or better, as transformers has it."""
    return log_softmax(hidden @ weight.T).gather(-1, token_ids[..., None])[..., 0]


# https://github.com/huggingface/trl/blob/main/trl/trainer/utils.py, _ChunkedLogProbFunction: tiles
# of tokens by vocabulary, a running logsumexp, the logits again in backward; without its entropy
class ChunkedLogprobs(torch.autograd.Function):
    TOKENS, COLUMNS = 2048, 8192

    @staticmethod
    def tiles(states: Tensor, weight: Tensor) -> list[tuple[slice, slice]]:
        tokens, columns = ChunkedLogprobs.TOKENS, ChunkedLogprobs.COLUMNS
        return [
            (slice(n, n + tokens), slice(v, min(v + columns, len(weight))))
            for n in range(0, len(states), tokens)
            for v in range(0, len(weight), columns)
        ]

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
        states, ids = hidden.flatten(0, 1), token_ids.flatten()
        top = torch.full(ids.shape, -torch.inf, device=ids.device)
        total, target = torch.zeros_like(top), torch.zeros_like(top)
        for rows, columns in ChunkedLogprobs.tiles(states, weight):
            logits = (states[rows] @ weight[columns].T).float()
            raised = torch.maximum(top[rows], logits.amax(-1))
            kept = total[rows] * torch.exp(top[rows] - raised)
            total[rows] = kept + torch.exp(logits - raised[:, None]).sum(-1)
            top[rows] = raised
            at = ids[rows] - columns.start
            here = (at >= 0) & (at < logits.shape[1])
            picked = logits.gather(1, at.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
            target[rows] = torch.where(here, picked, target[rows])
        lse = top + total.log()
        ctx.save_for_backward(hidden, weight, token_ids, lse)
        return (target - lse).view(token_ids.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, token_ids, lse = ctx.saved_tensors
        states, ids, upstream = hidden.flatten(0, 1), token_ids.flatten(), gradients[0].flatten()
        dstates, dweight = torch.zeros_like(states), torch.zeros_like(weight)
        for rows, columns in ChunkedLogprobs.tiles(states, weight):
            logits = (states[rows] @ weight[columns].T).float()
            dlogits = -torch.exp(logits - lse[rows, None]) * upstream[rows, None]
            at = ids[rows] - columns.start
            here = ((at >= 0) & (at < logits.shape[1])).nonzero()[:, 0]
            dlogits[here, at[here]] += upstream[rows][here]
            dlogits = dlogits.to(weight.dtype)
            dstates[rows] += dlogits @ weight[columns]
            dweight[columns] += dlogits.T @ states[rows]
        return dstates.view_as(hidden), dweight, None


def formula_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
    found: Tensor = ChunkedLogprobs.apply(hidden, weight, token_ids)  # type: ignore[no-untyped-call]
    return found


def trl_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
    """What its fused_lm_head does: on GPUs the rows of the mask alone, elsewhere all of them."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as WIDTH

    rows, ids = hidden.flatten(0, 1), token_ids.flatten()
    if hidden.is_cuda:
        rows, ids = hidden[mask], token_ids[mask]
    found: Tensor
    found, *_ = ChunkedLogProbFunction.apply(rows, weight, None, ids, 1.0, WIDTH, None, 1.0, ())
    if hidden.is_cuda:
        return found.new_zeros(mask.shape).masked_scatter(mask, found)
    return found.view(mask.shape)


def verl_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
    """Its Triton kernels on GPUs, its chunks of rows elsewhere; both give the entropy as well."""
    rows, ids = hidden.flatten(0, 1), token_ids.flatten()
    found: Tensor
    if hidden.is_cuda:
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

        found, _ = linear_cross_entropy(rows, weight, ids, 1.0, "none")
    else:
        from verl.utils.experimental.torch_functional import FusedLinearForPPO

        found, _ = FusedLinearForPPO()(rows, weight, ids)
    return found.view(mask.shape)


def cut_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
    """Its cross entropy of each token, negated; its Triton kernels need a GPU."""
    from cut_cross_entropy import linear_cross_entropy

    targets = token_ids.masked_fill(~mask, IGNORED)
    impl = "cce" if hidden.is_cuda else "torch_compile"
    loss: Tensor = linear_cross_entropy(hidden, weight, targets, reduction="none", impl=impl)
    return -loss


def torch_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
    """Its chunked path; gradients of a chunk are made in the forward pass.

    Of 256 rows: its own choice takes 31 s at N 1024, D 256, V 65536, and 128 or 1024 rows 1.3 s (a
    call with its backward, two cores of an AMD EPYC, torch 2.13, 2026-11-24).
    """
    nn: Any = torch.nn
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=256)
    targets = token_ids.masked_fill(~mask, IGNORED).flatten()
    loss: Tensor = nn.functional.linear_cross_entropy(
        hidden.flatten(0, 1), weight, targets, reduction="none", options=options
    )
    return -loss.view(mask.shape)


def liger_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    found: Tensor = LigerFusedLinearPPOBase.chunk_forward(hidden, weight, token_ids)
    return found


def liger_loss(batch: Batch) -> Tensor:
    """Its log-probabilities give the coefficients, which its GRPO loss then takes as advantages.

    Its penalty is k3 alone, so beta is 0 there. dr_grpo of one token a completion divides by B. The
    value of its loss is that of a ratio of 1; here it is replaced by the one of the log-probs.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    with torch.no_grad():
        found = liger_logprobs(batch.hidden, batch.weight, batch.token_ids, batch.mask)
        logp = torch.where(batch.mask, found, 0)
        weights = coefficients(batch, logp, liger_logprobs)
        value = -(weights * logp).sum() / len(logp)
    grpo: Any = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="dr_grpo", max_completion_length=1
    )
    loss: Tensor = grpo(
        batch.hidden, batch.weight, batch.token_ids, batch.mask.float(), weights[:, 0]
    )[0]
    return loss + (value - loss.detach())


def _no_linear_cross_entropy() -> str | None:
    return None if hasattr(torch.nn, "LinearCrossEntropyOptions") else "needs torch >= 2.13"


def _composed(
    name: str, logprobs: Logprobs, there: Callable[[], str | None] = lambda: None
) -> LossPeer:
    return LossPeer(name, logprobs, partial(reinforce, logprobs=logprobs), there)


def peers() -> tuple[list[LossPeer], list[Absent]]:
    """Those that are here, and why the others are not; a refusal of theirs is told by the gate."""
    compiled: Any = torch.compile(full_logprobs, dynamic=False)
    every = [
        _composed(FORMULA, formula_logprobs),
        _composed("TRL's chunked head, called twice", trl_logprobs, partial(missing, "trl")),
        LossPeer(
            "Liger log-probs and GRPO loss",
            liger_logprobs,
            liger_loss,
            partial(missing, "liger-kernel"),
        ),
        _composed("verl's fused linear head", verl_logprobs, partial(missing, "verl")),
        _composed(
            "cut-cross-entropy as log-probs", cut_logprobs, partial(missing, "cut-cross-entropy")
        ),
        _composed("F.linear_cross_entropy as log-probs", torch_logprobs, _no_linear_cross_entropy),
        _composed(COMPILED, compiled),
        _composed(EAGER, full_logprobs),
    ]
    absent = [Absent(peer.name, why) for peer in every if (why := peer.there()) is not None]
    return [peer for peer in every if peer.there() is None], absent
