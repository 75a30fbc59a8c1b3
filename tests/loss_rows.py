"""Rows for the tests of the kernels of the loss on GPUs, and their float64 oracle.

On CUDA tensors where there is a GPU, else on CPU tensors under the interpreter of Triton.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tolerances import assert_close, largest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it once, at the import below
pytest.importorskip("triton", reason="the package triton is not installed")
kernels: Any = importlib.import_module("warp_fast.kernels.loss")
linear: Any = importlib.import_module("warp_fast.kernels.linear_loss")
if DEVICE == "cpu" and type(kernels.sums_kernel).__name__ != "InterpretedFunction":
    raise RuntimeError("something imported triton before this file set TRITON_INTERPRET=1")

FP32, FP64 = torch.float32, torch.float64
INF = float("inf")
PLAIN = (1.0, None)
NAMES = ("logprobs", "entropy", "anchor logprobs", "kl")

Head = tuple[float, float | None]
Leaves = list[Tensor]
NO_ANCHOR: list[Any] = [None, None]


def expectation(logp: Tensor, values: Tensor) -> Tensor:
    """sum p x, where a token without probability counts nothing."""
    return torch.where(logp == -INF, 0, logp.exp() * values).sum(-1)


def naive(
    leaves: Leaves, anchor: Leaves, ids: Tensor, mask: Tensor, head: Head, kl: str
) -> list[Tensor]:
    """The four statistics as their definitions have them, in the dtype of the leaves."""

    def log_softmax(given: Leaves) -> Tensor:
        z = given[0] if len(given) == 1 else given[0] @ given[1].T
        temperature, softcap = head
        u = z if softcap is None else softcap * torch.tanh(z / softcap)
        return torch.log_softmax(u / temperature, -1)

    def at(logp: Tensor) -> Tensor:
        return logp.gather(1, ids[:, None])[:, 0]

    logp = log_softmax(leaves)
    zero = torch.zeros_like(logp[:, 0])
    found = [at(logp), -expectation(logp, logp.masked_fill(logp == -INF, 0)), zero, zero]
    if anchor:
        logq = log_softmax(anchor)
        found[2] = at(logq)
        p, q = (logp, logq) if kl == "reverse" else (logq, logp)
        found[3] = expectation(p, (p - q).masked_fill(p == -INF, 0)) if kl else zero
    return [torch.where(mask, values, 0) for values in found]


def naive_gradients(
    leaves: Leaves, anchor: Leaves, upstream: Tensor, rest: tuple[Any, ...], dtype: torch.dtype
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """(statistics, gradients of upstream . (logprobs, entropy, kl)) in `dtype`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    values = naive(leaves, [x.to(dtype) for x in anchor], *rest)
    total = sum((values[k] * upstream[:, i].to(dtype)).sum() for i, k in enumerate((0, 1, 3)))
    assert isinstance(total, Tensor)
    return [x.detach() for x in values], torch.autograd.grad(total, leaves)


def forward(
    leaves: Leaves, anchor: Leaves, ids: Tensor, mask: Tensor, head: Head, kl: str
) -> list[Tensor]:
    """The four statistics and the state for the gradient."""
    if len(leaves) == 1:
        arguments = (*leaves, ids, mask, *(anchor or NO_ANCHOR[:1]), *head, kl, True)
        return list(kernels.token_stats_triton(*arguments))
    heads = linear.Heads(*leaves, *(anchor or NO_ANCHOR), *head)
    return list(linear.linear_token_stats_triton(heads, ids, mask, kl, True))


def backward(
    leaves: Leaves,
    anchor: Leaves,
    upstream: Tensor,
    ids: Tensor,
    head: Head,
    kl: str,
    state: Tensor | None = None,
) -> Sequence[Tensor]:
    if len(leaves) == 1:
        arguments = (upstream, *leaves, ids, *(anchor or NO_ANCHOR[:1]), *head, kl, state)
        return [kernels.token_stats_backward_triton(*arguments)]
    heads = linear.Heads(*leaves, *(anchor or NO_ANCHOR), *head)
    arguments = (upstream, heads, ids, kl, (True, True), state)
    found: Sequence[Tensor] = linear.linear_token_stats_backward_triton(*arguments)
    return found


def check(
    leaves: Leaves,
    anchor: Leaves,
    ids: Tensor,
    mask: Tensor | None = None,
    head: Head = PLAIN,
    kl: str = "",
    forward: Callable[..., list[Tensor]] = forward,
    backward: Callable[..., Sequence[Tensor]] = backward,
) -> None:
    """Statistics and gradients of random upstream, each with its dtype, against float64."""
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    *found, state = forward(leaves, anchor, ids, mask, head, kl)
    fine = found[0].dtype
    upstream = torch.randn(len(ids), 3, dtype=fine, device=DEVICE) * mask[:, None]
    upstream[:, 2] *= bool(kl)
    rest = (ids, mask, head, kl)
    gold, gold_gradients = naive_gradients(leaves, anchor, upstream, rest, FP64)
    eager, _ = naive_gradients(leaves, anchor, upstream, rest, fine)
    _, eager_gradients = naive_gradients(leaves, anchor, upstream, rest, leaves[0].dtype)
    finite = [x[x.isfinite()] for x in leaves[:1]]
    # a score as large as the largest logit is rounded once
    scale = 1 + max(largest(x) for x in (gold[0], gold[2], *finite))
    assert (found[0] <= 0).all() and (found[1] >= 0).all() and (found[3] >= 0).all()
    for name, a, b, c in zip(NAMES, found, gold, eager, strict=True):
        assert_close(name, a, b, c, scale)
    gradients = backward(leaves, anchor, upstream, ids, head, kl, state)
    for i, (a, b, c) in enumerate(zip(gradients, gold_gradients, eager_gradients, strict=True)):
        assert a.dtype == (leaves[i].dtype if len(leaves) == 1 else fine)
        a = a.to(leaves[i].dtype)
        # float64 is no better than itself: by as much a rounded score moves a probability
        assert_close(f"gradient {i}", a, b, c, largest(b) * (scale if fine == FP64 else 1))


def problem(
    form: str, rows: int, size: int, dtype: torch.dtype = FP32, kl: str | None = ""
) -> tuple[Leaves, Leaves, Tensor]:
    """(policy, anchor near it, ids); without an anchor where kl is None."""
    if form == "logits":
        exact = [torch.randn(rows, size) * 3]
    else:
        exact = [torch.randn(rows, 6), torch.randn(size, 6) * 1.5]
    anchor = [x + 0.1 * torch.randn_like(x) for x in exact]
    leaves, near = ([x.to(dtype).to(DEVICE) for x in given] for given in (exact, anchor))
    return leaves, [] if kl is None else near, torch.randint(0, size, (rows,), device=DEVICE)


def some_mask(rows: int) -> Tensor:
    return (torch.arange(rows) % 3 != 1).to(DEVICE)


def check_scaling(scale: Callable[[Tensor, Tensor], None], dtype: torch.dtype) -> None:
    """By 1 and by less, of rows that are whole, cut out of a wider matrix, not contiguous, none."""
    (wide,), _, _ = problem("logits", 3, 70, dtype)
    for factor in (1.0, 0.3):
        by = torch.tensor(factor, dtype=FP64 if dtype == FP64 else FP32, device=DEVICE)
        for values in (wide.clone(), wide.clone()[:, 1:64], wide.T.contiguous().T, wide[:0]):
            expected = (values.to(by.dtype) * by).to(dtype)
            scale(values, by)
            assert torch.equal(values, expected)


def check_a_constant_apart(forward: Callable[..., list[Tensor]], kl: str) -> None:
    """KLs of 1e-10 nats, of a token of probability 1: the constant is no part of them."""
    for constant in (100.3, 3000.7):
        (logits,), _, ids = problem("logits", 2, 50, FP32)
        logits[torch.arange(2), ids] += 25
        anchor = logits + 0.01 * torch.randn(2, 50, device=DEVICE) + constant
        given: list[Any] = [ids, torch.ones(2, dtype=torch.bool, device=DEVICE), PLAIN, kl]
        gold = naive([logits.double()], [anchor.double()], *given)[3]
        assert largest(forward([logits], [anchor], *given)[3].double() - gold) < 1e-7
