"""The Triton backend of the loss around its kernels: chunks of rows, GEMMs, frozen inputs.

Its values and gradients are tested with those of rows of logits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import warp_fast
from tests import linear_loss_cases as cases
from tests.linear_loss_cases import on_device
from tests.loss_rows import DEVICE, backward, check, forward, linear, problem, some_mask
from tests.tolerances import assert_close
from warp_fast._loss_checks import KINDS

# numpy says so where the kernels compute both sides of a choice
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CAPPED = (0.7, 5.0)


@pytest.mark.parametrize("kl", ["", "forward"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_chunks_of_rows(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kl: str) -> None:
    monkeypatch.setattr(linear, "_PART", 2)
    monkeypatch.setattr(linear, "_ROWS", 3)
    monkeypatch.setattr(linear, "_COLUMNS", 2)
    check(*problem("linear", 5, 7, dtype), some_mask(5), CAPPED, kl)


def test_gradient_of_the_weight_is_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 300 tiles of one row: in bf16 the sum would stop growing after 256 of them."""
    monkeypatch.setattr(linear, "_ROWS", 1)
    monkeypatch.setattr(linear, "row_gradient", lambda rows, state, upstream, out: out.fill_(1))
    hidden, weight = torch.ones(300, 2, dtype=BF16), torch.ones(3, 2, dtype=BF16)
    upstream, ids = torch.ones(300, 3), torch.zeros(300, dtype=torch.long)
    state = torch.zeros(300, 8, dtype=torch.float64)
    upstream, hidden, weight = (x.to(DEVICE) for x in (upstream, hidden, weight))
    rest = (ids.to(DEVICE), "", (False, True), state.to(DEVICE))
    heads = linear.Heads(hidden, weight, None, None, *CAPPED)
    assert (linear.linear_token_stats_backward_triton(upstream, heads, *rest)[1] == 300).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="the GEMMs of a GPU are in every other test there")
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_gemms_of_16_bits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Those that a GPU takes, with stand-ins for what torch has on GPUs alone: out_dtype."""
    mm, addmm, seen = torch.mm, torch.addmm, []

    def wide_mm(a: Tensor, b: Tensor, out_dtype: Any = None, out: Tensor | None = None) -> Tensor:
        seen.append(a.dtype)
        return mm(a.to(out_dtype or a.dtype), b.to(out_dtype or b.dtype), out=out)

    def wide_addmm(
        total: Tensor, a: Tensor, b: Tensor, out: Tensor, out_dtype: Any = None
    ) -> Tensor:
        seen.append(a.dtype)
        return addmm(total, a.to(out_dtype or a.dtype), b.to(out_dtype or b.dtype), out=out)

    leaves, anchor, ids = problem("linear", 3, 9, dtype)
    upstream = torch.randn(3, 3) * some_mask(3)[:, None]
    values = forward(leaves, anchor, ids, some_mask(3), CAPPED, "reverse")
    gradients = backward(leaves, anchor, upstream, ids, CAPPED, "reverse", values[4])
    monkeypatch.setattr(linear, "_operands", lambda states, weight, _: (states, weight))
    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)
    found = forward(leaves, anchor, ids, some_mask(3), CAPPED, "reverse")
    again = backward(leaves, anchor, upstream, ids, CAPPED, "reverse", found[4])
    for a, b in zip([*found, *again], [*values, *gradients], strict=True):
        assert a.dtype == b.dtype
        assert_close("of 16 bits", a, b.double(), b)
    # logits of both in the two passes, then hidden and weight, where fp16 would lose small numbers
    assert seen == [dtype] * 4 + [BF16 if dtype == BF16 else FP32] * 2


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_gradient_of_a_frozen_input_is_not_computed(needs: tuple[bool, bool]) -> None:
    leaves, anchor, ids = problem("linear", 2, 7)
    heads = linear.Heads(*leaves, *anchor, *CAPPED)
    rest = (torch.ones(2, 3, device=DEVICE), heads, ids, "reverse")
    whole = linear.linear_token_stats_backward_triton(*rest, (True, True))
    parts = linear.linear_token_stats_backward_triton(*rest, needs)
    for part, full, needed in zip(parts, whole, needs, strict=True):
        assert torch.equal(part, full) if needed else part.numel() == 0


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("part, block", [(1, 1), (2, 3), (3, 5), (2, 8), (512, 2816)])
@pytest.mark.parametrize("kl", KINDS)
def test_groups_of_the_loss(
    monkeypatch: pytest.MonkeyPatch, kl: str, part: int, block: int, packed: bool
) -> None:
    """Sequences longer than a block, as long, and several in one."""
    monkeypatch.setattr(linear, "_PART", part)
    monkeypatch.setattr(linear, "_BLOCK", 2 * block)  # in bf16; these are fp32
    cases.check(linear.linear_loss_triton, on_device(cases.call(kl, packed, ratio=True)))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("block", [1, 3, 8])
@pytest.mark.parametrize("kl", ["reward", "k2", "reverse"])
def test_rows_outside_a_mask_on_the_host_cost_nothing(
    monkeypatch: pytest.MonkeyPatch, kl: str, block: int, packed: bool
) -> None:
    """No product has them, and no group more rows than its sequences keep."""
    monkeypatch.setattr(linear, "_PART", 2)
    monkeypatch.setattr(linear, "_BLOCK", 2 * block)
    heads, rows, terms = cases.call(kl, packed, ratio=True)
    known = replace(rows, on_host=(rows.mask, rows.sequence))
    given = on_device((heads, known, terms))
    cases.check(linear.linear_loss_triton, given)
    seen: list[int] = []
    product = linear._product

    def counted(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        seen.append(len(left))
        found: Tensor = product(left, right, dtype)
        return found

    monkeypatch.setattr(linear, "_product", counted)
    linear.linear_loss_triton(*given, False, (False, False))
    assert sum(seen) == 2 * int(rows.mask.sum())


def test_backward_leaves_out_what_the_host_knows() -> None:
    leaves, anchor, ids = problem("linear", 5, 7)
    mask = some_mask(5)
    upstream = torch.randn(5, 3, device=DEVICE) * mask[:, None]
    rest = (upstream, linear.Heads(*leaves, *anchor, *CAPPED), ids, "reverse")
    for needs in [(True, True), (True, False), (False, True)]:
        whole = linear.linear_token_stats_backward_triton(*rest, needs)
        parts = linear.linear_token_stats_backward_triton(*rest, needs, None, mask.cpu())
        for part, full in zip(parts, whole, strict=True):
            torch.testing.assert_close(part, full)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("kl", ["reward", "forward"])
def test_loss_of_16_bit_inputs(kl: str, dtype: torch.dtype) -> None:
    cases.check(linear.linear_loss_triton, on_device(cases.call(kl, dtype=dtype)))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=str)
def test_gradients_of_the_loss_that_are_not_needed(needs: tuple[bool, bool]) -> None:
    given = on_device(cases.call("reward"))
    cases.check(linear.linear_loss_triton, given, needs)
    found = linear.linear_loss_triton(*given, True, needs)
    assert (found.dhidden.numel() > 0, found.dweight.numel() > 0) == needs


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("kl", ["none", "reward", "k2"])
def test_rows_whose_odds_do_not_fit(kl: str, dtype: torch.dtype) -> None:
    """Log-probs of sampled tokens on both sides of -60, down to where their odds are infinite."""
    heads, rows, terms = cases.call(kl, dtype=dtype)
    heads = heads._replace(hidden=heads.hidden * 20, softcap=None)
    given = on_device((heads, rows, terms))
    logprobs = linear.linear_loss_triton(*given, True, (True, True)).logprobs[given[1].mask]
    assert (logprobs < -89).any() and ((logprobs > -60) & (logprobs < -5)).any()
    cases.check(linear.linear_loss_triton, given)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("kl", ["none", "reward", "reverse"])
def test_nan_in_rows_without_a_gradient_reaches_no_sum(kl: str, dtype: torch.dtype) -> None:
    """Rows that a mask keeps, of no advantage."""
    heads, rows, terms = cases.call(kl, dtype=dtype)
    terms = replace(terms, beta=0.0, advantages=torch.where(rows.sequence == 1, 0, 1.0))
    heads.hidden[rows.sequence == 1] = torch.nan
    given = on_device((heads, rows, terms))
    for found in linear.linear_loss_triton(*given, False, (True, True))[-2:]:
        assert found.isfinite().all() and found.any()


@pytest.mark.gpu
@pytest.mark.parametrize("low_memory", [False, True], ids=["made", "low memory"])
@pytest.mark.parametrize("kl", ["reward", "reward_to_go", "k2", "reverse"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_step_is_captured_in_a_graph(packed: bool, kl: Any, low_memory: bool) -> None:
    """Which a wait for the GPU would end; other hidden states and mask at the replay."""
    hidden = torch.randn(2, 300, 64, device=DEVICE, dtype=BF16)
    weight = torch.randn(50_257, 64, device=DEVICE, dtype=BF16).requires_grad_()
    ids = torch.randint(0, len(weight), (2, 300), device=DEVICE)
    mask, anchor = torch.rand(2, 300, device=DEVICE) < 0.7, hidden * 1.01
    extra: dict[str, Any] = {}
    if packed:
        hidden, ids, mask, anchor = (x.flatten(0, 1) for x in (hidden, ids, mask, anchor))
        extra["cu_seqlens"] = torch.tensor([0, 250, 600], device=DEVICE)
    states = hidden.requires_grad_()
    advantages = torch.randn(2, device=DEVICE)

    def run() -> list[Tensor]:
        loss = warp_fast.linear_warp_loss(
            states, weight, ids, advantages, anchor_hidden=anchor, mask=mask, kl=kl,
            low_memory=low_memory, **extra,
        ).loss  # fmt: skip
        return [loss, *torch.autograd.grad(loss, [states, weight])]

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        states.mul_(0.9)
        mask.logical_not_()
    graph.replay()
    for a, b in zip(captured, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=2.0**-6, atol=1e-5)


@pytest.mark.gpu
def test_a_mask_on_the_cpu_waits_for_nothing() -> None:
    """So many row numbers are not copied aside: unless pinned, they wait for their turn."""
    hidden = torch.randn(1, 1 << 15, 64, device=DEVICE, dtype=BF16)
    weight = torch.randn(512, 64, device=DEVICE, dtype=BF16).requires_grad_()
    ids, advantages = torch.zeros(1, 1 << 15, device=DEVICE).long(), torch.ones(1, device=DEVICE)
    mask = torch.rand(1, 1 << 15) < 0.7

    def run() -> None:
        warp_fast.linear_warp_loss(hidden, weight, ids, advantages, mask=mask, kl="none")

    run()
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 31)  # type: ignore[no-untyped-call]
    awake: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    awake.record()
    run()
    assert not awake.query()
