"""Policy-gradient loss from hidden states, forward and backward, beside its peers: time, memory.

    python -m bench.bench_loss [--quick]      pytest bench/bench_loss.py --benchmark-only

Every provider computes loss, gradient of the hidden states and of the head weight of REINFORCE with
the KL to an anchor in the reward, all from fp32 hidden states of policy and anchor. The gate judges
all three against float64 on a small head. Elements are logits, rows outside the mask included.
Where others use the machine too, --threads 1 times the loss and not the waiting of its threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench.harness import Provider, Scale, measure, parse, relative_error
from bench.report import Group, environment, publish
from warp_fast import linear_warp_loss
from warp_fast._backend import MISSING, SERVED

BETA, SEQUENCES = 0.1, 8
OURS, EAGER, COMPILED, TRL = "warp_fast", "torch eager", "torch.compile", "TRL formula, chunked"
_ALLOWED = 1e-4  # of the largest gradient; sums of fp32 products in any order


class Case(NamedTuple):
    """Sizes and the share of tokens outside the mask."""

    tokens: int
    width: int
    vocabulary: int
    masked: float

    def __str__(self) -> str:
        sizes = f"N {self.tokens}, D {self.width}, V {self.vocabulary}"
        return f"{sizes}, {100 * self.masked:.0f} % masked"


GATE = Case(64, 48, 1000, 0.3)
CASES = [
    Case(1024, width, vocabulary, masked)
    for width, vocabulary in [(256, 32_768), (1024, 32_768), (256, 131_072), (1024, 131_072)]
    for masked in (0.0, 0.5)
]
QUICK = [Case(256, 128, 8192, masked) for masked in (0.0, 0.5)]


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

    @staticmethod
    def of(case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
        """A peaked policy and an anchor near it; the same numbers in any dtype."""
        make = torch.Generator().manual_seed(0)
        shape = SEQUENCES, case.tokens // SEQUENCES
        hidden = torch.randn(*shape, case.width, generator=make)
        weight = torch.randn(case.vocabulary, case.width, generator=make) * 3 / case.width**0.5
        return Batch(
            hidden.to(device, dtype).requires_grad_(),
            weight.to(device, dtype).requires_grad_(),
            (hidden * 1.01).to(device, dtype),
            weight.mul(0.99).to(device, dtype),
            torch.randint(0, case.vocabulary, shape, generator=make).to(device),
            torch.randn(SEQUENCES, generator=make).to(device),
            (torch.rand(shape, generator=make) >= case.masked).to(device),
        )


Loss = Callable[[Batch], Tensor]
Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]


def warp(batch: Batch, backend: str = "auto") -> Tensor:
    return linear_warp_loss(
        batch.hidden,
        batch.weight,
        batch.token_ids,
        batch.advantages,
        anchor_hidden=batch.anchor_hidden,
        anchor_weight=batch.anchor_weight,
        mask=batch.mask,
        beta=BETA,
        backend=backend,
    ).loss


def reinforce(batch: Batch, logprobs: Logprobs) -> Tensor:
    """The same loss from any function that gives log-probabilities of all tokens."""
    logp = logprobs(batch.hidden, batch.weight, batch.token_ids) * batch.mask
    with torch.no_grad():
        anchor = logprobs(batch.anchor_hidden, batch.anchor_weight, batch.token_ids) * batch.mask
        weights = batch.advantages[:, None] - BETA * (logp - anchor).sum(1, keepdim=True)
    return -(weights * logp).sum() / SEQUENCES


def full_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    logp = torch.log_softmax(hidden @ weight.T, -1)
    return logp.gather(-1, token_ids[..., None])[..., 0]


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
        top = states.new_full(ids.shape, -torch.inf)
        total, target = torch.zeros_like(top), torch.zeros_like(top)
        for rows, columns in ChunkedLogprobs.tiles(states, weight):
            logits = states[rows] @ weight[columns].T
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
            logits = states[rows] @ weight[columns].T
            dlogits = -torch.exp(logits - lse[rows, None]) * upstream[rows, None]
            at = ids[rows] - columns.start
            here = ((at >= 0) & (at < logits.shape[1])).nonzero()[:, 0]
            dlogits[here, at[here]] += upstream[rows][here]
            dstates[rows] += dlogits @ weight[columns]
            dweight[columns] += dlogits.T @ states[rows]
        return dstates.view_as(hidden), dweight, None


def chunked_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    found: Tensor = ChunkedLogprobs.apply(hidden, weight, token_ids)  # type: ignore[no-untyped-call]
    return found


def losses(device: torch.device) -> dict[str, Loss]:
    """Providers by name, ours first."""
    eager = partial(reinforce, logprobs=full_logprobs)
    compiled: Any = torch.compile(full_logprobs, dynamic=False)
    ours = {f"{OURS}, {b}": partial(warp, backend=b) for b in _backends(device)}
    return {
        **ours,
        TRL: partial(reinforce, logprobs=chunked_logprobs),
        COMPILED: partial(reinforce, logprobs=compiled),
        EAGER: eager,
    }


def _backends(device: torch.device) -> list[str]:
    """What serves a device at speed: not the interpreter of Triton."""
    served = [b for b in SERVED["linear_loss"][device.type] if MISSING[b] is None]
    return [b for b in served if device.type == "cuda" or b != "triton"]


def step(loss: Loss, batch: Batch) -> list[Tensor]:
    """Loss and gradients."""
    found = loss(batch)
    torch.autograd.backward(found)
    assert batch.hidden.grad is not None and batch.weight.grad is not None
    return [found.detach(), batch.hidden.grad, batch.weight.grad]


def loss_error(loss: Loss, device: torch.device) -> float:
    """The largest relative error of loss and gradients, on the case of the gate."""
    gold = step(partial(reinforce, logprobs=full_logprobs), Batch.of(GATE, device, torch.float64))
    ours = step(loss, Batch.of(GATE, device))
    return max(relative_error([a], [b]) for a, b in zip(ours, gold, strict=True))


def loss_bytes(case: Case) -> int:
    """Both weights in the forward pass, one again in the backward pass, and its gradient."""
    return 4 * 4 * case.vocabulary * case.width


def provider(name: str, loss: Loss, case: Case, batch: Batch) -> Provider:
    def forget() -> None:
        batch.hidden.grad = batch.weight.grad = None

    return Provider(
        name,
        lambda: step(loss, batch),
        lambda: loss_error(loss, batch.hidden.device),
        _ALLOWED,
        case.tokens * case.vocabulary,
        loss_bytes(case),
        ours=name.startswith(OURS),
        prepare=forget,
    )


def compare(case: Case, device: torch.device, scale: Scale) -> Group:
    batch = Batch.of(case, device)
    providers = [provider(name, loss, case, batch) for name, loss in losses(device).items()]
    results = measure(providers, device, scale)
    return Group(f"linear_warp_loss, {case}", results, [], "probe: update", TRL)


@pytest.mark.parametrize("name", [OURS, TRL, EAGER])
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_linear_warp_loss(
    name: str, case: Case, timed: Callable[[str, Callable[[torch.device], Provider]], None]
) -> None:
    def build(device: torch.device) -> Provider:
        loss = warp if name == OURS else losses(device)[name]
        return provider(name, loss, case, Batch.of(case, device))

    timed(f"linear_warp_loss, {case}", build)


def main(given: Sequence[str] | None = None) -> None:
    options = parse(__doc__ or "", given)
    stamp = environment(options.device)
    cases = QUICK if options.quick else CASES
    groups = [compare(case, options.device, options.scale) for case in cases]
    publish("loss", groups, stamp, options)


if __name__ == "__main__":
    main()
