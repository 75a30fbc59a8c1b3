"""Policy-gradient loss from logits, forward and backward, beside its peers: time, memory.

    python -m bench.bench_logits [--quick]      pytest bench/bench_logits.py --benchmark-only

Every provider computes the loss and the gradient of bf16 logits [B, T, V] with the logits of an
anchor beside them: REINFORCE with the KL in the reward, or with the exact reverse KL. The gate
judges both against float64. `GB/s` counts what nobody can do without: one read of policy and anchor
and one write of the gradient, 6 bytes per logit; `of floor` is the time of that at the bandwidth of
the probes, over the time. With the KL in the reward it is 0.75 at most: a coefficient needs the
whole sequence, and so the logits a second read. `in_place` writes the gradient over the logits,
which are made anew before each run, untimed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch
from torch import Tensor

from bench.harness import Absent, Provider, Scale, backends, measure, parse, relative_error
from bench.peers import missing
from bench.peers_loss import BETA, COMPILED, EAGER, log_softmax
from bench.report import Group, environment, publish
from warp_fast import warp_loss

OURS = "warp_fast"
SEQUENCES = 4
_ALLOWED = 2.0**-6  # of the largest gradient, which is rounded to bf16, by eager twice


class Case(NamedTuple):
    kl: str
    tokens: int
    vocabulary: int

    def __str__(self) -> str:
        return f"kl {self.kl}, N {self.tokens}, V {self.vocabulary}"


KLS = ("reward", "reverse")
GATE = (64, 1000)
QUICK = [Case(kl, 256, 8192) for kl in KLS]
ON_CPU = [Case(kl, 512, vocabulary) for kl in KLS for vocabulary in (32_768, 262_144)]
ON_GPU = [
    Case(kl, tokens, vocabulary)
    for kl in KLS
    for vocabulary in (256_128, 262_144)
    for tokens in (1024, 8192)
]


@dataclass
class Batch:
    """start keeps what a loss in place writes over."""

    start: Tensor
    logits: Tensor
    anchor: Tensor
    token_ids: Tensor
    advantages: Tensor
    kl: str


# (logits, batch) -> the loss
Loss: TypeAlias = Callable[[Tensor, Batch], Tensor]


def batch_of(
    kl: str, tokens: int, vocabulary: int, device: torch.device, exact: bool = False
) -> Batch:
    """A peaked policy and an anchor near it; `exact` gives the same numbers in float64.

    The tokens are likely, as if sampled: half of them have a probability of 0.8 and more.
    """
    make: Any = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    shape = SEQUENCES, tokens // SEQUENCES
    ids = torch.randint(0, vocabulary, shape, **make)
    start = torch.randn(*shape, vocabulary, **make).mul_(3)
    # e to the others sums to V e^4.5
    likely = 3 * torch.randn(*shape, 1, **make) + math.log(vocabulary) + 6
    start = start.scatter_(-1, ids[..., None], likely).bfloat16()
    anchor = torch.randn(start.shape, **make).mul_(0.5).add_(start).bfloat16()
    start, anchor = (x.to(torch.float64 if exact else x.dtype) for x in (start, anchor))
    advantages = torch.randn(SEQUENCES, **make)
    logits = start.clone().requires_grad_() * 1  # no leaf: such a one cannot be written in place
    return Batch(start, logits, anchor, ids, advantages, kl)


def warp(logits: Tensor, batch: Batch, backend: str = "auto", in_place: bool = False) -> Tensor:
    kl: Any = batch.kl
    return warp_loss(
        logits,
        batch.token_ids,
        batch.advantages,
        anchor_logits=batch.anchor,
        kl=kl,
        beta=BETA,
        in_place=in_place,
        backend=backend,
    ).loss


def reinforce(logp: Tensor, logq: Tensor, batch: Batch) -> Tensor:
    """The loss with the KL in the reward, from log-probabilities [B, T] of policy and anchor."""
    penalty = (logp.detach() - logq).sum(1, keepdim=True)
    return -((batch.advantages[:, None] - BETA * penalty) * logp).sum() / SEQUENCES


def plain(logits: Tensor, batch: Batch) -> Tensor:
    ids = batch.token_ids[..., None]
    logp, logq = log_softmax(logits), log_softmax(batch.anchor)
    picked = logp.gather(-1, ids)[..., 0]
    if batch.kl == "reverse":
        divergence = (logp.exp() * (logp - logq)).sum(-1)
        return (BETA * divergence - batch.advantages[:, None] * picked).sum() / SEQUENCES
    return reinforce(picked, logq.gather(-1, ids)[..., 0], batch)


def trl(logits: Tensor, batch: Batch) -> Tensor:
    """Its log-probabilities of the sampled tokens, of policy and anchor; it has no exact KL."""
    from trl.trainer.utils import selective_log_softmax

    if batch.kl != "reward":
        raise NotImplementedError("has no exact KL")
    logp, logq = (selective_log_softmax(x, batch.token_ids) for x in (logits, batch.anchor))
    return reinforce(logp, logq, batch)


def losses(device: torch.device) -> tuple[dict[str, Loss], list[Absent]]:
    """Providers by name, ours first, and who is absent."""
    found: dict[str, Loss] = {}
    for backend in backends("loss", device):
        found[f"{OURS}, {backend}"] = partial(warp, backend=backend)
        found[f"{OURS}, {backend}, in_place"] = partial(warp, backend=backend, in_place=True)
    compiled: Any = torch.compile(plain, dynamic=False)
    why = missing("trl")
    if why is None:
        found["TRL's selective_log_softmax"] = trl
    absent = [] if why is None else [Absent("TRL's selective_log_softmax", why)]
    return {**found, COMPILED: compiled, EAGER: plain}, absent


def step(loss: Loss, batch: Batch) -> list[Tensor]:
    """Loss and gradient."""
    found = loss(batch.logits, batch)
    return [found.detach(), *torch.autograd.grad(found, batch.logits)]


def loss_error(loss: Loss, kl: str, device: torch.device) -> float:
    """The largest relative error of loss and gradient, on a small batch."""
    gold = step(plain, batch_of(kl, *GATE, device, exact=True))
    ours = step(loss, batch_of(kl, *GATE, device))
    return max(relative_error([a], [b]) for a, b in zip(ours, gold, strict=True))


def provider(name: str, loss: Loss, case: Case, batch: Batch) -> Provider:
    return Provider(
        name,
        lambda: step(loss, batch),
        lambda: loss_error(loss, case.kl, batch.start.device),
        _ALLOWED,
        case.tokens * case.vocabulary,
        3 * batch.start.nbytes,
        ours=name.startswith(OURS),
        prepare=lambda: batch.logits.data.copy_(batch.start),
        read_bytes=2 * batch.start.nbytes,
    )


def compare(case: Case, device: torch.device, scale: Scale) -> Group:
    """All who are here, in one run."""
    torch.compiler.reset()
    batch = batch_of(*case, device)
    everyone, absent = losses(device)
    results = measure(
        [provider(n, loss, case, batch) for n, loss in everyone.items()], device, scale
    )
    return Group(f"warp_loss, {case}, bfloat16", results, absent, "probe: update", EAGER)


@pytest.mark.parametrize("name", [OURS, EAGER])
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_warp_loss(
    name: str, case: Case, timed: Callable[[str, Callable[[torch.device], Provider]], None]
) -> None:
    def build(device: torch.device) -> Provider:
        return provider(name, warp if name == OURS else plain, case, batch_of(*case, device))

    timed(f"warp_loss, {case}", build)


def main(given: Sequence[str] | None = None) -> None:
    options = parse(__doc__ or "", given)
    stamp = environment(options.device)
    cases = QUICK if options.quick else ON_GPU if options.device.type == "cuda" else ON_CPU
    chosen = options.chosen(cases)
    groups = (compare(case, options.device, options.scale) for case in chosen)
    publish("logits", groups, stamp, options)


if __name__ == "__main__":
    main()
