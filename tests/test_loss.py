"""Values and gradients of the losses and log-probabilities against a naive float64 oracle."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import warp_fast
from tests.tolerances import assert_close, largest
from warp_fast._backend import able
from warp_fast._loss_checks import KINDS

BACKENDS = able("loss", "cpu")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = {"fp32": FP32, "bf16": BF16, "fp16": FP16, "fp64": FP64}
# one row; odd; a power of two plus one; many rows of a round vocabulary
SIZES = {
    f"B{b}-T{t}-V{v}": (b, t, v) for b, t, v in [(1, 1, 7), (2, 5, 7), (3, 4, 257), (2, 63, 1000)]
}
D = 6

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """Arguments of a loss as the caller gives them, padded [B, T, ...] or packed [N, ...].

    Attributes:
        leaves: "logits", or "hidden" and "weight" of the policy.
        anchor: the same of the anchor.
        bounds: where the sequences begin and end among the N tokens.
        outputs: what the gradient is taken of, weighted unequally over tokens.
    """

    leaves: Values
    anchor: Values
    token_ids: Tensor
    advantages: Tensor
    bounds: list[int]
    options: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("loss",)


def problem(
    form: str,
    size: tuple[int, int, int] = (2, 5, 7),
    dtype: torch.dtype = FP32,
    packed: bool = False,
    **options: Any,
) -> Problem:
    """Random arguments; the anchor is near the policy, as an average of it would be."""
    batch, length, vocabulary = size
    generator = torch.Generator().manual_seed(batch * length + vocabulary)
    shape = (batch * length,) if packed else (batch, length)

    def normal(*dims: int, std: float = 1) -> Tensor:
        return torch.randn(*dims, generator=generator) * std

    if form == "logits":
        leaves = {"logits": normal(*shape, vocabulary, std=3)}
    else:
        leaves = {"hidden": normal(*shape, D), "weight": normal(vocabulary, D, std=1.5)}
    anchor = {k: (v + normal(*v.shape, std=0.1)).to(dtype) for k, v in leaves.items()}
    bounds = [min(i * length, batch * length) for i in range(batch + 1)]
    if packed:
        # unequal sequences, one of them empty
        bounds = [0, 2, 2, batch * length]
        options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    token_ids = torch.randint(0, vocabulary, shape, generator=generator)
    advantages = normal(len(bounds) - 1)
    leaves = {k: v.to(dtype) for k, v in leaves.items()}
    return Problem(leaves, anchor, token_ids, advantages, bounds, options)


def some_mask(given: Problem) -> Tensor:
    """Every third token is out."""
    count = given.token_ids.numel()
    return (torch.arange(count) % 3 != 1).reshape(given.token_ids.shape)


def log_softmax_rows(head: Values, options: dict[str, Any]) -> Tensor:
    """[N, V]: scale, softcap, temperature, in that order."""
    logits = head["logits"] if "logits" in head else head["hidden"] @ head["weight"].T
    if options.get("softcap") is not None:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    return torch.log_softmax(logits.flatten(0, -2) / options.get("temperature", 1.0), -1)


def naive_token_kl(kl: str, d: Tensor, logp: Tensor, logq: Tensor) -> Tensor:
    """What WarpLoss.kl holds for one token."""
    if kl in ("reward", "reward_to_go"):
        return d
    formulas = {
        "k2": d * d / 2,
        "k3": torch.exp(-d) - 1 + d,
        "reverse": (logp.exp() * (logp - logq)).sum(),
        "forward": (logq.exp() * (logq - logp)).sum(),
    }
    return formulas.get(kl, torch.zeros_like(d))


def naive_gain(logp: Tensor, coefficient: Tensor, old: Tensor | None, clip: Any) -> Tensor:
    if old is None:
        return coefficient * logp
    ratio = torch.exp(logp - old)
    if clip is None:
        return ratio * coefficient
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    return torch.min(ratio * coefficient, ratio.clip(1 - low, 1 + high) * coefficient)


def naive_values(given: Problem, leaves: Values, dtype: torch.dtype) -> Values:
    """Token by token, as the docstring of warp_loss has it."""
    options, ids = given.options, given.token_ids.flatten().tolist()
    kl, beta = options.get("kl", "reward"), options.get("beta", 0.1)
    mask = options.get("mask", torch.ones_like(given.token_ids)).flatten().bool().tolist()
    logp = log_softmax_rows(leaves, options)
    logq = log_softmax_rows({k: v.to(dtype) for k, v in given.anchor.items()}, options)
    sampled = torch.stack([logp[n, i] * mask[n] for n, i in enumerate(ids)])
    anchor = torch.stack([logq[n, i] * mask[n] for n, i in enumerate(ids)])
    d = sampled - anchor
    entropy = torch.stack([-(row.exp() * row).sum() * m for row, m in zip(logp, mask, strict=True)])
    old = options.get("old_logprobs")
    advantages = given.advantages.to(dtype).flatten()
    per_token = given.advantages.shape == given.token_ids.shape
    token_kl, loss = [torch.zeros_like(x) for x in d], torch.zeros((), dtype=dtype)
    for i, (start, stop) in enumerate(zip(given.bounds, given.bounds[1:], strict=False)):
        rows = [n for n in range(start, stop) if mask[n]]
        for n in rows:
            coefficient = advantages[n if per_token else i]
            token_kl[n] = naive_token_kl(kl, d[n], logp[n], logq[n])
            if kl in ("reward", "reward_to_go"):
                later = [d[s] for s in rows if kl == "reward" or s >= n]
                coefficient = coefficient - beta * torch.stack(later).sum().detach()
            else:
                loss = loss + beta * token_kl[n]
            before = None if old is None else old.flatten()[n].to(dtype)
            loss = loss - naive_gain(sampled[n], coefficient, before, options.get("clip_range"))
    z = options.get("normalizer", "sequence")
    if isinstance(z, str):
        z = len(given.bounds) - 1 if z == "sequence" else sum(mask)
    found = {"logprobs": sampled, "anchor_logprobs": anchor, "kl": torch.stack(token_kl)}
    return {**found, "entropy": entropy, "loss": loss / z}


def gradients(given: Problem, leaves: Values, values: Values) -> Values:
    """Of the sum of the outputs, tokens weighted from 0.5 to 1.5."""
    total = torch.zeros((), dtype=FP64)
    for name in given.outputs:
        flat = values[name].flatten().double()
        total = total + (flat * torch.linspace(0.5, 1.5, len(flat))).sum()
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def naive(given: Problem, dtype: torch.dtype) -> tuple[Values, Values]:
    leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in given.leaves.items()}
    values = naive_values(given, leaves, dtype)
    return values, gradients(given, leaves, values)


def ours(given: Problem, backend: str) -> tuple[Values, Values]:
    leaves = {k: v.detach().requires_grad_() for k, v in given.leaves.items()}
    function: Any = warp_fast.warp_loss if "logits" in leaves else warp_fast.linear_warp_loss
    anchor = {f"anchor_{k}": v for k, v in given.anchor.items()}
    if "anchor_logprobs" in given.options:
        anchor = {}
    result = function(
        *leaves.values(), given.token_ids, given.advantages, **anchor, **given.options,
        return_entropy=True, backend=backend,
    )  # fmt: skip
    values = result._asdict()
    return values, gradients(given, leaves, values)


def check(given: Problem, backend: str) -> None:
    """Values are fp32 whatever the inputs are, so the plain formula is too; gradients are not."""
    values, found = ours(given, backend)
    dtype = next(iter(given.leaves.values())).dtype
    gold, gold_gradients = naive(given, FP64)
    eager, _ = naive(given, torch.promote_types(dtype, FP32))
    _, eager_gradients = naive(given, dtype)
    scale = 1 + max(largest(gold[name]) for name in ("logprobs", "anchor_logprobs", "loss"))
    for name, value in values.items():
        shape = () if name == "loss" else given.token_ids.shape
        assert value.dtype == eager[name].dtype and value.shape == shape, name
        assert_close(name, value.flatten(), gold[name].flatten(), eager[name].flatten(), scale)
    for name, gradient in found.items():
        assert gradient.dtype == dtype
        assert_close(f"d{name}", gradient, gold_gradients[name], eager_gradients[name])


both = pytest.mark.parametrize("form", ["logits", "linear"])
served = pytest.mark.parametrize("backend", BACKENDS)
layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


@served
@both
@layouts
@pytest.mark.parametrize("kl", KINDS)
def test_every_kl_with_mask_softcap_and_temperature(
    kl: str, packed: bool, form: str, backend: str
) -> None:
    given = problem(form, packed=packed, kl=kl, beta=0.3, softcap=5.0, temperature=0.7)
    given.options["mask"] = some_mask(given)
    check(given, backend)


@served
@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kl", ["reward", "reverse"])
def test_sizes_and_dtypes(kl: str, size: str, dtype: str, form: str, backend: str) -> None:
    check(problem(form, SIZES[size], DTYPES[dtype], kl=kl), backend)


# each alone, since the oracle tells them apart only where they do not act together
OPTIONS: dict[str, dict[str, Any]] = {
    "token": {"normalizer": "token"},
    "number": {"normalizer": 11},
    "tensor": {"normalizer": torch.tensor(7)},
    "softcap": {"softcap": 2.0},
    "temperature": {"temperature": 0.5},
    "beta-0": {"beta": 0.0},
    "ratio": {"old_logprobs": True},
    "clip-number": {"old_logprobs": True, "clip_range": 0.2},
    "clip-pair": {"old_logprobs": True, "clip_range": (0.1, 0.5)},
    "clip-nothing-above": {"old_logprobs": True, "clip_range": (1.0, 0.0)},
    "advantage-per-token": {"advantages": True},
}


@served
@both
@layouts
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kl", ["reward_to_go", "forward"])
def test_options(kl: str, option: str, packed: bool, form: str, backend: str) -> None:
    given = problem(form, (3, 4, 7), packed=packed, kl=kl, **OPTIONS[option])
    given.options["mask"] = some_mask(given).to(FP32)
    noise = torch.randn(given.token_ids.shape, generator=torch.Generator().manual_seed(5))
    if given.options.pop("advantages", False):
        given = replace(given, advantages=noise)
    if "old_logprobs" in given.options:
        sampled, _ = naive(replace(given, options={}), FP64)
        # ratios on both sides of both bounds
        old = sampled["logprobs"].detach().float().reshape(noise.shape)
        given.options["old_logprobs"] = old + 0.4 * noise
    check(given, backend)


@served
@both
@pytest.mark.parametrize("outputs", ["logprobs", "kl", "entropy", "loss logprobs kl entropy"])
@pytest.mark.parametrize("kl", KINDS[:-1])
def test_gradient_of_per_token_outputs(kl: str, outputs: str, form: str, backend: str) -> None:
    given = problem(form, (2, 5, 9), kl=kl, softcap=4.0, temperature=1.3)
    given.options["mask"] = some_mask(given)
    check(replace(given, outputs=tuple(outputs.split())), backend)


@served
@both
@pytest.mark.parametrize("kl", ["reward", "reward_to_go", "k2", "k3", "none"])
def test_anchor_logprobs_are_as_good_as_the_anchor(kl: str, form: str, backend: str) -> None:
    given = problem(form, kl=kl, softcap=5.0, temperature=0.7)
    gold, _ = naive(given, FP64)
    precomputed = gold["anchor_logprobs"].float().reshape(given.token_ids.shape)
    check(replace(given, options={**given.options, "anchor_logprobs": precomputed}), backend)


def spread(tensor: Tensor) -> Tensor:
    """The same numbers with every stride doubled, two dimensions swapped in memory."""
    wide = torch.full([2 * n for n in reversed(tensor.shape)], -7, dtype=tensor.dtype)
    view = wide.permute(*reversed(range(wide.dim())))[tuple(slice(0, None, 2) for _ in wide.shape)]
    view.copy_(tensor)
    return view


@served
@both
@layouts
@pytest.mark.parametrize("kl", ["reward", "forward"])
def test_strided_arguments(kl: str, packed: bool, form: str, backend: str) -> None:
    given = problem(form, (3, 4, 7), packed=packed, kl=kl)
    options = {**given.options, "mask": spread(some_mask(given))}
    options["old_logprobs"] = spread(-torch.rand(given.token_ids.shape) - 1)
    leaves, anchor = ({k: spread(v) for k, v in x.items()} for x in (given.leaves, given.anchor))
    ids, advantages = spread(given.token_ids.int()), spread(given.advantages)
    check(Problem(leaves, anchor, ids, advantages, given.bounds, options), backend)
