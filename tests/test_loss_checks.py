"""What the losses refuse and say, what a mask hides, and the errors seen in other code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import warp_fast
from warp_fast._backend import BACKENDS as KNOWN
from warp_fast._backend import able
from warp_fast._loss_checks import KINDS

BACKENDS = able("loss", "cpu")
B, T, V, D = 2, 3, 7, 4

served = pytest.mark.parametrize("backend", BACKENDS)
both = pytest.mark.parametrize("form", ["logits", "linear"])
every_kl = pytest.mark.parametrize("kl", KINDS)


def arguments(form: str, *shape: int) -> dict[str, Any]:
    """By name, fit for every kl; the anchor is near, the policy requires gradients."""
    given: dict[str, Any] = {"token_ids": torch.randint(0, V, shape)}
    given["advantages"] = torch.randn(shape[:1])
    shapes = (
        {"logits": (*shape, V)} if form == "logits" else {"hidden": (*shape, D), "weight": (V, D)}
    )
    for name, dims in shapes.items():
        given[name] = torch.randn(dims).requires_grad_()
        given[f"anchor_{name}"] = given[name].detach() + 0.2 * torch.randn(dims)
    return given


def loss_of(given: dict[str, Any], **options: Any) -> Any:
    function: Any = warp_fast.warp_loss if "logits" in given else warp_fast.linear_warp_loss
    return function(**{**given, **options})


def leaves_of(given: dict[str, Any]) -> list[Tensor]:
    return [given[name] for name in ("logits", "hidden", "weight") if name in given]


def gradients(given: dict[str, Any], loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves_of(given), retain_graph=True))


ONES, META = torch.ones(B, T), torch.device("meta")
IDS = torch.zeros(B, T, dtype=torch.long)
PACKED = {"logits": torch.zeros(6, V), "anchor_logits": torch.zeros(6, V), "token_ids": IDS.view(6)}
NO_ANCHOR: dict[str, Any] = {"anchor_logits": None}
ONLY_LOGPROBS = {**NO_ANCHOR, "anchor_logprobs": -ONES}


def bounds(*values: complex, device: str = "cpu") -> dict[str, Any]:
    return {**PACKED, "cu_seqlens": torch.tensor(values, device=device)}


# (form, changed arguments, exception, message)
REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("logits", {"temperature": 0.0}, ValueError, "temperature must be from 1e-12 to .* got 0"),
    ("logits", {"temperature": math.nan}, ValueError, "temperature must be .* got nan"),
    ("linear", {"softcap": -1.0}, ValueError, "softcap must be from 1e-12 to .*, or None; got -1"),
    ("logits", {"softcap": 1e300}, ValueError, "softcap must be from .* got 1e"),
    ("linear", {"temperature": 1e-30}, ValueError, "temperature must be from .* got 1e-30"),
    ("logits", {"logits": IDS}, TypeError, "logits must be float32, bfloat16, .* got torch.int64"),
    ("logits", {"anchor_logits": IDS}, TypeError, "anchor_logits must be float32"),
    ("logits", {"logits": torch.tensor(1.0)}, ValueError, r"must be \[..., V\] with V >= 1; got"),
    ("logits", {"logits": torch.zeros(B, T, 0)}, ValueError, "with V >= 1; got .2, 3, 0."),
    ("linear", {"weight": torch.zeros(0, D)}, ValueError, r"\[V, D\], V >= 1"),
    (
        "linear",
        {"hidden": torch.zeros(B, T, 0), "weight": torch.zeros(V, 0)},
        ValueError,
        r"D >= 1; got \(2, 3, 0\)",
    ),
    ("linear", {"hidden": IDS}, TypeError, "hidden must be float32"),
    ("linear", {"weight": IDS}, TypeError, "weight must be float32"),
    ("linear", {"anchor_weight": IDS}, TypeError, "anchor_weight must be float32"),
    ("logits", {"advantages": torch.ones(B).long()}, TypeError, "advantages must be float32"),
    ("logits", {"old_logprobs": IDS}, TypeError, "old_logprobs must be float32"),
    ("linear", {"old_logprobs": ONES.half()}, TypeError, "old_logprobs must be float32 or float64"),
    (
        "logits",
        {**NO_ANCHOR, "anchor_logprobs": -ONES.bfloat16()},
        TypeError,
        "16 bits round by more than the KL .*; got torch.bfloat16",
    ),
    ("logits", {"token_ids": ONES}, TypeError, "token_ids must be integers; got torch.float32"),
    ("logits", {"token_ids": IDS.bool()}, TypeError, "token_ids must be integers"),
    ("linear", {"token_ids": IDS[:1]}, ValueError, r"of hidden less .*\(2, 3\); got \(1, 3\)"),
    ("logits", {"token_ids": IDS.to(META)}, ValueError, "token_ids must be on cpu like logits"),
    ("logits", {"token_ids": IDS + V}, ValueError, r"must be in \[0, 7\); row 0 has 7"),
    ("linear", {"token_ids": IDS - 1}, ValueError, r"must be in \[0, 7\); row 0 has -1"),
    ("linear", {"weight": torch.ones(V, D + 1)}, ValueError, r"hidden must be .* weight \[V, D\]"),
    ("linear", {"weight": torch.ones(V, D, device=META)}, ValueError, "weight must be on cpu like"),
    ("linear", {"anchor_weight": torch.ones(V, 9)}, ValueError, r"anchor_hidden must be \[\.\.\."),
    ("linear", {"anchor_weight": torch.ones(8, D)}, ValueError, "have the 7 rows of weight; got 8"),
    ("linear", {"anchor_hidden": None}, ValueError, "anchor_weight must come with anchor_hidden"),
    ("linear", {"anchor_hidden": torch.ones(B, 1, D)}, ValueError, r"anchor_hidden must be \(2, 3"),
    ("logits", {"anchor_logits": torch.ones(B, T, 8)}, ValueError, "anchor_logits must be .* like"),
    ("logits", {**PACKED}, ValueError, r"logits must be padded .* got 2 dimensions without cu_seq"),
    ("logits", {"cu_seqlens": IDS[0]}, ValueError, r"with cu_seqlens logits must be packed \[N"),
    ("logits", {"mask": ONES[:1]}, ValueError, r"mask must be \(2, 3\) on cpu; got \(1, 3\)"),
    ("logits", bounds(0.0, 2.0, 6.0), ValueError, r"cu_seqlens must be \[B \+ 1\] integers"),
    ("logits", bounds(0j, 2, 6), ValueError, r"cu_seqlens must be .* integers; .* torch.complex64"),
    ("logits", bounds(1, 2, 6), ValueError, r"must rise from 0 to N = 6; got \[1, 2, 6\]"),
    ("logits", bounds(0, 2, 5), ValueError, "cu_seqlens must rise from 0 to N = 6"),
    ("logits", bounds(0, 7, 6), ValueError, "cu_seqlens must rise from 0 to N = 6"),
    ("logits", bounds(0, 2, 6, device="meta"), ValueError, "cu_seqlens must be on cpu; got meta"),
    ("logits", {"clip_range": 0.2}, ValueError, "clip_range must come with old_logprobs"),
    ("logits", {"kl": "k1"}, ValueError, "zero gradient in expectation; use 'reward'"),
    ("logits", {"kl": "k4"}, ValueError, "kl must be one of reward, .* none; got 'k4'"),
    ("logits", {"beta": -0.1}, ValueError, "beta must be finite and >= 0; got -0.1"),
    ("logits", {"beta": math.nan}, ValueError, "beta must be finite and >= 0; got nan"),
    ("logits", {"anchor_logprobs": -ONES}, ValueError, "the anchor must be given once"),
    ("logits", {**NO_ANCHOR, "kl": "reverse"}, ValueError, "sums over the vocabulary .* no anchor"),
    ("logits", {**ONLY_LOGPROBS, "kl": "forward"}, ValueError, "kl='forward' .* anchor_logprobs"),
    ("logits", {**NO_ANCHOR, "kl": "k2"}, ValueError, "kl='k2' needs an anchor; got none"),
    ("logits", {**NO_ANCHOR, "anchor_logprobs": ONES[0]}, ValueError, r"anchor_logprobs .* \(3,\)"),
    ("logits", {"old_logprobs": -ONES.to(META)}, ValueError, "old_logprobs must be .* on meta"),
    ("logits", {"advantages": torch.ones(3)}, ValueError, r"\[B\] = \[2\] or per token \[2, 3\]"),
    ("logits", {"advantages": ONES.to(META)}, ValueError, "advantages must be on cpu; got meta"),
    ("logits", {"advantages": ONES * math.nan}, ValueError, "must not be NaN .* row 0 is"),
    ("logits", {"advantages": torch.tensor([0, math.nan])}, ValueError, "be NaN .*; row 3 is"),
    ("linear", {"old_logprobs": ONES * math.nan}, ValueError, "old_logprobs .* row 0 is nan"),
    ("logits", {"old_logprobs": ONES * math.inf}, ValueError, "old_logprobs .* row 0 is inf"),
    ("linear", {"old_logprobs": ONES * -math.inf}, ValueError, "old_logprobs .* row 0 is -inf"),
    (
        "logits",
        {**NO_ANCHOR, "anchor_logprobs": ONES * math.nan},
        ValueError,
        "anch.* row 0 is nan",
    ),
    (
        "logits",
        {**NO_ANCHOR, "anchor_logprobs": ONES * math.inf},
        ValueError,
        "anch.* row 0 is inf",
    ),
    *[
        ("logits", {"old_logprobs": -ONES, "clip_range": clip}, ValueError, "clip_range must be")
        for clip in (-0.1, 1.5, math.nan, (0.1, math.inf), (0.1, 0.1, 0.1))
    ],
    ("logits", {"normalizer": torch.ones(1)}, ValueError, r"must be 0-dim and real; got \(1,"),
    ("logits", {"normalizer": torch.tensor(0.0)}, ValueError, "positive and finite; got 0.0"),
    ("logits", {"normalizer": torch.tensor(-2)}, ValueError, "positive and finite; got -2"),
    ("logits", {"normalizer": torch.tensor(float("nan"))}, ValueError, "positive and finite"),
    ("linear", {"mask": ONES * -torch.inf}, ValueError, "mask must be bool, or 1"),
    ("logits", {"mask": ONES * 1j}, TypeError, "mask must be bool, .* got torch.complex64"),
    ("logits", {"mask": ONES * 0.5}, ValueError, "mask must be bool, or 1 where .* got 0.5"),
    ("logits", {"mask": ONES * float("nan")}, ValueError, "else 0; got nan"),
    ("logits", {"normalizer": "mean"}, ValueError, "normalizer must be 'sequence', 'token' or"),
    ("logits", {"normalizer": 0}, ValueError, "normalizer must be positive and finite; got 0"),
    ("logits", {"backend": "cudnn"}, ValueError, "backend must be 'auto' or one of .* 'cudnn'"),
]


@pytest.mark.parametrize("form, changed, error, message", REFUSED, ids=[r[3] for r in REFUSED])
def test_refused(form: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given = arguments(form, B, T)
    loss_of(given)
    with pytest.raises(error, match=message):
        loss_of(given, **changed)


TENSORS = ["mask", "cu_seqlens", "old_logprobs", "anchor_logprobs"]
TENSORS_OF = [
    (form, x) for form in ("logits", "linear") for x in [*arguments(form, 1, 1), *TENSORS]
]


@pytest.mark.parametrize(("form", "name"), TENSORS_OF)
def test_what_is_no_tensor_is_refused_by_name(form: str, name: str) -> None:
    given = arguments(form, B, T)
    if name == "cu_seqlens":
        rows = [k for k in given if not k.endswith("weight") and k != "advantages"]
        given.update({k: given[k].flatten(0, 1) for k in rows})
    if name == "anchor_logprobs":
        given = {k: v for k, v in given.items() if not k.startswith("anchor")}
    array = torch.zeros(given["token_ids"].shape).numpy()
    for odd in ([1.0, 2.0], 0.5, nn.Linear(D, V), array):
        expected = rf"^{name} must be a tensor; got {type(odd).__name__}$"
        with pytest.raises(TypeError, match=expected):
            loss_of(given, **{name: odd})
    if name in ("logits", "hidden", "weight", "token_ids", "advantages"):
        with pytest.raises(TypeError, match=f"^{name} must be a tensor; got NoneType$"):
            loss_of(given, **{name: None})


ODD_NUMBERS = ["1", [0.5], torch.ones(2).numpy(), torch.ones(2), torch.tensor(1j)]


@both
@pytest.mark.parametrize("name", ["temperature", "softcap", "beta", "normalizer", "clip_range"])
def test_what_is_no_number_is_refused_by_name(name: str, form: str) -> None:
    given = {**arguments(form, B, T), "old_logprobs": -ONES}
    for odd in [*ODD_NUMBERS, *([] if name in ("softcap", "clip_range") else [None])]:
        with pytest.raises((TypeError, ValueError), match=rf"{name} must be"):
            loss_of(given, **{name: odd})
    if name == "clip_range":
        with pytest.raises(TypeError, match=r"each bound of clip_range must be .* got NoneType"):
            loss_of(given, clip_range=(None, 0.2))


@both
def test_logprobs_refuse_the_same(form: str) -> None:
    given = arguments(form, B, T)
    ids = given["token_ids"]
    logits = [given["logits"]] if form == "logits" else [given["hidden"], given["weight"]]
    function: Any = (
        warp_fast.token_logprobs if form == "logits" else warp_fast.linear_token_logprobs
    )
    ids[1, 2] = 9
    with pytest.raises(ValueError, match=r"token_ids must be in \[0, 7\); row 5 has 9"):
        function(*logits, ids)
    with pytest.raises(ValueError, match="token_ids must have the shape"):
        function(*logits, ids[0])
    with pytest.raises(TypeError, match="must be float32"):
        function(*[x.long() for x in logits], ids)
    with pytest.raises(ValueError, match="temperature must be from"):
        function(*logits, ids, temperature=-1.0)


@pytest.mark.parametrize("backend", [name for name in KNOWN if name not in BACKENDS])
def test_absent_backend_is_refused_with_the_reason(backend: str) -> None:
    with pytest.raises(ValueError, match=f"{backend}' (is not available:|does not implement) "):
        loss_of(arguments("logits", B, T), backend=backend)


MASK = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool)


@served
@both
@every_kl
def test_masked_tokens_may_hold_anything(kl: str, form: str, backend: str) -> None:
    """Ids of -100, else NaN or inf: the result is that of the kept tokens, packed."""
    given = arguments(form, B, T)
    given["advantages"] = torch.randn(B, T)
    options = {"kl": kl, "return_entropy": True, "backend": backend}
    given["old_logprobs"] = -torch.rand(B, T) - 1
    if kl not in ("reverse", "forward"):
        given = {k: v for k, v in given.items() if not k.startswith("anchor")}
        given["anchor_logprobs"] = -torch.rand(B, T) - 1
    rows = {k: v for k, v in given.items() if not k.endswith("weight")}
    kept = {k: v.detach()[MASK].requires_grad_(v.requires_grad) for k, v in rows.items()}
    expected = loss_of({**given, **kept}, **options, cu_seqlens=torch.tensor([0, 2, 4]))
    with torch.no_grad():
        for i, value in enumerate(rows.values()):
            value[~MASK] = [math.nan, math.inf][i % 2] if i else -100
    found = loss_of(given, **options, mask=MASK)
    for name, value in expected._asdict().items():
        ours = getattr(found, name)
        torch.testing.assert_close(ours if name == "loss" else ours[MASK], value)
        assert name == "loss" or not ours[~MASK].any()
    first, *weight = gradients(given, found.loss)
    first_kept, *weight_kept = gradients({**given, **kept}, expected.loss)
    assert not first[~MASK].any()
    torch.testing.assert_close([first[MASK], *weight], [first_kept, *weight_kept])


@served
@both
@every_kl
def test_all_masked(kl: str, form: str, backend: str) -> None:
    """0, and gradients of 0 that exist, so that every rank of a job can go backward."""
    for normalizer in ("sequence", "token", 0.0, torch.tensor(0)):
        given = arguments(form, B, T)
        options = {"normalizer": normalizer, "mask": torch.zeros(B, T), "backend": backend}
        result = loss_of(given, kl=kl, return_entropy=True, **options)
        assert not any(value.any() for value in result)
        assert not any(gradient.any() for gradient in gradients(given, result.loss))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_normalizer_of_0_in_a_trace_gives_0_where_nothing_counts(in_place: bool) -> None:
    """Nobody looks at its value there."""

    def step(logits: Tensor, mask: Tensor) -> Tensor:
        loss = warp_fast.warp_loss(
            logits, ids, torch.ones(B), mask=mask, kl="none", normalizer=mask.sum(),
            in_place=in_place,
        ).loss  # fmt: skip
        return loss

    ids = torch.zeros(B, T, dtype=torch.long)
    run = step if in_place else torch.compile(step, fullgraph=True, backend="aot_eager")
    leaf = torch.randn(B, T, 7, requires_grad=True)
    loss: Any = run(leaf * 1, torch.zeros(B, T))
    loss.backward()
    assert loss == 0 and leaf.grad is not None and not leaf.grad.any()


@served
@both
@every_kl
def test_error_5_kl_is_of_one_completion_and_0_of_a_policy_with_itself(
    kl: str, form: str, backend: str
) -> None:
    given = arguments(form, B, T)
    same = {k: v.detach() for k, v in given.items()}
    for name in ("logits", "hidden", "weight"):
        if name in given:
            same[f"anchor_{name}"] = same[name]
    assert not loss_of(same, kl=kl, backend=backend).kl.any()


@served
@both
def test_error_5_kl_is_summed_over_the_sampled_tokens(form: str, backend: str) -> None:
    """Not averaged over tokens or vocabulary, nor taken at one position."""
    given = arguments(form, B, T)
    result = loss_of(given, beta=0.5, backend=backend)
    d = (result.logprobs - result.anchor_logprobs).detach()
    torch.testing.assert_close(result.kl.detach(), d)
    coefficient = given["advantages"] - 0.5 * d.sum(1)
    expected = -(coefficient * result.logprobs.detach().sum(1)).sum() / B
    torch.testing.assert_close(result.loss.detach(), expected)


@served
@both
@every_kl
def test_error_6_temperature_is_that_of_policy_and_anchor(kl: Any, form: str, backend: str) -> None:
    given = arguments(form, B, T)
    sampled = loss_of(given, kl=kl, temperature=0.9, backend=backend)
    cooled = {**given}
    for name in ("logits", "anchor_logits", "hidden", "anchor_hidden"):
        if name in given:
            cooled[name] = given[name] / 0.9
    expected = loss_of(cooled, kl=kl, backend=backend)
    torch.testing.assert_close(tuple(sampled)[:4], tuple(expected)[:4])


@served
@both
@pytest.mark.parametrize("kl", ["reward", "reward_to_go"])
def test_error_8_the_coefficient_is_detached(kl: str, form: str, backend: str) -> None:
    """The gradient is that of the sampled log-probs times constants, negated."""
    given = arguments(form, B, T)
    result = loss_of(given, kl=kl, beta=0.5, backend=backend)
    d = (result.logprobs - result.anchor_logprobs).detach()
    penalty = d.sum(1, keepdim=True) if kl == "reward" else d.flip(1).cumsum(1).flip(1)
    coefficient = given["advantages"][:, None] - 0.5 * penalty
    expected = gradients(given, -(coefficient * result.logprobs).sum() / B)
    torch.testing.assert_close(gradients(given, result.loss), expected)


@served
@both
@every_kl
def test_error_8_one_step_raises_the_completion_of_high_advantage(
    kl: str, form: str, backend: str
) -> None:
    given = arguments(form, B, T)
    given["advantages"] = torch.tensor([2.0, -2.0])
    result = loss_of(given, kl=kl, beta=0.01, backend=backend)
    with torch.no_grad():
        for leaf, slope in zip(leaves_of(given), gradients(given, result.loss), strict=True):
            leaf -= 0.01 * slope
    moved = (loss_of(given, kl=kl, backend=backend).logprobs - result.logprobs).sum(1)
    assert moved[0] > 0 > moved[1]


@served
@both
def test_error_9_the_reward_of_a_sequence_reaches_every_token(form: str, backend: str) -> None:
    given = arguments(form, B, T)
    result = loss_of(given, beta=0.0, backend=backend)
    expected = gradients(given, -(given["advantages"][:, None] * result.logprobs).sum() / B)
    torch.testing.assert_close(gradients(given, result.loss), expected)
    assert expected[0].any(2).all()


def test_arrays_without_a_dimension_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    given = arguments("logits", 2, 3)
    expected = loss_of(given, temperature=0.5, normalizer=3.0).loss
    found = loss_of(given, temperature=numpy.array(0.5), normalizer=numpy.array(3.0)).loss
    assert torch.equal(found, expected)
