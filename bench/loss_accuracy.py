"""How right a head is near its anchor: log-prob, KL and its gradients from bf16 hidden states.

A policy and its slow EMA differ by 1e-5 to 1e-3 nats a token, less than a logit loses when it is
rounded to bf16. All get the same bf16 hidden states and weight; gold is float64 of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.harness import Provider, gate
from bench.peers_loss import EAGER, Logprobs, full_logprobs, peers
from bench.report import Group
from warp_fast import linear_token_logprobs, linear_warp_loss
from warp_fast.loss import Kl

ROWS, WIDTH, VOCABULARY = 256, 64, 4096
# (ulps, share of the entries) that the anchor's hidden states are away: KLs of 1e-5, 1e-4 and 1e-3
NEAR = [(1, 0.08), (2, 0.2), (4, 0.6)]
_NUMBER = "{:.2g}"


@dataclass
class Near:
    """bf16 hidden states [1, N, D] of policy and anchor under one head; ids sampled from it."""

    hidden: Tensor
    anchor: Tensor
    weight: Tensor
    token_ids: Tensor

    @staticmethod
    def of(ulps: int, share: float, device: torch.device) -> Near:
        make = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, ROWS, WIDTH, generator=make).bfloat16()
        moved = (torch.rand(hidden.shape, generator=make) < share).short() * ulps
        anchor = (hidden.view(torch.int16) + moved).view(torch.bfloat16)
        weight = (torch.randn(VOCABULARY, WIDTH, generator=make) * 3 / WIDTH**0.5).bfloat16()
        p = (hidden[0].double() @ weight.double().T).softmax(-1)
        ids = torch.multinomial(p, 1, generator=make).T
        return Near(hidden.to(device), anchor.to(device), weight.to(device), ids.to(device))

    def leaf(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return self.hidden.to(dtype, copy=True).requires_grad_()

    def kept(self) -> Tensor:
        return torch.ones_like(self.token_ids, dtype=torch.bool)


Found = dict[str, Tensor]  # what a provider gives, under the name of its column


def exact_kl(near: Near, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(reverse KL per token, its gradient) from logits in `dtype`, the rest in fp32 or better."""
    hidden, weight = near.leaf(dtype), near.weight.to(dtype)
    fine = torch.promote_types(dtype, torch.float32)
    logp, logq = (
        torch.log_softmax((x @ weight.T).to(fine), -1) for x in (hidden, near.anchor.to(dtype))
    )
    kl = (logp.exp() * (logp - logq)).sum(-1)
    return kl.detach(), torch.autograd.grad(kl.sum(), hidden)[0]


def of_logprobs(near: Near, logprobs: Logprobs, dtype: torch.dtype = torch.bfloat16) -> Found:
    """log pi, d and the gradient of d^2 / 2 from any function that gives log-probabilities."""
    hidden, weight = near.leaf(dtype), near.weight.to(dtype, copy=True).requires_grad_()
    logp = logprobs(hidden, weight, near.token_ids, near.kept())
    with torch.no_grad():
        anchor = logprobs(near.anchor.to(dtype), weight, near.token_ids, near.kept())
    d = logp - anchor
    (slope,) = torch.autograd.grad((d.square() / 2).sum(), hidden)
    return {"log-prob": logp.detach(), "d": d.detach(), "k2 slope": slope}


def of_eager(near: Near, dtype: torch.dtype = torch.bfloat16) -> Found:
    kl, slope = exact_kl(near, dtype)
    return {**of_logprobs(near, full_logprobs, dtype), "KL": kl, "KL slope": slope}


def of_ours(near: Near, backend: str) -> Found:
    found: Found = {}
    kinds: list[tuple[Kl, str, str]] = [("k2", "", "k2 slope"), ("reverse", "KL", "KL slope")]
    for kl, value, slope in kinds:
        hidden = near.leaf()
        result = linear_warp_loss(
            hidden,
            near.weight,
            near.token_ids,
            torch.zeros(1, device=hidden.device),
            anchor_hidden=near.anchor,
            beta=1.0,
            kl=kl,
            backend=backend,
        )
        found[slope] = torch.autograd.grad(result.loss, hidden)[0]
        if value:
            found[value] = result.kl.detach()
    sampled = [
        linear_token_logprobs(x, near.weight, near.token_ids, backend=backend)
        for x in (near.hidden, near.anchor)
    ]
    return {**found, "log-prob": sampled[0], "d": sampled[0] - sampled[1]}


def _off(name: str, found: Tensor, gold: Tensor) -> str:
    """Nats for log-probs, percent of the whole for all else."""
    error = found.double() - gold
    if name == "log-prob":
        return _NUMBER.format(float(error.abs().max()))
    return _NUMBER.format(100 * float(error.norm() / gold.norm()))


def _row(name: str, make: Callable[[], Found], gold: Found, ours: bool) -> Provider:
    """A provider that is judged and not timed: its columns are its errors."""
    shown: dict[str, str] = {}

    def error() -> float:
        found = make()
        for key in gold:
            unit = "nats" if key == "log-prob" else "%"
            shown[f"{key} off, {unit}"] = _off(key, found[key], gold[key]) if key in found else ""
        return float((found["log-prob"].double() - gold["log-prob"]).abs().max())

    return Provider(name, lambda: None, error, math.inf, ROWS, 0, shown, ours)


def accuracy(device: torch.device, backends: Sequence[str]) -> Iterator[Group]:
    """A table for each distance; "KL" is the exact reverse KL, "slope" the gradient of hidden."""
    torch.compiler.reset()
    able, absent = peers()
    for ulps, share in NEAR:
        near = Near.of(ulps, share, device)
        gold = of_eager(near, torch.float64)
        rows = [
            _row(f"warp_fast, {name}", partial(of_ours, near, name), gold, True)
            for name in backends
        ]
        fine = partial(of_eager, near, torch.float32)
        rows.append(_row(f"{EAGER}, inputs upcast to fp32", fine, gold, False))
        for peer in able:
            make = partial(of_logprobs, near, peer.logprobs)
            if peer.name == EAGER:
                make = partial(of_eager, near)
            rows.append(_row(f"{peer.name}, bf16", make, gold, False))
        title = f"near the anchor: KL {float(gold['KL'].mean()):.1e} nats a token, bf16 inputs"
        yield Group(title, [gate(row) for row in rows], absent, "", "")
