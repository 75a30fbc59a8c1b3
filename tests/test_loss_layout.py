"""Logits that are no even matrix, such as slices in time, are used where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import warp_fast
from warp_fast import _loss_ops, _stats_ops
from warp_fast._backend import MISSING, SERVED, unavailable

BATCH, TIME, V = 3, 4, 70
MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 1, 0]], dtype=torch.bool)

on_cpu = [pytest.param(name, "cpu") for name in SERVED["loss"]["cpu"] if MISSING[name] is None]
able = torch.cuda.is_available()
on_gpu = [
    pytest.param(name, "cuda", marks=pytest.mark.gpu)
    for name in SERVED["loss"]["cuda"]
    if not able or unavailable("loss", name, torch.device("cuda")) is None
]
served = pytest.mark.parametrize(("backend", "device"), on_cpu + on_gpu)
by_cpu = pytest.mark.parametrize("backend", [name.values[0] for name in on_cpu])

# of a larger tensor, a [BATCH, TIME, V] part
Part = Callable[[Tensor], Tensor]
PARTS: dict[str, tuple[tuple[int, ...], Part]] = {
    "first": ((BATCH, TIME + 1, V), lambda x: x[:, :-1]),
    "last": ((BATCH, TIME + 3, V), lambda x: x[:, -TIME:]),
    "inner": ((BATCH, TIME + 2, V + 8), lambda x: x[:, 1:-1, 3:-5]),
    "spread": ((BATCH * 2, TIME * 2, V), lambda x: x[::2, ::2]),
    "time first": ((TIME, BATCH, V), lambda x: x.transpose(0, 1)),
}
every_part = pytest.mark.parametrize("part", list(PARTS))


class Problem:
    def __init__(self, part: str, device: str, dtype: torch.dtype = torch.float32) -> None:
        shape, self.part = PARTS[part]
        self.whole = torch.randn(shape, dtype=dtype, device=device).requires_grad_()
        self.anchor = self.part(torch.randn(shape, dtype=dtype, device=device))
        self.ids = torch.randint(0, V, (BATCH, TIME), device=device)
        self.advantages = torch.randn(BATCH, device=device)
        self.mask = MASK.to(device)

    def loss(self, logits: Tensor, **options: Any) -> warp_fast.WarpLoss:
        options = {"anchor_logits": self.anchor, "mask": self.mask, "softcap": 5.0, **options}
        return warp_fast.warp_loss(logits, self.ids, self.advantages, **options)

    def results(self, made: Part, **options: Any) -> list[Tensor]:
        """What the loss of a part of the logits is, and its gradient."""
        found = self.loss(made(self.whole * 1), **options)
        gradient = torch.autograd.grad(found.loss * 0.5, self.whole)[0]
        return [*[x.detach() for x in found if x is not None], gradient]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@served
@every_part
@pytest.mark.parametrize("kl", ["reward", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_part_is_its_copy(
    part: str, kl: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    problem = Problem(part, device, dtype)
    options: dict[str, Any] = {"kl": kl, "backend": backend, "return_entropy": True}
    expected = problem.results(lambda x: problem.part(x).contiguous(), **options)
    assert_same(problem.results(problem.part, **options), expected)
    assert_same(
        problem.results(problem.part, anchor_logits=problem.anchor.contiguous(), **options),
        expected,
    )


@served
@every_part
@pytest.mark.parametrize("kl", ["reward", "forward"])
def test_in_place(part: str, kl: str, backend: str, device: str) -> None:
    """The same, and what is beside the part is as it was."""
    problem = Problem(part, device)
    options: dict[str, Any] = {"kl": kl, "backend": backend}
    expected = problem.results(problem.part, **options)
    whole: list[Tensor] = []

    def kept(logits: Tensor) -> Tensor:
        whole.append(logits.detach())
        return problem.part(logits)

    found = problem.results(kept, in_place=True, **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    before = problem.whole.detach().clone()
    inside = torch.zeros_like(before, dtype=torch.bool)
    problem.part(inside).fill_(True)
    assert torch.equal(whole[0][~inside], before[~inside])
    assert torch.equal(whole[0][inside], found[-1][inside])


class Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The first argument of every op of the statistics and of their gradient."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.logits: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "token_stats" in str(func):
            self.logits += [x for x in args if isinstance(x, Tensor) and x.shape[-1] == V]
        return func(*args, **(kwargs or {}))


@served
@every_part
def test_no_op_takes_a_copy(part: str, backend: str, device: str) -> None:
    problem = Problem(part, device)
    logits = problem.part(problem.whole)
    with Seen() as seen:
        found = problem.loss(logits, kl="reverse", backend=backend)
        warp_fast.token_logprobs(logits, problem.ids, backend=backend)
        torch.autograd.grad(found.loss, problem.whole)
    places = [x.data_ptr() for x in (logits, problem.anchor)]
    assert [x.data_ptr() for x in seen.logits] == [*places, places[0], *places]


@served
def test_one_row_for_all(backend: str, device: str) -> None:
    row = torch.randn(1, 1, V, device=device)
    ids = torch.randint(0, V, (BATCH, TIME), device=device)
    found = warp_fast.token_logprobs(row.expand(BATCH, TIME, V), ids, backend=backend)
    torch.testing.assert_close(found, row[0, 0].log_softmax(-1)[ids])


@served
@pytest.mark.parametrize("shape", [(0, TIME), (BATCH, 0)], ids=str)
def test_nothing(shape: tuple[int, int], backend: str, device: str) -> None:
    whole = torch.randn(shape[0], shape[1] + 1, V, device=device).requires_grad_()
    ids = torch.zeros(shape, dtype=torch.long, device=device)
    found = warp_fast.token_logprobs(whole[:, :-1], ids, backend=backend)
    assert found.shape == shape
    assert not torch.autograd.grad(found.sum(), whole)[0].any()


@by_cpu
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_is_eager(in_place: bool, dynamic: bool, backend: str) -> None:
    problem = Problem("first", "cpu")

    def loss(whole: Tensor) -> Tensor:
        logits = problem.part(whole * 1)
        return problem.loss(logits, kl="reverse", backend=backend, in_place=in_place).loss

    torch.compiler.reset()
    compiled: Any = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    found, expected = compiled(problem.whole), loss(problem.whole)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, problem.whole)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


@by_cpu
@pytest.mark.parametrize("part", ["first", "time first"])
@pytest.mark.parametrize("exact_kl", ["", "reverse"])
def test_opcheck(exact_kl: str, part: str, backend: str) -> None:
    problem = Problem(part, "cpu")
    logits = problem.part(problem.whole.detach()).requires_grad_()
    ids, mask = problem.ids.flatten(), MASK.flatten()
    head = (problem.anchor, 0.7, 3.0, exact_kl)
    torch.library.opcheck(_stats_ops.TOKEN_STATS[backend], (logits, ids, mask, *head, True))
    written = problem.part(problem.whole.detach().clone())
    upstream = torch.randn(len(ids), 3) * torch.tensor([1, 1, bool(exact_kl)])
    arguments = (written, upstream, ids, *head, None)
    torch.library.opcheck(_stats_ops.TOKEN_GRADIENT[backend], arguments)
    torch.library.opcheck(_loss_ops.SCALE[backend], (written, torch.tensor(0.5)))
