"""The losses where numbers are hard: extreme logits, tiny KLs; and what they estimate, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import warp_fast
from tests.tolerances import assert_close, largest
from warp_fast._backend import able

BACKENDS = able("loss", "cpu")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INF = float("inf")

served = pytest.mark.parametrize("backend", BACKENDS)
Found = tuple[dict[str, Tensor], Tensor]


def log_softmax(logits: Tensor, dtype: torch.dtype = FP64) -> Tensor:
    return torch.log_softmax(logits.to(dtype), -1)


def expectation(logp: Tensor, values: Tensor) -> Tensor:
    """sum p x, where a token without probability counts nothing."""
    return torch.where(logp == -INF, 0, logp.exp() * values).sum(-1)


def plain(logits: Tensor, ids: Tensor, dtype: torch.dtype) -> Found:
    """(logprobs and entropy, their gradient) in `dtype`."""
    leaf = logits.detach().to(dtype).requires_grad_()
    logp = log_softmax(leaf, dtype)
    values = {"logprobs": logp.gather(-1, ids[:, None])[:, 0]}
    values["entropy"] = -expectation(logp, logp.masked_fill(logp == -INF, 0))
    (gradient,) = torch.autograd.grad(values["logprobs"].sum(), leaf)
    return {name: value.detach() for name, value in values.items()}, gradient


def check_logprobs(form: str, logits: Tensor, ids: Tensor, backend: str) -> None:
    """Finite, never positive, and as near to float64 as the plain formula in fp32."""
    logits = logits.detach().requires_grad_()
    options: dict[str, Any] = {"return_entropy": True, "backend": backend}
    if form == "logits":
        logp, entropy = warp_fast.token_logprobs(logits, ids, **options)
    else:
        # the logits as hidden states of a head that copies them
        head = torch.eye(logits.shape[1], dtype=logits.dtype)
        logp, entropy = warp_fast.linear_token_logprobs(logits, head, ids, **options)
    (gradient,) = torch.autograd.grad(logp.sum(), logits)
    gold, gold_gradient = plain(logits, ids, FP64)
    eager, _ = plain(logits, ids, torch.promote_types(logits.dtype, FP32))
    _, eager_gradient = plain(logits, ids, logits.dtype)
    assert (logp <= 0).all() and (entropy >= 0).all()
    # the scores are as large as the finite logits, so one rounding of them is too
    scale = 1 + largest(logits[logits.isfinite()])
    assert_close("logprobs", logp, gold["logprobs"], eager["logprobs"], scale)
    assert_close("entropy", entropy, gold["entropy"], eager["entropy"])
    assert_close("gradient", gradient, gold_gradient, eager_gradient)


both = pytest.mark.parametrize("form", ["logits", "linear"])


@served
@both
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
def test_logits_of_1e4(dtype: torch.dtype, form: str, backend: str) -> None:
    """Ties at the top, so that the probability of one token is 1, a half, or 0."""
    logits = (torch.randint(0, 2, (40, 7)) * 2.0 - 1) * 1e4
    check_logprobs(form, logits.to(dtype), torch.randint(0, 7, (40,)), backend)


@served
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
@pytest.mark.parametrize("kept", [1, 2, 5])
def test_tokens_at_minus_infinity(kept: int, dtype: torch.dtype, backend: str) -> None:
    """As a logits processor leaves them; the sampled token is among the finite ones."""
    logits = torch.randn(6, 9) * 4
    logits[:, kept:] = -INF
    check_logprobs("logits", logits.to(dtype), torch.randint(0, kept, (6,)), backend)
    if kept == 1:
        logp = warp_fast.token_logprobs(logits, torch.zeros(6, dtype=torch.long), backend=backend)
        assert torch.equal(logp, torch.zeros(6))


@served
@both
@pytest.mark.parametrize("depth", [88.0, 104.0, 300.0])
def test_logprobs_whose_probability_underflows(depth: float, form: str, backend: str) -> None:
    """exp is subnormal below -87 and 0 below -103 in fp32; the log-probability is neither."""
    logits = torch.randn(8, 50)
    logits[:, 3] -= depth
    check_logprobs(form, logits, torch.full((8,), 3), backend)


@served
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_logprobs_are_never_positive(dtype: torch.dtype, backend: str) -> None:
    """Of the likeliest token, from almost certain to certain: where rounding can pass 0."""
    logits = torch.randn(500, 1000) + 5
    logits[:, 0] = torch.linspace(5, 40, 500)
    ids = torch.zeros(500, dtype=torch.long)
    for temperature in (1.0, 0.37):
        logp = warp_fast.token_logprobs(
            logits.to(dtype), ids, temperature=temperature, backend=backend
        )
        assert (logp <= 0).all() and (logp > -40 / temperature).all()


def plain_kl(kl: str, logits: Tensor, anchor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(exact KL per row, gradient of its sum)."""
    leaf = logits.detach().to(dtype).requires_grad_()
    logp, logq = log_softmax(leaf, dtype), log_softmax(anchor, dtype)
    first, second = (logp, logq) if kl == "reverse" else (logq, logp)
    values = expectation(first, (first - second).masked_fill(first == -INF, 0))
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


@served
@pytest.mark.parametrize("kl", ["reverse", "forward"])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_exact_kl_of_far_apart_rows(scale: float, kl: Any, backend: str) -> None:
    """KLs up to 2e4 nats, and tokens that both have at minus infinity."""
    logits, anchor = torch.randn(2, 1, 20, 9).mul(scale).unbind()
    logits[..., 7:], anchor[..., 7:] = -INF, -INF
    logits.requires_grad_()
    result = warp_fast.warp_loss(
        logits, torch.randint(0, 7, (1, 20)), torch.zeros(1), anchor_logits=anchor, kl=kl,
        beta=1.0, backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(result.loss, logits)
    gold, gold_gradient = plain_kl(kl, logits, anchor, FP64)
    eager, eager_gradient = plain_kl(kl, logits, anchor, FP32)
    assert (result.kl >= 0).all()
    assert_close("kl", result.kl, gold, eager)
    assert_close("gradient", gradient, gold_gradient, eager_gradient)


@served
def test_forward_kl_of_tokens_that_the_anchor_bars(backend: str) -> None:
    """The policy has them, the anchor at minus infinity: they count nothing in KL(anchor || pi)."""
    logits, anchor = torch.randn(2, 1, 20, 9).unbind()
    anchor[..., 5:] = -INF
    logits.requires_grad_()
    result = warp_fast.warp_loss(
        logits, torch.randint(0, 9, (1, 20)), torch.zeros(1), anchor_logits=anchor, kl="forward",
        beta=1.0, backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(result.loss, logits)
    gold, gold_gradient = plain_kl("forward", logits, anchor, FP64)
    eager, eager_gradient = plain_kl("forward", logits, anchor, FP32)
    assert_close("kl", result.kl, gold, eager)
    assert_close("gradient", gradient, gold_gradient, eager_gradient)


@served
def test_softcap_bounds_extreme_logits(backend: str) -> None:
    logits = torch.tensor([[1e4, -1e4, -INF, INF, 0.0]]).repeat(5, 1).requires_grad_()
    logp = warp_fast.token_logprobs(logits, torch.arange(5), softcap=30.0, backend=backend)
    gold = log_softmax(torch.tensor([30.0, -30.0, -30.0, 30.0, 0.0]))
    torch.testing.assert_close(logp.double(), gold, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(logp.sum(), logits)
    # the cap is flat at all but the last
    assert not gradient[:, :4].any() and gradient[:, 4].all()


def near_policies(ulps: int, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, anchor hidden, weight, ids) in bf16; a share of the anchor is some ulps away.

    Rows are peaked as those of a language model are: some logit is near the softcap of 30.
    """
    hidden, weight = torch.randn(256, 64).to(BF16), torch.randn(2000, 64).to(BF16)
    moved = (torch.rand(256, 64) < share).short() * ulps
    anchor = (hidden.view(torch.int16) + moved).view(BF16)
    p = log_softmax(capped(hidden.double(), weight.double())).exp()
    return hidden, anchor, weight, torch.multinomial(p, 1)[:, 0]


def capped(hidden: Tensor, weight: Tensor) -> Tensor:
    return 30 * torch.tanh(hidden @ weight.T / 30)


def kl_through_logits(
    kl: str, dtype: torch.dtype, hidden: Tensor, anchor: Tensor, weight: Tensor, ids: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(KL per token, its gradients) with logits rounded to `dtype`, the rest in fp32 or better."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    fine = torch.promote_types(dtype, FP32)
    logp = log_softmax(capped(*leaves), fine)
    logq = log_softmax(capped(anchor.to(dtype), weight.detach().to(dtype)), fine)
    d = (logp - logq).gather(1, ids[:, None])[:, 0]
    values = expectation(logp, logp - logq) if kl == "reverse" else d.square() / 2
    return values.detach(), torch.autograd.grad(values.sum(), leaves)


def distance(found: Tensor, gold: Tensor) -> float:
    return float((found.double() - gold).norm() / gold.norm())


# (ulps, share of the entries): KLs of 3e-5, 2e-4 and 8e-4 nats per token
@served
@pytest.mark.parametrize("ulps, share", [(1, 0.125), (4, 1.0), (8, 1.0)])
@pytest.mark.parametrize("kl", ["reverse", "k2"])
def test_kl_gradient_to_a_slow_anchor(kl: Any, ulps: int, share: float, backend: str) -> None:
    """From bf16 hidden states it is right; from bf16 logits it is noise, so those are not made."""
    hidden, anchor, weight, ids = near_policies(ulps, share)
    values, gold = kl_through_logits(kl, FP64, hidden, anchor, weight, ids)
    assert 1e-5 < values.mean() < 1e-3
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    result = warp_fast.linear_warp_loss(
        hidden, weight, ids, torch.zeros(1), anchor_hidden=anchor, beta=1.0, kl=kl, softcap=30.0,
        cu_seqlens=torch.tensor([0, 256]), backend=backend,
    )  # fmt: skip
    ours = torch.autograd.grad(result.loss, leaves)
    _, rounded = kl_through_logits(kl, BF16, hidden, anchor, weight, ids)
    for found, other, exact in zip(ours, rounded, gold, strict=True):
        assert distance(found, exact) < 0.01
        assert distance(other, exact) > 1
    assert distance(result.kl.detach(), values) < 0.02


@served
@pytest.mark.parametrize("moved", ["policy", "anchor"])
@pytest.mark.parametrize("apart", [20.0, 1e4])
@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_a_small_kl_of_scores_that_lie_apart(
    kl: Any, apart: float, moved: str, backend: str
) -> None:
    """A softmax knows nothing of a constant, and fp32 loses digits to it."""
    logits = 3 * torch.randn(4, 2000)
    anchor = logits + 0.02 * torch.randn(4, 2000)
    (logits if moved == "policy" else anchor).add_(apart)
    found, slopes = {}, {}
    for dtype, by in ((FP32, backend), (FP64, "reference")):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        result = warp_fast.warp_loss(
            leaf, torch.arange(4), torch.zeros(1), anchor_logits=anchor.to(dtype), beta=1.0, kl=kl,
            cu_seqlens=torch.tensor([0, 4]), backend=by,
        )  # fmt: skip
        (slopes[dtype],) = torch.autograd.grad(result.loss, leaf)
        found[dtype] = result.kl.detach()
    assert (1e-4 < found[FP64]).all() and (found[FP64] < 1e-3).all()
    assert distance(found[FP32], found[FP64]) < 0.02
    assert distance(slopes[FP32], slopes[FP64]) < 1e-3


class Completions:
    """Every completion of one or two tokens from 3, with its probability and reward, in float64.

    A policy is [4, 3]: logits of the first token, then of the second after each first.
    """

    def __init__(self, length: int) -> None:
        self.policy, self.anchor = torch.randn(2, 4, 3, dtype=FP64).unbind()
        self.policy.requires_grad_()
        self.ids = torch.cartesian_prod(*[torch.arange(3)] * length).view(-1, length)
        self.rewards = torch.randn(len(self.ids), dtype=FP64)

    def logits(self, policy: Tensor) -> Tensor:
        """[completions, length, 3]."""
        first = policy[:1].expand(len(self.ids), 3)
        return torch.stack([first, policy[1 + self.ids[:, 0]]], 1)[:, : self.ids.shape[1]]

    def logprobs(self, policy: Tensor) -> Tensor:
        """[completions, length]."""
        return log_softmax(self.logits(policy)).gather(-1, self.ids[..., None])[..., 0]

    def expected(self, output: str, kl: Any, backend: str) -> Tensor:
        """Gradient of the loss of one completion, averaged with the probability of each."""
        probability = self.logprobs(self.policy).sum(1).exp().detach()
        mean = torch.zeros((), dtype=FP64)
        logits, anchor = self.logits(self.policy), self.logits(self.anchor)
        for i, p in enumerate(probability):
            one = slice(i, i + 1)
            result = warp_fast.warp_loss(
                logits[one], self.ids[one], self.rewards[one], anchor_logits=anchor[one], kl=kl,
                beta=0.3, backend=backend,
            )  # fmt: skip
            mean = mean + p * getattr(result, output).sum()
        return torch.autograd.grad(mean, self.policy)[0]

    def exact(self, kl: Tensor) -> Tensor:
        """Gradient of -E[r] + beta KL."""
        reward = (self.logprobs(self.policy).sum(1).exp() * self.rewards).sum()
        return torch.autograd.grad(0.3 * kl - reward, self.policy)[0]

    def sequence_kl(self) -> Tensor:
        logp, logq = self.logprobs(self.policy).sum(1), self.logprobs(self.anchor).sum(1)
        return (logp.exp() * (logp - logq)).sum()

    def token_kl(self, forward: bool) -> Tensor:
        """KLs of the next token, after prefixes that are taken as given."""
        logp, logq = log_softmax(self.policy), log_softmax(self.anchor)
        first, second = (logq, logp) if forward else (logp, logq)
        kl = (first.exp() * (first - second)).sum(-1)
        reached = torch.cat([torch.ones(1), logp[0].exp().detach() * (self.ids.shape[1] > 1)])
        return (reached * kl).sum()


@served
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("kl", ["reward", "reward_to_go"])
def test_reward_kl_descends_the_kl_of_the_sequence(kl: str, length: int, backend: str) -> None:
    all_ = Completions(length)
    torch.testing.assert_close(all_.expected("loss", kl, backend), all_.exact(all_.sequence_kl()))


@served
@pytest.mark.parametrize("kl", ["k2", "reverse", "k3", "forward"])
def test_kl_as_a_loss_descends_the_kl_of_the_next_token(kl: str, backend: str) -> None:
    """k2 as the exact reverse KL, k3 as the exact forward KL; the prefix is not credited."""
    forward = kl in ("k3", "forward")
    two = Completions(2)
    found = two.expected("loss", kl, backend)
    torch.testing.assert_close(found, two.exact(two.token_kl(forward)))
    assert distance(found, two.exact(two.sequence_kl())) > 0.01
    if not forward:
        one = Completions(1)
        exact = one.exact(one.sequence_kl())
        torch.testing.assert_close(one.expected("loss", kl, backend), exact)


@served
@pytest.mark.parametrize("length", [1, 2])
def test_k1_as_a_loss_would_do_nothing(length: int, backend: str) -> None:
    gradient = Completions(length).expected("kl", "reward", backend)
    torch.testing.assert_close(gradient, torch.zeros(4, 3, dtype=FP64), rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match="kl='k1' as a loss has zero gradient in expectation"):
        Completions(length).expected("loss", "k1", backend)
