"""`warp_loss(in_place=True)`: the same loss and gradient, in the memory of the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import warp_fast
from tests.tolerances import assert_close
from warp_fast import _loss_ops, _stats_ops
from warp_fast._backend import able

BACKENDS = able("loss", "cpu")
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
B, T, V = 2, 3, 50

served = pytest.mark.parametrize("backend", BACKENDS)
every_kl = pytest.mark.parametrize(
    "kl", ["reward", "reward_to_go", "k2", "k3", "reverse", "forward", "none"]
)


class Problem:
    """A head that makes logits, and the other arguments of the loss."""

    def __init__(self, dtype: torch.dtype = FP32) -> None:
        self.hidden = torch.randn(B, T, 6, dtype=FP64).to(dtype)
        self.weight = torch.randn(V, 6, dtype=FP64).to(dtype).requires_grad_()
        self.anchor = (torch.randn(B, T, V, dtype=FP64) * 3).to(dtype)
        self.ids, self.advantages = torch.randint(0, V, (B, T)), torch.randn(B)
        self.seen: list[Tensor] = []  # logits, then their gradient

    def loss(self, logits: Tensor, **options: Any) -> warp_fast.WarpLoss:
        options = {"anchor_logits": self.anchor, "temperature": 0.7, "softcap": 5.0, **options}
        return warp_fast.warp_loss(logits, self.ids, self.advantages, **options)

    def logits(self) -> Tensor:
        logits = self.hidden @ self.weight.T
        self.seen = [logits]
        logits.register_hook(self.seen.append)  # type: ignore[no-untyped-call]
        return logits

    def results(self, scale: float = 1.0, **options: Any) -> tuple[warp_fast.WarpLoss, Tensor]:
        """(what the loss returns, the gradient of the weight)."""
        found = self.loss(self.logits(), **options)
        return found, torch.autograd.grad(found.loss * scale, self.weight)[0]


MASK = torch.tensor([[1, 1, 0], [0, 1, 1]], dtype=torch.bool)


@served
@every_kl
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_is_the_loss_and_its_gradient(kl: Any, clipped: bool, scale: float, backend: str) -> None:
    problem = Problem()
    options: dict[str, Any] = {"kl": kl, "mask": MASK, "backend": backend, "return_entropy": True}
    if clipped:
        options |= {"old_logprobs": -torch.rand(B, T) - 3, "clip_range": 0.2}
    expected, gradient = problem.results(scale, **options)
    found, mine = problem.results(scale, **options, in_place=True)
    torch.testing.assert_close(mine, gradient, rtol=1e-5, atol=1e-6)
    for a, b in zip(found, expected, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert a.requires_grad == (a is found.loss)


@served
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("normalizer", ["token", 7.0, torch.tensor(5.0)], ids=str)
def test_dtypes_against_float64(dtype: torch.dtype, normalizer: Any, backend: str) -> None:
    problem = Problem(dtype)
    options: dict[str, Any] = {"kl": "reverse", "normalizer": normalizer, "backend": backend}
    leaf = problem.logits().detach()

    def gradient(of: Tensor, **more: Any) -> Tensor:
        start = of.clone().requires_grad_()
        loss = problem.loss(start * 1, **options, **more).loss
        return torch.autograd.grad(loss, start)[0]

    mine, eager = gradient(leaf, in_place=True), gradient(leaf)
    problem.anchor = problem.anchor.double()
    assert_close("gradient", mine, gradient(leaf.double()), eager)


@served
@every_kl
def test_the_gradient_is_where_the_logits_were(kl: Any, backend: str) -> None:
    problem = Problem()
    problem.results(kl=kl, mask=MASK, backend=backend, in_place=True)
    logits, gradient = problem.seen
    assert gradient.data_ptr() == logits.data_ptr() and gradient.shape == logits.shape
    assert not gradient[~MASK].any() and gradient[MASK].any(1).all()


@served
def test_packed_rows_apart(backend: str) -> None:
    """Rows of a wider matrix, what is beside them untouched."""
    problem = Problem()
    ids, bounds = problem.ids.flatten(), torch.tensor([0, 2, B * T])
    options: dict[str, Any] = {"cu_seqlens": bounds, "backend": backend}
    wide = torch.randn(B * T, V + 9, requires_grad=True)
    anchor = problem.anchor.flatten(0, 1)

    def results(**more: Any) -> tuple[Tensor, Tensor, Tensor]:
        whole = wide * 1
        loss = warp_fast.warp_loss(
            whole[:, 2:-7], ids, problem.advantages, anchor_logits=anchor, **options, **more
        ).loss
        return whole.detach(), loss, torch.autograd.grad(loss, wide)[0]

    whole, loss, gradient = results(in_place=True)
    _, expected, expected_gradient = results()
    torch.testing.assert_close((loss, gradient), (expected, expected_gradient))
    assert torch.equal(whole[:, :2], wide[:, :2]) and torch.equal(whole[:, -7:], wide[:, -7:])


@served
def test_all_masked(backend: str) -> None:
    problem = Problem()
    nothing = torch.zeros(B, T, dtype=torch.bool)
    found, gradient = problem.results(mask=nothing, backend=backend, in_place=True)
    assert found.loss == 0 and not gradient.any() and not problem.seen[0].any()


@served
def test_nothing_is_written_without_a_gradient(backend: str) -> None:
    problem = Problem()
    for logits in (problem.logits().detach(), problem.logits()):
        before = logits.detach().clone()
        with torch.set_grad_enabled(not logits.requires_grad):
            found = problem.loss(logits, backend=backend, in_place=True)
        assert torch.equal(logits, before) and not found.loss.requires_grad


@served
def test_the_gradient_can_be_had_once(backend: str) -> None:
    problem = Problem()
    loss = problem.loss(problem.logits(), backend=backend, in_place=True).loss
    torch.autograd.grad(loss, problem.weight, retain_graph=True)
    with pytest.raises(RuntimeError, match="in_place has its gradient once"):
        torch.autograd.grad(loss, problem.weight)
    loss = problem.loss(problem.logits(), backend=backend, in_place=True).loss
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, problem.weight, create_graph=True)


@served
@every_kl
def test_who_needs_the_logits_learns_that_they_are_gone(kl: Any, backend: str) -> None:
    problem = Problem()
    logits = problem.logits()
    other = logits.square().sum()
    loss = problem.loss(logits, kl=kl, backend=backend, in_place=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss + other, problem.weight)


@pytest.mark.parametrize("kl", ["none", "k2", "reverse"])
def test_a_trace_learns_that_they_are_gone(kl: Any) -> None:
    problem = Problem()

    def total(weight: Tensor) -> Tensor:
        logits = problem.hidden @ weight.T
        return logits.square().sum() + problem.loss(logits, kl=kl, in_place=True).loss

    torch.compiler.reset()
    step = torch.compile(total, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(step(problem.weight), problem.weight)


@served
def test_two_losses_cannot_be_in_one_place(backend: str) -> None:
    problem = Problem()
    logits = problem.logits()
    losses = [problem.loss(logits, backend=backend, in_place=True).loss for _ in range(2)]
    with pytest.raises(RuntimeError, match="one such loss for all rows of one tensor"):
        torch.autograd.grad(losses[0] + losses[1], problem.weight)


@served
@pytest.mark.parametrize("reentrant", [False, True])
def test_in_a_checkpointed_part(reentrant: bool, backend: str) -> None:
    problem = Problem()

    def loss(weight: Tensor, in_place: bool) -> Tensor:
        return problem.loss(problem.hidden @ weight.T, backend=backend, in_place=in_place).loss

    found = checkpoint(loss, problem.weight, True, use_reentrant=reentrant)
    torch.autograd.backward(found)
    (expected,) = torch.autograd.grad(loss(problem.weight, False), problem.weight)
    torch.testing.assert_close(problem.weight.grad, expected)


def test_what_fails_in_a_checkpointed_part_is_told_as_it_is() -> None:
    """Who makes the batch smaller then must see that memory ran out."""
    problem, calls = Problem(), []

    def loss(weight: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory for the logits")
        return problem.loss(problem.hidden @ weight.T, in_place=True).loss

    found = checkpoint(loss, problem.weight, use_reentrant=False)
    with pytest.raises(torch.OutOfMemoryError, match="no memory for the logits"):
        torch.autograd.backward(found)


def refused(logits: Tensor, anchor: Tensor) -> Any:
    ids, advantages = torch.zeros(logits.shape[:2], dtype=torch.long), torch.ones(len(logits))
    return warp_fast.warp_loss(logits, ids, advantages, anchor_logits=anchor, in_place=True)


def test_logits_that_cannot_be_written() -> None:
    """Each is told why, and is as it was."""
    leaf = torch.randn(B, T, V, requires_grad=True)
    cases: list[tuple[type[Exception], str, Tensor, Tensor | None]] = [
        (ValueError, "a leaf that requires a gradient", leaf, None),
        (ValueError, "or a view of one", leaf.view(-1, V).view(B, T, V), None),
        (ValueError, "share no memory", (leaf * 1)[..., ::2], None),
        (ValueError, "share no memory", (leaf * 1)[:, :1].expand(B, T, V), None),
        (ValueError, "share no memory", (leaf * 1).as_strided((B, T, V), (V, V // 2, 1)), None),
        (ValueError, "share no memory", (leaf * 1).as_strided((B, T, V), (V // 2, V, 1)), None),
        (TypeError, "GradScaler", leaf.half(), None),
    ]
    for views in ((leaf * 1).chunk(2), torch.split(leaf * 1, 1), (leaf * 1)[None].unbind()):
        cases.append((ValueError, "one of several views", views[-1], None))
    shared = leaf * 1
    cases.append((ValueError, "share memory", shared, shared.detach()))
    for error, message, logits, anchor in cases:
        before = logits.detach().clone()
        with pytest.raises(error, match=message):
            refused(logits, before.clone() if anchor is None else anchor)
        assert torch.equal(logits, before)


@served
@pytest.mark.parametrize("kl", ["reward", "forward"])
def test_compiled_is_eager(kl: Any, backend: str) -> None:
    problem = Problem()

    def loss(weight: Tensor) -> Tensor:
        logits = problem.hidden @ weight.T
        return problem.loss(logits, kl=kl, backend=backend, in_place=True).loss

    torch.compiler.reset()
    compiled: Any = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = compiled(problem.weight), loss(problem.weight)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, problem.weight)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


@served
@pytest.mark.parametrize("exact_kl", ["", "reverse", "forward"])
def test_opcheck(exact_kl: str, backend: str) -> None:
    logits, ids = torch.randn(B * T, V), torch.randint(0, V, (B * T,))
    upstream = torch.randn(B * T, 3) * torch.tensor([1, 1, bool(exact_kl)])
    arguments = (logits, upstream, ids, torch.randn(B * T, V), 0.7, 3.0, exact_kl, None)
    torch.library.opcheck(_stats_ops.TOKEN_GRADIENT[backend], arguments)
    torch.library.opcheck(_loss_ops.SCALE[backend], (logits, torch.tensor(0.5)))
    leaf = logits.clone().requires_grad_()
    given = (torch.tensor(1.0), leaf, logits, backend)
    torch.library.opcheck(
        _loss_ops.GIVEN_GRADIENT, given, test_utils=("test_schema", "test_faketensor")
    )
