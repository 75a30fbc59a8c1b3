"""The Triton kernels of the loss against float64: statistics of sampled tokens and their gradient.

On CUDA tensors where there is a GPU, else on CPU tensors under the interpreter of Triton.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.loss_rows import (
    DEVICE,
    INF,
    PLAIN,
    Head,
    backward,
    check,
    check_a_constant_apart,
    check_scaling,
    forward,
    kernels,
    problem,
    some_mask,
)
from warp_fast._loss_rows import Found
from warp_fast.reference.loss import scaled_reference

# numpy says so where the kernels compute both sides of a choice
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CAPPED = (0.7, 5.0)

both = pytest.mark.parametrize("form", ["logits", "linear"])


@both
@pytest.mark.parametrize("head", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("kl", [None, "", "reverse", "forward"])
def test_every_kl_with_mask_softcap_and_temperature(kl: str | None, head: Head, form: str) -> None:
    leaves, anchor, ids = problem(form, 3, 257, kl=kl)
    check(leaves, anchor, ids, some_mask(3), head, kl or "")


@both
@pytest.mark.parametrize("dtype", [BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_dtypes(kl: str, dtype: torch.dtype, form: str) -> None:
    check(*problem(form, 3, 7, dtype), None, CAPPED, kl)


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_policy_and_anchor_a_constant_apart(kl: str) -> None:
    check_a_constant_apart(forward, kl)


@pytest.mark.parametrize("dtypes", [(BF16, FP32), (FP32, FP16), (BF16, FP64)], ids=str)
def test_anchor_of_another_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    leaves, anchor, ids = problem("logits", 2, 9)
    check([leaves[0].to(dtypes[0])], [anchor[0].to(dtypes[1])], ids, kl="reverse")


@both
@pytest.mark.parametrize("size", [1, 7, 8, 1000, 2100])
def test_one_row(size: int, form: str) -> None:
    check(*problem(form, 1, size, BF16), kl="reverse")


@pytest.mark.parametrize("kl", ["reverse", "forward"])
@pytest.mark.parametrize("size", [1024, 2500])
def test_a_row_of_several_pieces(monkeypatch: pytest.MonkeyPatch, size: int, kl: str) -> None:
    monkeypatch.setattr(kernels, "_PIECE", 1024)
    leaves, anchor, _ = problem("logits", 2, size)
    check(leaves, anchor, torch.tensor([0, size - 1], device=DEVICE), None, CAPPED, kl)


def test_a_row_gives_the_same_bits_in_any_batch() -> None:
    leaves, anchor, ids = problem("logits", 4, 300, BF16)
    mask = torch.ones(4, dtype=torch.bool, device=DEVICE)
    together = forward(leaves, anchor, ids, mask, CAPPED, "reverse")
    one = slice(2, 3)
    single = forward([leaves[0][one]], [anchor[0][one]], ids[one], mask[one], CAPPED, "reverse")
    assert all(torch.equal(whole[one], part) for whole, part in zip(together, single, strict=True))


@both
@pytest.mark.parametrize("kept", [0, 1])
def test_what_a_mask_hides_is_not_read(kept: int, form: str) -> None:
    """NaN, inf and ids of anything there; the other rows as if alone; nothing of no row."""
    leaves, anchor, ids = problem(form, 2, 7)
    mask = torch.tensor([kept == 1, False], device=DEVICE)
    for given, garbage in ((leaves, float("nan")), (anchor, INF)):
        given[0][~mask] = garbage
    ids[~mask] = torch.tensor([-1, 10**12], device=DEVICE)[~mask]
    found = forward(leaves, anchor, ids, mask, CAPPED, "reverse")
    upstream = torch.where(mask[:, None], 1.0, 0.0).expand(2, 3)
    gradients = backward(leaves, anchor, upstream, ids, CAPPED, "reverse")
    assert not any(values[~mask].any() for values in found)
    assert not gradients[0][~mask].any()
    for values in (*found, *gradients):
        assert values.isfinite().all() and bool(values.any()) == bool(kept)


@both
def test_no_rows(form: str) -> None:
    leaves, anchor, ids = problem(form, 0, 7)
    assert [len(x) for x in forward(leaves, anchor, ids, some_mask(0), CAPPED, "reverse")] == [
        0
    ] * 5
    upstream = torch.zeros(0, 3, device=DEVICE)
    for leaf, found in zip(
        leaves, backward(leaves, anchor, upstream, ids, CAPPED, "reverse"), strict=True
    ):
        assert found.shape == leaf.shape and not found.any()


@both
def test_strided_arguments(form: str) -> None:
    def spread(tensor: Tensor) -> Tensor:
        """The same numbers, two dimensions swapped and every stride doubled in memory."""
        turned = tensor.permute(*reversed(range(tensor.dim())))
        return turned.repeat_interleave(2, -1)[..., ::2].permute(*reversed(range(tensor.dim())))

    leaves, anchor, ids = problem(form, 3, 9)
    spread_leaves, spread_anchor = [spread(x) for x in leaves], [spread(x) for x in anchor]
    check(spread_leaves, spread_anchor, spread(ids), spread(some_mask(3)), CAPPED, "forward")
    if form == "logits":
        check([leaves[0][:1].expand(3, 9)], anchor, ids, kl="reverse")
        check([leaves[0].T.contiguous().T], [anchor[0][:, :9]], ids, kl="reverse")


@pytest.mark.parametrize("kl", ["", "reverse"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_logits_of_1e4(dtype: torch.dtype, kl: str) -> None:
    """Ties at the top, so that the probability of one token is 1, a half, or 0."""
    logits = (torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 1, 1.0]]) * 2 - 1) * 1e4
    logits = logits.to(dtype).to(DEVICE)
    check([logits], [logits.roll(1, 1)], torch.tensor([0, 1, 0, 2], device=DEVICE), kl=kl)


@pytest.mark.parametrize("kept", [1, 2, 5])
def test_tokens_at_minus_infinity(kept: int) -> None:
    leaves, anchor, ids = problem("logits", 3, 9)
    for given in (leaves, anchor):
        given[0][:, kept:] = -INF
    check(leaves, anchor, ids % kept, kl="forward")
    if kept == 1:
        mask = torch.ones(3, dtype=torch.bool, device=DEVICE)
        found = forward(leaves, anchor, ids % 1, mask, PLAIN, "reverse")
        assert not any(values.any() for values in found[:4])


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_an_infinite_kl_that_nobody_asks_the_gradient_of(kl: str) -> None:
    """One that is watched, with a beta of 0."""
    leaves, anchor, ids = problem("logits", 3, 9)
    (anchor if kl == "reverse" else leaves)[0][:, 5] = -INF
    found = forward(leaves, anchor, ids % 5, some_mask(3), PLAIN, kl)
    assert (found[3][some_mask(3)] == INF).all()
    upstream = torch.tensor([1.0, 0.0, 0.0], device=DEVICE) * some_mask(3)[:, None]
    given = backward(leaves, anchor, upstream, ids % 5, PLAIN, kl, found[4])
    torch.testing.assert_close(given, backward(leaves, [], upstream, ids % 5, PLAIN, ""))


@both
@pytest.mark.parametrize("depth", [88.0, 104.0, 300.0])
def test_logprobs_whose_probability_underflows(depth: float, form: str) -> None:
    logits = torch.randn(3, 50, device=DEVICE)
    logits[:, 3] -= depth
    head = [] if form == "logits" else [torch.eye(50, device=DEVICE)]
    check([logits, *head], [], torch.full((3,), 3, device=DEVICE))


def test_softcap_bounds_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, -INF, INF, 0.0]], device=DEVICE).repeat(5, 1)
    ids, mask = torch.arange(5, device=DEVICE), torch.ones(5, dtype=torch.bool, device=DEVICE)
    capped = torch.tensor([30.0, -30.0, -30.0, 30.0, 0.0], dtype=FP64, device=DEVICE)
    found = forward([logits], [], ids, mask, (1.0, 30.0), "")
    torch.testing.assert_close(found[0].double(), capped.log_softmax(0), rtol=1e-6, atol=1e-6)
    upstream = torch.ones(5, 3, device=DEVICE)
    (gradient,) = backward([logits], [], upstream, ids, (1.0, 30.0), "")
    # the cap is flat at all but the last
    assert not gradient[:, :4].any() and gradient[:, 4].all()


def test_tanh_of_every_size() -> None:
    """Each the logit of one token of a row with a softcap of 1; relative, also where it is flat."""
    x = torch.cat([torch.logspace(-6, 1.2, 10), torch.tensor([0.624, 0.626, 40.0])]).to(DEVICE)
    logits = torch.cat([x, -x])[None].requires_grad_()
    ids = torch.zeros(1, dtype=torch.long, device=DEVICE)
    upstream = torch.tensor([[1.0, 0, 0]], device=DEVICE)
    (found,) = backward([logits.detach()], [], upstream, ids, (1.0, 1.0), "")
    logp = torch.log_softmax(torch.tanh(logits.double()), -1)[:, 0]
    (exact,) = torch.autograd.grad(logp.sum(), logits)
    # 1 - tanh^2 keeps no digits in the oracle below its atol
    torch.testing.assert_close(found, exact, rtol=2e-6, atol=1e-16)


def test_ids_outside_the_vocabulary() -> None:
    """An error where looking at them costs nothing, else NaN, and never a read out of bounds."""
    leaves, _, _ = problem("logits", 2, 7)
    ids, mask = torch.tensor([3, 7], device=DEVICE), some_mask(2) | True
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"in \[0, 7\); row 1 has 7"):
            forward(leaves, [], ids, mask, PLAIN, "")
    out = Found.empty(leaves[0], 2, FP32)
    kernels.row_statistics(kernels.Rows.of(*leaves, None, ids, mask, (*PLAIN, "")), out, True)
    assert out[0].isnan().tolist() == [False, True]


def test_gradient_in_place_of_the_logits() -> None:
    (logits,), (anchor,), ids = problem("logits", 3, 300, BF16)
    kept = some_mask(3)
    upstream = torch.randn(3, 3, device=DEVICE) * kept[:, None]
    *_, state = forward([logits], [anchor], ids, kept, CAPPED, "reverse")
    (expected,) = backward([logits], [anchor], upstream, ids, CAPPED, "reverse", state)
    rows = kernels.Rows.of(logits, anchor, ids, kept, (*CAPPED, "reverse"))
    kernels.row_gradient(rows, state, upstream, logits)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_elements_past_2_to_the_31(dimensions: int, tmp_path: Path) -> None:
    """Three rows 2^30 elements apart, of which only the first few are ever touched."""
    stride = 2**30 + 8
    if DEVICE == "cpu":
        path = str(tmp_path / "sparse")
        memory = torch.from_file(path, shared=True, size=2 * stride + 8, dtype=BF16)
    else:
        memory = torch.empty(2 * stride + 8, dtype=BF16, device=DEVICE)
    far = memory.as_strided((3, 7), (stride, 1))
    (near,), _, ids = problem("logits", 3, 7, BF16)
    far.copy_(near)
    if dimensions == 3:
        near, far = near[:, None], far[:, None]
    mask, upstream = some_mask(3) | True, torch.ones(3, 3, device=DEVICE)
    found = forward([far], [far], ids, mask, CAPPED, "")
    for a, b in zip(found, forward([near], [near], ids, mask, CAPPED, ""), strict=True):
        assert torch.equal(a, b)
    (expected,) = backward([near], [], upstream, ids, CAPPED, "", found[4])
    rows = kernels.Rows.of(far, None, ids, mask, (*CAPPED, ""))
    kernels.row_gradient(rows, found[4], upstream, far)
    assert torch.equal(far, expected)


@both
def test_state_that_is_not_given_is_found_again(form: str) -> None:
    leaves, anchor, ids = problem(form, 3, 9)
    upstream = torch.randn(3, 3, device=DEVICE) * some_mask(3)[:, None]
    *_, state = forward(leaves, anchor, ids, some_mask(3), CAPPED, "forward")
    given = backward(leaves, anchor, upstream, ids, CAPPED, "forward", state)
    again = backward(leaves, anchor, upstream, ids, CAPPED, "forward")
    assert all(torch.equal(a, b) for a, b in zip(given, again, strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
@pytest.mark.parametrize("kl", ["", "reverse"])
def test_gradient_over_the_logits(kl: str, dtype: torch.dtype) -> None:
    """Of rows that are whole, cut out of a wider matrix, and not contiguous."""
    (wide,), (anchor,), ids = problem("logits", 3, 70, dtype)
    fine = FP64 if dtype == FP64 else FP32
    upstream = torch.randn(3, 3, dtype=fine, device=DEVICE) * some_mask(3)[:, None]
    for logits in (wide.clone(), wide.clone()[:, 1:64], wide.T.contiguous().T):
        other = anchor[:, : logits.shape[1]]
        arguments = (logits, ids % 60, other, *CAPPED, kl)
        expected = kernels.token_stats_backward_triton(upstream, *arguments)
        kernels.token_stats_backward_triton(upstream, *arguments, out=logits)
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_batches_apart(dtype: torch.dtype) -> None:
    """A slice in time, beside an anchor that is whole or has time before the batch."""
    (wide,), (anchor,), ids = problem("logits", 8, 70, dtype)
    logits, whole = wide.view(2, 4, 70)[:, :-1], anchor[2:].view(2, 3, 70)
    early = whole.transpose(0, 1).contiguous().transpose(0, 1)
    ids, mask = ids[2:], some_mask(6)
    fine = FP64 if dtype == FP64 else FP32
    upstream = torch.randn(6, 3, dtype=fine, device=DEVICE) * mask[:, None]
    even = [x.reshape(6, 70) for x in (logits, whole)]
    expected = forward(even[:1], even[1:], ids, mask, CAPPED, "reverse")
    gradient = backward(even[:1], even[1:], upstream, ids, CAPPED, "reverse")[0].view(2, 3, 70)
    for other in (whole, even[1], early):
        found = forward([logits], [other], ids, mask, CAPPED, "reverse")
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
        again = backward([logits], [other], upstream, ids, CAPPED, "reverse")[0]
        assert torch.equal(again, gradient)
    last = wide.view(2, 4, 70)[:, -1].clone()
    arguments = (upstream, logits, ids, early, *CAPPED, "reverse")
    kernels.token_stats_backward_triton(*arguments, out=logits)
    assert torch.equal(logits, gradient)
    kernels.scale_triton_(logits, torch.tensor(0.5, dtype=fine, device=DEVICE))
    assert torch.equal(logits, gradient * 0.5) and torch.equal(wide.view(2, 4, 70)[:, -1], last)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_scaling(dtype: torch.dtype) -> None:
    check_scaling(kernels.scale_triton_, dtype)


@pytest.mark.parametrize("size", [0, 1, 4097])
@pytest.mark.parametrize("dtypes", [(FP32, BF16), (FP32, FP16), (FP64, FP32)], ids=str)
def test_scaled_is_rounded_once(dtypes: tuple[torch.dtype, torch.dtype], size: int) -> None:
    values = torch.randn(size, dtype=dtypes[0], device=DEVICE)
    factor = torch.tensor(1.3, dtype=dtypes[0], device=DEVICE)
    found = kernels.scaled_triton(values, factor, dtypes[1])
    assert torch.equal(found, scaled_reference(values, factor, dtypes[1]))


PUBLIC = """
import sys, warnings, torch, warp_fast
from warp_fast import _loss_ops, _stats_ops
warnings.simplefilter("ignore")
device = sys.argv[1]
torch.manual_seed(0)
V, D = 7, 4
ids = torch.randint(0, V, (1, 3), device=device)
mask = torch.tensor([[1, 0, 1]], device=device)
leaves = {
    "warp_loss": [torch.randn(1, 3, V, device=device)],
    "linear_warp_loss": [torch.randn(1, 3, D, device=device), torch.randn(V, D, device=device)],
}
names = {"warp_loss": ["logits"], "linear_warp_loss": ["hidden", "weight"]}
def results(function, backend, **options):
    mine = [x.clone().requires_grad_() for x in leaves[function]]
    anchor = {f"anchor_{k}": x * 0.9 for k, x in zip(names[function], leaves[function])}
    found = getattr(warp_fast, function)(
        *mine, ids, torch.ones(1, device=device), **anchor, mask=mask, temperature=0.7, softcap=3.0,
        return_entropy=True, backend=backend, **options
    )
    alone = torch.autograd.grad(found.loss, mine, retain_graph=True)
    total = found.loss + (found.entropy + found.kl).sum()
    found_all = [*[x.detach() for x in found], *alone, *torch.autograd.grad(total, mine)]
    if function == "warp_loss":
        over = warp_fast.warp_loss(
            mine[0] * 1, ids, torch.ones(1, device=device), **anchor, mask=mask, temperature=0.7,
            softcap=3.0, in_place=True, backend=backend, **options
        )
        found_all += [over.loss.detach(), *torch.autograd.grad(over.loss, mine)]
    return found_all
clipped = {"old_logprobs": -torch.rand(1, 3, device=device) - 1, "clip_range": 0.2}
for kl in ("reward", "reward_to_go", "k2", "k3", "reverse", "forward", "none"):
    for function in leaves:
        options = {"kl": kl, **(clipped if function == "warp_loss" else {})}
        expected = results(function, "reference", **options)
        for a, b in zip(results(function, "triton", **options), expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
flat = torch.randn(2, V, device=device, requires_grad=True)
rest = (ids[0, :2], mask[0, :2] != 0)
arguments = (flat, *rest, flat.detach() * 0.9, 0.7, 3.0, "reverse", True)
torch.library.opcheck(_stats_ops.TOKEN_STATS["triton"], arguments)
hidden, weight = flat[:, :D].detach().requires_grad_(), leaves["linear_warp_loss"][1]
arguments = (hidden, weight, *rest, hidden.detach(), weight, 0.7, None, "forward", False)
torch.library.opcheck(_stats_ops.LINEAR_TOKEN_STATS["triton"], arguments)
sequence, given = torch.zeros(2, dtype=torch.long, device=device), torch.ones(2, device=device)
strength = torch.tensor(0.1)
host = (rest[1].cpu().clone(), sequence.cpu().clone())
terms = (sequence, *host, 1, 2, given, None, -given, [0.2, 0.3], strength, "reward", *[True] * 3)
arguments = (hidden, weight, hidden.detach(), weight.detach(), 0.7, None, *rest, *terms)
torch.library.opcheck(_loss_ops.LINEAR_LOSS["triton"], arguments)
logprobs = lambda x: warp_fast.token_logprobs(x, ids[0, :2], backend="triton")
torch.testing.assert_close(
    torch.compile(logprobs, fullgraph=True, backend="aot_eager")(flat), logprobs(flat)
)
"""


def test_public_functions_and_ops() -> None:
    """In a process of its own: whether CPU tensors are served is decided when warp_fast loads."""
    subprocess.run([sys.executable, "-c", PUBLIC, DEVICE], check=True)
