"""The CUDA kernels of the loss against float64: statistics of sampled tokens and their gradient.

On a GPU where there is one that can run them, else as tests/cuda_on_cpu.py does: slower, and with
the exp and the division of the CPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import warp_fast
from tests.cuda_on_cpu import ABSENT, module
from tests.loss_rows import (
    DEVICE,
    INF,
    NO_ANCHOR,
    PLAIN,
    Head,
    Leaves,
    check_a_constant_apart,
    check_scaling,
    kernels,
    problem,
    some_mask,
)
from tests.loss_rows import check as check_kernels
from warp_fast import _stats_ops
from warp_fast._backend import unavailable
from warp_fast.native import loss_cuda as native

WHY_NOT = ABSENT or (
    unavailable("loss", "cuda", torch.device("cuda")) if DEVICE == "cuda" else None
)
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.usefixtures("cuda_kernels"),
]

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CAPPED = (0.7, 5.0)


def forward(
    leaves: Leaves, anchor: Leaves, ids: Tensor, mask: Tensor, head: Head, kl: str
) -> list[Tensor]:
    """The four statistics and the state for the gradient."""
    arguments = (*leaves, ids, mask, *(anchor or NO_ANCHOR[:1]), *head, kl, True)
    return list(native.token_stats_cuda(*arguments))


def backward(
    leaves: Leaves,
    anchor: Leaves,
    upstream: Tensor,
    ids: Tensor,
    head: Head,
    kl: str,
    state: Tensor | None = None,
) -> list[Tensor]:
    arguments = (upstream, *leaves, ids, *(anchor or NO_ANCHOR[:1]), *head, kl, state)
    return [native.token_stats_backward_cuda(*arguments)]


def fused(
    leaves: Leaves, anchor: Leaves, upstream: Tensor, ids: Tensor, head: Head, kl: str, *_: Any
) -> list[Tensor]:
    """The gradient over a copy of the logits, by the kernel that finds the statistics as well."""
    logits = leaves[0].clone()
    mask = upstream.any(1)
    arguments = (logits, upstream, ids, mask, *(anchor or NO_ANCHOR[:1]), *head, kl)
    found = native.token_stats_fused_cuda_(*arguments)
    expected = forward(leaves, anchor, ids, mask, head, kl)
    torch.testing.assert_close(list(found), expected[:4], rtol=1e-6, atol=1e-6, equal_nan=True)
    return [logits]


check = partial(check_kernels, forward=forward, backward=backward)
check_fused = partial(check_kernels, forward=forward, backward=fused)
either = pytest.mark.parametrize("check", [check, check_fused], ids=["saved", "fused"])


@either
@pytest.mark.parametrize("head", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("kl", [None, "", "reverse", "forward"])
def test_every_kl_with_mask_softcap_and_temperature(kl: str | None, head: Head, check: Any) -> None:
    leaves, anchor, ids = problem("logits", 3, 257, kl=kl)
    check(leaves, anchor, ids, some_mask(3), head, kl or "")


@either
@pytest.mark.parametrize("dtype", [BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_dtypes(kl: str, dtype: torch.dtype, check: Any) -> None:
    check(*problem("logits", 3, 70, dtype), None, CAPPED, kl)


@either
@pytest.mark.parametrize(
    "dtypes", [(BF16, FP32), (FP32, FP16), (FP16, BF16), (BF16, FP64)], ids=str
)
def test_anchor_of_another_dtype(dtypes: tuple[torch.dtype, torch.dtype], check: Any) -> None:
    leaves, anchor, ids = problem("logits", 2, 90)
    check([leaves[0].to(dtypes[0])], [anchor[0].to(dtypes[1])], ids, kl="reverse")


# below a vector, whole vectors, several blocks, GPT-2, and Gemma's, one with a short last slice;
# then more than shared memory keeps
@either
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(
    "size",
    [1, 7, 8, 33000]
    + [pytest.param(size, marks=pytest.mark.gpu) for size in (50257, 256128, 262144)]
    + [262208, pytest.param(1_000_003, marks=pytest.mark.gpu)],
)
def test_vocabularies(size: int, dtype: torch.dtype, check: Any) -> None:
    leaves, anchor, _ = problem("logits", 2, size, dtype)
    check(leaves, anchor, torch.tensor([0, size - 1], device=DEVICE), None, CAPPED, "reverse")


# rows of which the kernel that keeps them finds the sums relative to the token
@either
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("kl", [None, "", "reverse", "forward"])
@pytest.mark.parametrize("size", [7, 2003, 40_001])
def test_likely_tokens(size: int, kl: str | None, dtype: torch.dtype, check: Any) -> None:
    leaves, anchor, ids = problem("logits", 3, size, dtype, kl=kl)
    for logits in (*leaves, *anchor):
        logits[torch.arange(3), ids] += 12
    check(leaves, anchor, ids, some_mask(3), kl=kl or "")


@pytest.mark.skipif(DEVICE == "cuda", reason="shared memory and clusters are what the GPU has")
@pytest.mark.parametrize("shared", [101_376, 9000])
@pytest.mark.parametrize("cluster", [8, 16])
def test_gpus_with_less_shared_memory_and_smaller_clusters(shared: int, cluster: int) -> None:
    module().set_limits(shared, cluster)
    try:
        leaves, anchor, ids = problem("logits", 2, 150_001, FP32)
        leaves[0][0, ids[0]] += 20
        check_fused(leaves, anchor, ids, kl="reverse")
    finally:
        module().set_limits(232_448, 16)


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_policy_and_anchor_a_constant_apart(kl: str) -> None:
    check_a_constant_apart(forward, kl)
    leaves, anchor, ids = problem("logits", 2, 2003, FP32)
    check_fused(leaves, [anchor[0] + 100], ids, kl=kl)


@either
def test_logits_that_are_all_large_and_near_each_other(check: Any) -> None:
    """A score that counts nothing cannot be told from the others at this size."""
    logits = (1e10 + torch.arange(40, device=DEVICE) * 4096.0).repeat(2, 1)
    check([logits], [logits.flip(1)], torch.tensor([3, 39], device=DEVICE), kl="reverse")


@either
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_rows_at_any_alignment(dtype: torch.dtype, check: Any) -> None:
    leaves, anchor, ids = problem("logits", 9, 203, dtype)
    for first in (1, 2, 5):
        check([leaves[0][:, first:]], [anchor[0][:, :-first]], ids % 190, kl="forward")


def test_a_row_gives_the_same_bits_in_any_batch_and_place() -> None:
    leaves, anchor, ids = problem("logits", 4, 40_001, BF16)
    mask = torch.ones(4, dtype=torch.bool, device=DEVICE)
    upstream = torch.randn(4, 3, device=DEVICE)
    together = forward(leaves, anchor, ids, mask, CAPPED, "reverse")
    together += backward(leaves, anchor, upstream, ids, CAPPED, "reverse", together[4])
    for n in range(4):
        one = slice(n, n + 1)
        row, other = [leaves[0][one].clone()], [anchor[0][one].clone()]
        single = forward(row, other, ids[one], mask[one], CAPPED, "reverse")
        single += backward(row, other, upstream[one], ids[one], CAPPED, "reverse", single[4])
        for whole, part in zip(together, single, strict=True):
            assert torch.equal(whole[one], part)


@pytest.mark.parametrize("kept", [0, 1])
def test_what_a_mask_hides_is_not_read(kept: int) -> None:
    """NaN, inf and ids of anything there; the other rows as if alone; nothing of no row."""
    leaves, anchor, ids = problem("logits", 2, 7)
    mask = torch.tensor([kept == 1, False], device=DEVICE)
    leaves[0][~mask], anchor[0][~mask] = float("nan"), INF
    ids[~mask] = torch.tensor([-1, 10**12], device=DEVICE)[~mask]
    found = forward(leaves, anchor, ids, mask, CAPPED, "reverse")
    upstream = torch.where(mask[:, None], 1.0, 0.0).expand(2, 3)
    arguments = (leaves, anchor, upstream, ids, CAPPED, "reverse")
    for (gradient,) in (backward(*arguments, found[4]), backward(*arguments), fused(*arguments)):
        assert not any(values[~mask].any() for values in (*found, gradient))
        for values in (*found, gradient):
            assert values.isfinite().all() and bool(values.any()) == bool(kept)


def test_no_rows() -> None:
    leaves, anchor, ids = problem("logits", 0, 7)
    found = forward(leaves, anchor, ids, some_mask(0), CAPPED, "reverse")
    assert [len(x) for x in found] == [0] * 5
    upstream = torch.zeros(0, 3, device=DEVICE)
    assert backward(leaves, anchor, upstream, ids, CAPPED, "reverse")[0].shape == (0, 7)


def test_strided_arguments() -> None:
    leaves, anchor, ids = problem("logits", 3, 18)
    mask = some_mask(3).repeat_interleave(2)[::2]
    check([leaves[0][:, ::2]], [anchor[0][:, 1::2]], (ids % 9).repeat_interleave(2)[::2], mask)
    check([leaves[0][:1].expand(3, 18)], anchor, ids, kl="reverse")
    check([leaves[0].T.contiguous().T], anchor, ids, kl="forward")


@pytest.mark.parametrize("kl", ["", "reverse"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_logits_of_1e4(dtype: torch.dtype, kl: str) -> None:
    """Ties at the top, so that the probability of one token is 1, a half, or 0."""
    logits = (torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 1, 1.0]]) * 2 - 1) * 1e4
    logits = logits.to(dtype).to(DEVICE)
    for one in (check, check_fused):
        one([logits], [logits.roll(1, 1)], torch.tensor([0, 1, 0, 2], device=DEVICE), kl=kl)


@pytest.mark.parametrize("kept", [1, 2, 5])
def test_tokens_at_minus_infinity(kept: int) -> None:
    leaves, anchor, ids = problem("logits", 3, 33_000)
    for given in (leaves, anchor):
        given[0][:, kept:] = -INF
    check(leaves, anchor, ids % kept, kl="forward")
    check_fused(leaves, anchor, ids % kept, kl="forward")
    if kept == 1:
        mask = torch.ones(3, dtype=torch.bool, device=DEVICE)
        found = forward(leaves, anchor, ids % 1, mask, PLAIN, "reverse")
        assert not any(values.any() for values in found[:4])


@pytest.mark.parametrize("depth", [88.0, 104.0, 300.0])
def test_logprobs_whose_probability_underflows(depth: float) -> None:
    logits = torch.randn(3, 50, device=DEVICE)
    logits[:, 3] -= depth
    check([logits], [], torch.full((3,), 3, device=DEVICE))


def test_equal_logits_have_no_kl() -> None:
    (logits,), _, ids = problem("logits", 3, 40_000, BF16)
    mask = torch.ones(3, dtype=torch.bool, device=DEVICE)
    upstream = torch.tensor([[0.0, 0.0, 1.0]], device=DEVICE).repeat(3, 1)
    logits[0, ids[0]] = 20  # a likely token
    for kl in ("reverse", "forward"):
        for head in (PLAIN, CAPPED):
            found = forward([logits], [logits], ids, mask, head, kl)
            assert torch.equal(found[0], found[2]) and not found[3].any()
            (gradient,) = fused([logits], [logits], upstream, ids, head, kl)
            assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_nan_and_inf_reach_the_statistics_of_their_row_alone(bad: float) -> None:
    leaves, anchor, ids = problem("logits", 3, 40_000, BF16)
    mask = torch.ones(3, dtype=torch.bool, device=DEVICE)
    leaves[0][1, 39_999], anchor[0][2, 0] = bad, bad
    found = forward(leaves, anchor, ids, mask, PLAIN, "reverse")
    nan = [values.isnan().tolist() for values in found[:4]]
    policy, anchored = [False, True, False], [False, False, True]
    assert nan == [policy, policy, anchored, [False, True, True]]
    upstream = torch.ones(3, 3, device=DEVICE)
    for gradient_of in (backward, fused):
        (gradient,) = gradient_of(leaves, anchor, upstream, ids, PLAIN, "reverse", found[4])
        assert gradient.isnan().any(1).tolist() == [False, True, True]


def test_ids_outside_the_vocabulary() -> None:
    """NaN, and never a read out of bounds."""
    leaves, anchor, _ = problem("logits", 3, 7)
    ids = torch.tensor([3, 7, -1], device=DEVICE)
    found = forward(leaves, anchor, ids, some_mask(3) | True, PLAIN, "reverse")
    for values in (found[0], found[2], found[3]):
        assert values.isnan().tolist() == [False, True, True]
    (gradient,) = fused(leaves, anchor, torch.ones(3, 3, device=DEVICE), ids, PLAIN, "reverse")
    assert gradient.isnan().any(1).tolist() == [False, True, True]


@pytest.mark.parametrize("kl", ["", "reverse", "forward"])
def test_state_is_that_of_triton(kl: str) -> None:
    leaves, anchor, ids = problem("logits", 3, 40_000, BF16)
    mask, upstream = some_mask(3), torch.randn(3, 3, device=DEVICE) * some_mask(3)[:, None]
    arguments = (*leaves, ids, mask, *anchor, *CAPPED, kl, True)
    theirs = kernels.token_stats_triton(*arguments)[4]
    ours = forward(leaves, anchor, ids, mask, CAPPED, kl)[4]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    found = [backward(leaves, anchor, upstream, ids, CAPPED, kl, x)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=2**-7, atol=1e-6)


def test_elements_past_2_to_the_31() -> None:
    """Three rows 2^30 elements apart, of which only the first few are ever touched."""
    stride = 2**30 + 8
    far = torch.empty(2 * stride + 8, dtype=BF16, device=DEVICE).as_strided((3, 7), (stride, 1))
    (near,), _, ids = problem("logits", 3, 7, BF16)
    far.copy_(near)
    mask, upstream = some_mask(3) | True, torch.ones(3, 3, device=DEVICE)
    found = forward([far], [far], ids, mask, CAPPED, "")
    expected = forward([near], [near], ids, mask, CAPPED, "")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    gradients = [backward([x], [], upstream, ids, CAPPED, "", found[4])[0] for x in (far, near)]
    assert torch.equal(*gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("kl", ["reward", "k3", "reverse", "forward"])
def test_public_loss(kl: Any) -> None:
    (logits,), (anchor,), ids = problem("logits", 6, 1000, BF16)

    def results(backend: str) -> list[Tensor]:
        leaf = logits.view(2, 3, -1).detach().requires_grad_()
        found = warp_fast.warp_loss(
            leaf, ids.view(2, 3), torch.ones(2, device=DEVICE), anchor_logits=anchor.view_as(leaf),
            kl=kl, softcap=3.0, return_entropy=True, backend=backend,
        )  # fmt: skip
        assert found.entropy is not None
        total = found.loss + (found.entropy + found.kl).sum()
        return [found.loss.detach(), found.kl.detach(), *torch.autograd.grad(total, leaf)]

    for a, b in zip(results("cuda"), results("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == BF16 else 1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("kl", ["reward", "none", "reverse", "forward"])
def test_loss_in_place(kl: Any, dtype: torch.dtype) -> None:
    """By one launch where the coefficients are known; a token without any keeps its statistics."""
    (wide,), (anchor,), ids = problem("logits", 6, 1000, dtype)
    start = wide.view(2, 3, -1).requires_grad_()
    advantages = torch.tensor([0.0, 1.0], device=DEVICE)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]], device=DEVICE)
    options: dict[str, Any] = {"mask": mask, "kl": kl, "softcap": 3.0, "backend": "cuda"}
    options["anchor_logits"] = anchor.view_as(start)

    def results(in_place: bool, scale: float) -> list[Tensor]:
        logits, given = start * 1, ids.view(2, 3)
        found = warp_fast.warp_loss(logits, given, advantages, in_place=in_place, **options)
        (gradient,) = torch.autograd.grad(found.loss * scale, start)
        return [*[x.detach() for x in found[:4]], gradient]

    for scale in (1.0, 0.25):
        for a, b in zip(results(True, scale), results(False, scale), strict=True):
            torch.testing.assert_close(a, b, rtol=2**-7 if a.dtype == BF16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_scaling(dtype: torch.dtype) -> None:
    check_scaling(native.scale_cuda_, dtype)


@pytest.mark.gpu
def test_op_is_traced() -> None:
    (logits,), (anchor,), ids = problem("logits", 2, 7)
    leaf, mask = logits.requires_grad_(), torch.ones(2, dtype=torch.bool, device=DEVICE)
    op = _stats_ops.TOKEN_STATS["cuda"]
    torch.library.opcheck(op, (leaf, ids, mask, anchor, 0.7, 3.0, "reverse", True))

    def logprobs(x: Tensor) -> Any:
        return warp_fast.token_logprobs(x, ids, backend="cuda")

    compiled = torch.compile(logprobs, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(leaf), logprobs(leaf))


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    """Other logits, ids and mask at the replay than at the capture."""
    first, second = (problem("logits", 5, 50_257, BF16) for _ in range(2))
    inputs = [first[0][0], first[1][0], first[2], torch.ones(5, dtype=torch.bool, device=DEVICE)]
    upstream = torch.randn(5, 3, device=DEVICE)

    def run(logits: Tensor, anchor: Tensor, ids: Tensor, mask: Tensor) -> list[Tensor]:
        found = forward([logits], [anchor], ids, mask, CAPPED, "reverse")
        saved = backward([logits], [anchor], upstream, ids, CAPPED, "reverse", found[4])
        again = logits.clone()
        both = native.token_stats_fused_cuda_(
            again, upstream, ids, mask, anchor, *CAPPED, "reverse"
        )
        return [*found, *saved, *both, again]

    run(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*inputs)
    for given, new in zip(inputs, (*second[0], *second[1], second[2], some_mask(5)), strict=True):
        given.copy_(new)
    graph.replay()
    for a, b in zip(captured, run(*inputs), strict=True):
        assert torch.equal(a, b)
