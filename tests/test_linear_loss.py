"""The loss whose gradients are made in the forward pass: groups of rows, the backward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import warp_fast
from tests.linear_loss_cases import V, call, check, finite, widened
from warp_fast import _loss_ops, _stats_ops
from warp_fast._backend import MISSING, able
from warp_fast._loss_checks import EXACT, KINDS
from warp_fast._objective import Tokens, objective, slopes
from warp_fast._slices import groups
from warp_fast.native import linear_loss as native
from warp_fast.native._tiles import Product
from warp_fast.native.loss import Head
from warp_fast.reference.linear_loss import linear_loss_reference
from warp_fast.reference.loss import Stats

BACKENDS = able("linear_loss", "cpu")
B, T, D = 3, 4, 5

kinds = pytest.mark.parametrize("kl", KINDS)
layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
ratios = pytest.mark.parametrize("ratio", [False, True], ids=["log-prob", "ratio"])
served = pytest.mark.parametrize("backend", BACKENDS)
compiled = pytest.mark.skipif(MISSING["cpp"] is not None, reason=str(MISSING["cpp"]))


@kinds
@layouts
@ratios
def test_slopes_are_the_derivatives_of_the_objective(kl: str, packed: bool, ratio: bool) -> None:
    _, rows, terms = call(kl, packed, ratio)
    values = [torch.where(rows.mask, -3 * torch.rand(len(rows.mask)), 0).double() for _ in range(4)]
    stats = Stats(*[x.requires_grad_() for x in values])
    found = torch.autograd.grad(
        objective(rows, stats, terms), [stats.logprobs, stats.entropy, stats.kl],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    torch.testing.assert_close(slopes(rows, stats, terms), torch.stack(found, 1))


@pytest.mark.parametrize(
    "lengths, limit, expected",
    [
        (None, 4, [(0, 4), (4, 8), (8, 10)]),
        (None, 10, [(0, 10)]),
        ([3, 4, 3], 7, [(0, 7), (7, 10)]),
        ([3, 4, 3], 6, [(0, 3), (3, 7), (7, 10)]),
        ([10], 4, [(0, 10)]),
        ([0, 1, 0, 9, 0], 4, [(0, 1), (1, 10)]),
    ],
    ids=str,
)
def test_groups(lengths: Any, limit: int, expected: list[tuple[int, int]]) -> None:
    assert [(x.start, x.stop) for x in groups(10, lengths, limit)] == expected
    assert groups(0, None if lengths is None else [0, 0], limit) == []


@compiled
@kinds
@layouts
@pytest.mark.parametrize("kept", [1, 2, 3, 5, 512])
def test_groups_of_any_size(
    monkeypatch: pytest.MonkeyPatch, kept: int, packed: bool, kl: str
) -> None:
    """Sequences longer than what is kept, as long, and several in one."""
    monkeypatch.setattr(native, "_KEPT_ROWS", max(kept, 1 + (kl in EXACT)))
    check(native.linear_loss_cpp, call(kl, packed, ratio=True))


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kl", ["reward", "forward"])
def test_16_bit_inputs_give_fp32_gradients(kl: str, dtype: torch.dtype) -> None:
    check(native.linear_loss_cpp, call(kl, dtype=dtype))


@compiled
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=str)
def test_what_is_not_needed_is_not_made(needs: tuple[bool, bool]) -> None:
    check(native.linear_loss_cpp, call("k2"), needs)
    found = native.linear_loss_cpp(*call("k2"), True, needs)
    assert (found.dhidden.numel() > 0, found.dweight.numel() > 0) == needs


@compiled
def test_rows_without_a_coefficient_cost_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    gradient = Head.gradient

    def counted(self: Any, logits: Tensor, *rest: Any) -> None:
        seen.append(len(logits))
        gradient(self, logits, *rest)

    monkeypatch.setattr(Head, "gradient", counted)
    heads, rows, terms = call("none")
    native.linear_loss_cpp(heads, rows, terms, False, (True, True))
    assert seen == [int((terms.advantages != 0).sum())] and seen[0] < int(rows.mask.sum())
    nothing = replace(terms, advantages=torch.zeros_like(terms.advantages))
    found = native.linear_loss_cpp(heads, rows, nothing, False, (True, True))
    assert len(seen) == 1 and not found.dweight.any() and not found.dhidden.any()


@compiled
def test_memory_is_that_of_the_kept_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_KEPT_ROWS", 4)
    sizes: list[int] = []

    def seen(states: Tensor, weight: Tensor, buffer: Any = None, keep: bool = False) -> Any:
        sizes.extend([buffer.numel()] if keep else [])
        return Product(states, weight, buffer, keep)

    monkeypatch.setattr(native, "Product", seen)
    for kl in ("reward", "k2", "reverse"):
        native.linear_loss_cpp(*call(kl, packed=True), False, (True, True))
    assert max(sizes) <= 4 * V


@served
@kinds
def test_opcheck(kl: str, backend: str) -> None:
    heads, rows, terms = call(kl, ratio=True)
    hidden, weight, *others = finite(heads)
    given = (
        hidden.requires_grad_(), weight.requires_grad_(), *others, rows.token_ids, rows.mask,
        rows.sequence, rows.mask.clone(), rows.sequence.clone(), rows.count, rows.longest,
        terms.advantages, None, terms.old_logprobs,
        [0.2, 0.3], torch.tensor(0.3), kl, True,
    )  # fmt: skip
    for needs in [(True, True), (False, False)]:
        torch.library.opcheck(_loss_ops.LINEAR_LOSS[backend], (*given, *needs))


def problem(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Any]]:
    leaves = [torch.randn(B, T, D), torch.randn(V, D)]
    options = {
        "anchor_hidden": (leaves[0] + 0.1).to(dtype),
        "token_ids": torch.randint(0, V, (B, T)),
        "advantages": torch.randn(B),
        "mask": torch.arange(B * T).view(B, T) % 4 != 1,
    }
    return [x.to(dtype).requires_grad_() for x in leaves], options


def maker(loss: Tensor) -> Any:
    """The node that has what was made."""
    node: Any = loss.grad_fn
    while not hasattr(node, "made"):
        node = node.next_functions[0][0]
    return node


@served
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_backward_pass_gives_the_same(dtype: torch.dtype, backend: str) -> None:
    """The first gives away what was made; what becomes of it must not reach the others."""
    leaves, options = problem(dtype)
    loss = 3 * warp_fast.linear_warp_loss(*leaves, **options, backend=backend).loss
    found = []
    for _ in range(3):
        torch.autograd.backward(loss, retain_graph=True)
        found.append([leaf.grad.clone() for leaf in leaves if leaf.grad is not None])
        for leaf in leaves:
            assert leaf.grad is not None and leaf.grad.dtype == dtype
            leaf.grad.zero_()
    for again in found[1:]:
        if dtype == torch.bfloat16:
            torch.testing.assert_close(again, found[0], rtol=2.0**-6, atol=1e-3)
        else:
            torch.testing.assert_close(again, found[0])


@served
@pytest.mark.parametrize("kl", ["reward", "reward_to_go", "k2", "reverse"])
def test_low_memory_gives_the_same(kl: Any, backend: str) -> None:
    leaves, options = problem()
    found = []
    for low_memory in (False, True):
        result = warp_fast.linear_warp_loss(
            *leaves, **options, kl=kl, low_memory=low_memory, backend=backend
        )
        assert (maker(result.loss).made == [None, None]) == low_memory
        found.append([result.loss, *torch.autograd.grad(result.loss, leaves)])
    torch.testing.assert_close(found[1], found[0])


@served
@pytest.mark.parametrize("kl", ["reward", "reverse"])
def test_gradients_through_loss_and_values_add_up(kl: Any, backend: str) -> None:
    leaves, options = problem()

    def found(of_loss: float, of_values: float) -> list[Tensor]:
        result = warp_fast.linear_warp_loss(
            *leaves, **options, kl=kl, return_entropy=True, backend=backend
        )
        assert result.entropy is not None
        values = result.logprobs.sum() + result.entropy.sum() + result.kl.square().sum()
        terms = [(of_loss, result.loss), (of_values, values)]
        total = torch.stack([factor * term for factor, term in terms if factor]).sum()
        return list(torch.autograd.grad(total, leaves))

    apart = [a + b for a, b in zip(found(2, 0), found(0, 3), strict=True)]
    torch.testing.assert_close(found(2, 3), apart)


@served
@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="needs a newer torch")
@pytest.mark.parametrize("again", [False, True], ids=["made", "made again"])
def test_weight_grad_is_summed_in_the_dtype_that_the_caller_asks_for(
    again: bool, backend: str
) -> None:
    """In place of a given buffer, and exact where bf16 would round each micro-batch."""
    (hidden, weight), options = problem(torch.bfloat16)
    buffer = torch.ones(V, D)
    weight.grad_dtype = torch.float32
    weight.grad = buffer
    exact = weight.detach().double().requires_grad_()
    for _ in range(2):
        for head, states in ((weight, hidden), (exact, hidden.double())):
            result = warp_fast.linear_warp_loss(states, head, **options, backend=backend)
            of_values = result.logprobs.sum() if again else 0
            torch.autograd.backward(result.loss + of_values)
    assert weight.grad is buffer and exact.grad is not None and hidden.grad is not None
    torch.testing.assert_close(buffer - 1, exact.grad.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="needs a newer torch")
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("kept", ["checkpoint", "on the CPU"])
def test_so_it_is_where_the_weight_is_kept_elsewhere(kept: str, low_memory: bool) -> None:
    """What a checkpoint or a hook gives the backward pass has no grad_dtype."""
    found = []
    for elsewhere in (False, True):
        torch.manual_seed(0)
        (hidden, weight), options = problem(torch.bfloat16)
        weight.grad_dtype = torch.float32

        def loss(hidden: Tensor, weight: Any = weight, options: Any = options) -> Tensor:
            more = {**options, "low_memory": low_memory}
            return warp_fast.linear_warp_loss(hidden, weight, **more).loss

        if not elsewhere:
            torch.autograd.backward(loss(hidden))
        elif kept == "checkpoint":
            torch.autograd.backward(checkpoint(loss, hidden, use_reentrant=False))
        else:
            with torch.autograd.graph.save_on_cpu():
                torch.autograd.backward(loss(hidden))
        assert weight.grad is not None and weight.grad.dtype == torch.float32
        found.append(weight.grad)
    assert torch.equal(*found)


@served
def test_what_was_made_is_given_away(backend: str) -> None:
    leaves, options = problem()
    loss = warp_fast.linear_warp_loss(*leaves, **options, backend=backend).loss
    node = maker(loss)
    assert all(part is not None for part in node.made)
    torch.autograd.backward(loss)
    assert node.made == [None, None]


def test_the_reference_is_what_autograd_gives() -> None:
    for kl in KINDS:
        heads, rows, terms = call(kl, packed=True, ratio=True)
        heads = finite(widened(heads))
        made = linear_loss_reference(heads, rows, terms, False, (True, True))
        leaves = [heads.hidden.requires_grad_(), heads.weight.requires_grad_()]
        stats = _stats_ops.LINEAR_TOKEN_STATS["reference"](
            *leaves, rows.token_ids, rows.mask, *heads[2:], kl if kl in EXACT else "", False
        )
        total = objective(rows, Stats(*stats[:4]), terms)
        expected = torch.autograd.grad(total, leaves)
        torch.testing.assert_close(made.total, total.detach())
        torch.testing.assert_close((made.dhidden, made.dweight), expected)


def test_a_mask_on_the_host_stays_there_as_well() -> None:
    """Beside other devices, of which meta is one that is always there."""
    meta, mask = torch.device("meta"), torch.arange(6) % 2
    ids, bounds = torch.zeros(6, dtype=torch.long, device=meta), torch.tensor([0, 2, 6])
    cases: list[tuple[Tensor, Tensor | None, list[int]]] = [
        (mask.view(2, 3), None, [0, 0, 0, 1, 1, 1]),
        (mask, bounds, [0, 0, 1, 1, 1, 1]),
    ]
    for given, cu_seqlens, sequence in cases:
        rows = Tokens.of(ids.view(given.shape), given, cu_seqlens, given.shape, meta, "hidden")
        assert rows.mask.device == rows.sequence.device == meta and rows.on_host is not None
        assert torch.equal(rows.on_host[0], mask != 0)
        assert rows.on_host[1].tolist() == sequence
    padded = torch.Size((2, 3))
    assert Tokens.of(ids.view(2, 3), None, None, padded, meta, "hidden").on_host is None
    there = mask.to(meta)
    assert Tokens.of(ids.view(2, 3), there.view(2, 3), None, padded, meta, "hidden").on_host is None
    with pytest.raises(ValueError, match="mask and cu_seqlens must be on one device"):
        Tokens.of(ids, there, bounds, torch.Size((6,)), meta, "hidden")


@pytest.mark.gpu
@pytest.mark.parametrize("low_memory", [False, True], ids=["made", "low memory"])
@pytest.mark.parametrize("kl", ["reward", "k2", "reverse"])
def test_a_mask_on_the_host_is_the_mask_on_the_gpu(kl: Any, low_memory: bool) -> None:
    leaves, options = problem(torch.bfloat16)
    given = [x.detach().cuda().requires_grad_() for x in leaves]
    moved = {name: value.cuda() for name, value in options.items()}
    found = []
    for mask in (moved["mask"], options["mask"]):
        result = warp_fast.linear_warp_loss(
            *given, **{**moved, "mask": mask}, kl=kl, low_memory=low_memory
        )
        found.append([*result[:4], *torch.autograd.grad(result.loss, given)])
    torch.testing.assert_close(found[1], found[0], rtol=2.0**-6, atol=1e-3)
