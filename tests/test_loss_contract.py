"""What callers of the losses may rely on besides the numbers: ratios, memory, gradients of what."""

from __future__ import annotations

import contextlib
import warnings
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef

import warp_fast
from tests.test_loss_checks import V, arguments, both, gradients, loss_of, served
from warp_fast import _loss_checks, linear_token_logprobs
from warp_fast._loss_checks import KINDS
from warp_fast._objective import Tokens
from warp_fast._precision import as_given


@pytest.mark.parametrize("clip_range", [0.2, None])
@pytest.mark.parametrize("old", [-200.0, -100.0, 0.0])
@served
@both
def test_ratios_without_bound(form: str, backend: str, old: float, clip_range: Any) -> None:
    """A token that was all but impossible: an infinite ratio, unless it is clipped or times 0."""
    given = arguments(form, 2, 2)
    given["advantages"] = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    free = clip_range is None and old < -88
    if free:
        given["advantages"] = torch.zeros(2, 2)
    old_logprobs = torch.full((2, 2), old)
    options = {"old_logprobs": old_logprobs, "clip_range": clip_range, "kl": "k2"}
    loss = loss_of(given, **options, backend=backend)
    gold = loss_of(
        {name: x.double() if x.is_floating_point() else x for name, x in given.items()},
        **{**options, "old_logprobs": old_logprobs.double()},
        backend="reference",
    )
    assert loss.loss.isfinite()
    torch.testing.assert_close(loss.loss.double(), gold.loss)
    for slope in gradients(given, loss.loss):
        assert slope.isfinite().all()


@served
def test_both_forms_have_one_gradient_at_a_clipped_ratio(backend: str) -> None:
    """From logits autograd makes it, from hidden states the kernel; the head copies."""
    logits = torch.randn(2, 3, V).requires_grad_()
    hidden = logits.detach().clone().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 0.0], [2.0, 0.5, -0.5]])
    given = {
        "token_ids": torch.randint(0, V, (2, 3)),
        "advantages": advantages,
        "old_logprobs": torch.tensor([[-91.0, -1.0, -200.0], [-2.0, -5.0, -0.1]]),
        "clip_range": 0.2,
        "kl": "none",
        "backend": backend,
    }
    (first,) = torch.autograd.grad(loss_of({"logits": logits, **given}).loss, logits)
    whole = {"hidden": hidden, "weight": torch.eye(V), **given}
    (second,) = torch.autograd.grad(loss_of(whole).loss, hidden)
    assert first.isfinite().all()
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("kl", ["reward", "k3"])
@served
@both
def test_the_anchor_may_be_overwritten_once_the_loss_is_there(
    form: str, backend: str, kl: Any
) -> None:
    given = arguments(form, 2, 3)
    expected = gradients(given, loss_of(given, kl=kl, backend=backend).loss)
    loss = loss_of(given, kl=kl, backend=backend).loss
    for name in ("anchor_logits", "anchor_hidden", "anchor_weight"):
        if name in given:
            given[name].zero_()
    for ours, gold in zip(gradients(given, loss), expected, strict=True):
        assert torch.equal(ours, gold)


@served
@both
def test_the_anchor_has_no_gradient(form: str, backend: str) -> None:
    loss = loss_of(arguments(form, 2, 3), backend=backend)
    assert loss.logprobs.requires_grad and not loss.anchor_logprobs.requires_grad


@pytest.mark.parametrize("kl", ["reward", "reward_to_go", "k2", "k3", "reverse", "forward"])
@served
@both
def test_a_beta_of_0_watches_a_kl_that_may_be_infinite(form: str, backend: str, kl: Any) -> None:
    """The anchor all but bars the sampled tokens, or does; the gradient is that without a KL."""
    given = arguments(form, 2, 3)
    expected = loss_of(given, kl="none", backend=backend).loss
    if form == "logits":
        given["anchor_logits"] = given["anchor_logits"].scatter(
            2, given["token_ids"][..., None], -torch.inf
        )
    elif kl in ("reverse", "forward"):
        given["anchor_hidden"] = given["anchor_hidden"] * 1e30
    else:
        del given["anchor_hidden"], given["anchor_weight"]
        given["anchor_logprobs"] = torch.full((2, 3), -torch.inf)
    found = loss_of(given, kl=kl, beta=0.0, backend=backend)
    assert kl == "forward" or not (found.kl < 1e20).any()
    torch.testing.assert_close(found.loss, expected)
    for ours, gold in zip(gradients(given, found.loss), gradients(given, expected), strict=True):
        torch.testing.assert_close(ours, gold)


@served
def test_a_token_that_the_policy_bars_may_have_no_advantage(backend: str) -> None:
    given = arguments("logits", 2, 3)
    given["advantages"] = torch.tensor([0.0, 1.0])
    logits = given["logits"].detach().clone()
    logits[0, 0, given["token_ids"][0, 0]] = -torch.inf
    given["logits"] = logits.requires_grad_()
    loss = loss_of(given, kl="none", backend=backend).loss
    assert loss.isfinite() and loss != 0
    (slope,) = gradients(given, loss)
    assert slope.isfinite().all() and (slope[0] == 0).all()


@pytest.mark.parametrize("kl", ["reward", "reverse", "forward"])
@served
@both
def test_rollouts_and_anchors_may_come_from_inference_mode(
    form: str, backend: str, kl: Any
) -> None:
    given = arguments(form, 2, 3)
    expected = gradients(given, loss_of(given, kl=kl, backend=backend).loss)
    with torch.inference_mode():
        for name in ("token_ids", "advantages", *(n for n in given if n.startswith("anchor"))):
            given[name] = given[name].clone()
    loss = loss_of(given, kl=kl, backend=backend)
    for ours, gold in zip(gradients(given, loss.loss), expected, strict=True):
        assert torch.equal(ours, gold)
    again = gradients(given, loss.logprobs.sum())
    names = ("logits",) if form == "logits" else ("hidden", "weight")
    function: Any = warp_fast.token_logprobs if form == "logits" else linear_token_logprobs
    logprobs = function(*[given[n] for n in names], given["token_ids"], backend=backend)
    for ours, gold in zip(gradients(given, logprobs.sum()), again, strict=True):
        torch.testing.assert_close(ours, gold)


@served
@both
def test_an_anchor_of_inference_mode_goes_with_the_graph(form: str, backend: str) -> None:
    given = arguments(form, 2, 3)
    name = "anchor_logits" if form == "logits" else "anchor_hidden"
    with torch.inference_mode():
        given[name] = given[name].clone()
    loss = loss_of(given, kl="reverse", backend=backend).loss
    weak: Any = StorageWeakRef
    memory = weak(given.pop(name).untyped_storage())
    assert not memory.expired()
    loss.backward()
    assert memory.expired()


@pytest.mark.parametrize("kl", ["reverse", "forward"])
@served
def test_an_anchor_row_of_nothing(kl: Any, backend: str) -> None:
    """Beside a beta of 0; with another one the gradient is that of the definition, as infinite."""
    given = arguments("logits", 1, 2)
    expected = gradients(given, loss_of(given, kl="none", backend=backend).loss)[0]
    given["anchor_logits"][:] = -torch.inf
    loss = loss_of(given, kl=kl, beta=0.0, backend=backend).loss
    torch.testing.assert_close(gradients(given, loss)[0], expected)


def test_a_gradient_of_an_infinite_kl_is_that_of_the_definition() -> None:
    given = arguments("logits", 1, 2)
    given["anchor_logits"][..., 1] = -torch.inf
    given["token_ids"][:] = 0
    ours, gold = (
        gradients(given, loss_of(given, kl="reverse", backend=backend).loss)[0]
        for backend in ("auto", "reference")
    )
    assert torch.equal(ours == -torch.inf, gold == -torch.inf)


def test_a_symbolic_number_of_tokens_may_be_the_normalizer() -> None:
    def loss(logits: Tensor, ids: Tensor, advantages: Tensor) -> Tensor:
        count = logits.shape[0] * logits.shape[1]
        result = warp_fast.warp_loss(logits, ids, advantages, kl="none", normalizer=count)
        found: Tensor = result.loss
        return found

    given = torch.randn(2, 3, V), torch.zeros(2, 3, dtype=torch.long), torch.ones(2)
    traced = make_fx(loss, tracing_mode="symbolic")(*given)
    torch.testing.assert_close(traced(*given), loss(*given))


def test_rows_behind_the_last_sequence_are_masked_where_nobody_can_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On GPUs, and in traces, cu_seqlens is not read."""
    monkeypatch.setattr(_loss_checks, "can_look", lambda tensor: False)
    ids, bounds = torch.zeros(6, dtype=torch.long), torch.tensor([0, 1, 4])
    rows = Tokens.of(ids, None, bounds, ids.shape, torch.device("cpu"), "logits")
    assert rows.mask.tolist() == [True] * 4 + [False] * 2
    assert rows.sequence.tolist() == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("kl", ["reward", "reverse"])
@served
def test_products_are_in_fp32_whatever_is_allowed_elsewhere(
    backend: str, kl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 on GPUs, and bf16 on CPUs that have it, would round the KL away."""
    mkldnn: Any = torch.backends.mkldnn
    multipliers = torch.backends.cuda.matmul, mkldnn.matmul
    seen: set[str] = set()

    def spied(name: str, owner: Any) -> None:
        real = getattr(owner, name)

        def spy(*given: Any, **options: Any) -> Any:
            seen.update(m.fp32_precision for m in multipliers)
            return real(*given, **options)

        monkeypatch.setattr(owner, name, spy)

    for name, owner in (("mm", torch), ("addmm_", torch.Tensor), ("__matmul__", torch.Tensor)):
        spied(name, owner)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        allowed = [m.fp32_precision for m in multipliers]
        given = arguments("linear", 2, 3)
        loss = loss_of(given, kl=kl, backend=backend)
        (loss.loss + loss.logprobs.sum()).backward()
        assert [m.fp32_precision for m in multipliers] == allowed and "ieee" not in allowed
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {"ieee"}


def test_what_is_set_for_all_of_torch_is_not_pinned_to_products() -> None:
    whole: Any = torch.backends
    matmul = torch.backends.cuda.matmul
    before, whole.fp32_precision = whole.fp32_precision, "tf32"
    matmul.fp32_precision = whole.mkldnn.matmul.fp32_precision = "none"
    matmul.allow_fp16_accumulation = True
    try:
        loss_of(arguments("linear", 2, 3)).loss.backward()
        assert matmul.fp32_precision == "tf32" and matmul.allow_fp16_accumulation
        whole.fp32_precision = "ieee"
        assert matmul.fp32_precision == whole.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        whole.fp32_precision, matmul.allow_fp16_accumulation = before, False


def test_precision_is_that_of_the_process_while_any_thread_is_inside() -> None:
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
            first.enter_context(as_given("cpu"))
            second.enter_context(as_given("cpu"))
            first.close()
            assert matmul.fp32_precision == "ieee" and not matmul.allow_fp16_accumulation
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


@both
@pytest.mark.parametrize("name", ["temperature", "softcap", "beta"])
def test_numbers_may_be_of_numpy_or_a_tensor_without_a_gradient(name: str, form: str) -> None:
    given = arguments(form, 2, 3)
    expected = loss_of(given, **{name: 0.5})
    for same in (torch.tensor(0.5).numpy()[()], Fraction(1, 2), torch.tensor(0.5)):
        torch.testing.assert_close(loss_of(given, **{name: same}).loss, expected.loss)
    with pytest.raises(
        TypeError, match=rf"{name} must .* requires no gradient.* requires_grad=True$"
    ):
        loss_of(given, **{name: torch.tensor(0.5, requires_grad=True)})


@served
@both
@pytest.mark.parametrize("kl", [kl for kl in KINDS if kl != "k3"])  # exp(1e12) is inf
def test_ends_of_the_range_of_temperature_and_softcap_give_numbers(
    kl: str, form: str, backend: str
) -> None:
    ends = [(1e-12, None), (1e12, None), (1, 1e-12), (1, 1e12), (1e-12, 1e12), (1e12, 1e-12)]
    for temperature, softcap in ends:
        given = arguments(form, 2, 3)
        head = {"temperature": temperature, "softcap": softcap}
        result = loss_of(given, kl=kl, backend=backend, **head)
        assert result.loss.isfinite()
        assert all(slope.isfinite().all() for slope in gradients(given, result.loss))


@served
@both
@pytest.mark.parametrize("name", ["advantages", "mask", "old_logprobs"])
def test_vmap_over_what_is_looked_at(name: str, form: str, backend: str) -> None:
    given = arguments(form, 2, 3)
    several = torch.randn(4, 2) if name == "advantages" else -torch.rand(4, 2, 3).round()
    several = several.abs() if name == "mask" else several

    def loss(values: Tensor) -> Tensor:
        found: Tensor = loss_of(given, **{name: values}, backend=backend).loss
        return found

    expected = torch.stack([loss(values) for values in several])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch has no batching rule for the ops
        found = torch.func.vmap(loss)(several)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(given, found.sum()), gradients(given, expected.sum()))
