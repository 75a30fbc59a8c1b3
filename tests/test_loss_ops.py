"""The loss ops under autograd, torch.library, torch.compile and autocast; where gradients flow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import warp_fast
from warp_fast import _stats_ops
from warp_fast._backend import able
from warp_fast.reference import loss as reference

BACKENDS = able("loss", "cpu")
HEAD = [(1.0, None), (0.7, 3.0)]
B, T, V, D = 2, 3, 7, 4

served = pytest.mark.parametrize("backend", BACKENDS)
both = pytest.mark.parametrize("form", ["logits", "linear"])


def normal(*shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * std).to(dtype)


def inputs(form: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(what gradients flow to, the anchor by argument name), padded."""
    if form == "logits":
        logits = normal(B, T, V, dtype=dtype).requires_grad_()
        return [logits], {"anchor_logits": normal(B, T, V, dtype=dtype)}
    hidden = normal(B, T, D, dtype=dtype).requires_grad_()
    weight = normal(V, D, dtype=dtype).requires_grad_()
    anchor = {"anchor_hidden": hidden.detach() + 0.1, "anchor_weight": weight.detach() * 0.9}
    return [hidden, weight], anchor


def loss_of(form: str) -> Any:
    return warp_fast.warp_loss if form == "logits" else warp_fast.linear_warp_loss


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, V, (B, T))


@pytest.fixture
def mask() -> Tensor:
    return torch.tensor([[1, 1, 0], [1, 0, 1]], dtype=torch.bool)


@both
@pytest.mark.parametrize("temperature, softcap", HEAD)
@pytest.mark.parametrize("kl", ["none", "k2", "k3", "reverse", "forward"])
def test_gradcheck(
    kl: Any, temperature: float, softcap: float | None, form: str, ids: Tensor, mask: Tensor
) -> None:
    """Of the losses with constant coefficients; the other backends are held to the reference."""
    leaves, anchor = inputs(form, torch.float64)
    advantages = normal(B)

    def outputs(*arguments: Tensor) -> tuple[Tensor, ...]:
        result = loss_of(form)(
            *arguments, ids, advantages, **anchor, mask=mask, kl=kl, temperature=temperature,
            softcap=softcap, return_entropy=True, backend="reference",
        )  # fmt: skip
        return result.loss, result.logprobs, result.entropy

    assert torch.autograd.gradcheck(outputs, leaves)


@pytest.mark.parametrize("name", ["token_logprobs", "linear_token_logprobs"])
def test_gradcheck_of_logprobs(name: str, ids: Tensor) -> None:
    leaves, _ = inputs("linear" if name.startswith("linear") else "logits", torch.float64)
    function = getattr(warp_fast, name)
    assert torch.autograd.gradcheck(
        lambda *arguments: function(*arguments, ids, softcap=3.0, return_entropy=True), leaves
    )


@both
@pytest.mark.parametrize("kl", ["reward", "reverse"])
def test_many_chunks_are_one(
    monkeypatch: pytest.MonkeyPatch, kl: str, form: str, ids: Tensor
) -> None:
    found = []
    leaves, anchor = inputs(form)
    for rows in (1, 2, 100):
        monkeypatch.setattr(reference, "_CHUNK", rows * V)
        loss = loss_of(form)(*leaves, ids, torch.ones(B), **anchor, kl=kl, backend="reference").loss
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def op_arguments(form: str, exact_kl: str) -> tuple[Any, ...]:
    """Of a statistics op, flat rows."""
    leaves, anchor = inputs(form)
    rows = [leaves[0].detach().flatten(0, 1), *leaves[1:]]
    rows = [row.detach().requires_grad_() for row in rows]
    first, *rest = anchor.values()
    ids, mask = torch.randint(0, V, (B * T,)), torch.arange(B * T) % 3 != 1
    return (*rows, ids, mask, first.flatten(0, 1), *rest, 0.7, 3.0, exact_kl, True)


@served
@both
@pytest.mark.parametrize("exact_kl", ["", "reverse", "forward"])
def test_opcheck(exact_kl: str, form: str, backend: str) -> None:
    ops = _stats_ops.TOKEN_STATS if form == "logits" else _stats_ops.LINEAR_TOKEN_STATS
    torch.library.opcheck(ops[backend], op_arguments(form, exact_kl))


@served
@both
@pytest.mark.parametrize("exact_kl", ["", "reverse", "forward"])
def test_opcheck_of_the_gradient(exact_kl: str, form: str, backend: str) -> None:
    stem = "token_stats_backward" if form == "logits" else "linear_token_stats_backward"
    op = getattr(torch.ops.warp_fast, f"{stem}_{backend}").default
    *tensors, temperature, softcap, kl, _ = op_arguments(form, exact_kl)
    tensors = [tensor.detach() for tensor in tensors]
    mask = tensors.pop(2 if form == "logits" else 3)
    upstream = torch.where(mask[:, None], normal(B * T, 3), 0)
    for needs in [()] if form == "logits" else [(True, True), (True, False), (False, True)]:
        torch.library.opcheck(op, (upstream, *tensors, temperature, softcap, kl, *needs))


def results(function: Any, arguments: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Loss, per-token values and gradients."""
    result = function(*arguments, **options)
    leaves = [argument for argument in arguments if argument.requires_grad]
    gradients = torch.autograd.grad(result.loss + result.entropy.sum(), leaves)
    return [tensor.detach() for tensor in result] + list(gradients)


@served
@both
@pytest.mark.parametrize("kl, packed", [("reward_to_go", False), ("reverse", True)])
def test_compiled_is_eager(kl: str, packed: bool, form: str, backend: str, ids: Tensor) -> None:
    leaves, anchor = inputs(form)
    options: dict[str, Any] = {"kl": kl, "return_entropy": True, "backend": backend, **anchor}
    mask = torch.arange(B * T).view(B, T) % 3 != 1
    options |= {"mask": mask, "old_logprobs": -torch.rand(B, T) - 1, "clip_range": 0.2}
    arguments = [*leaves, ids, normal(B)]
    if packed:
        arguments[0] = arguments[0].detach().flatten(0, 1).requires_grad_()
        arguments[-2] = ids.flatten()
        flat = {"mask", "old_logprobs", "anchor_logits", "anchor_hidden"} & options.keys()
        options |= {name: options[name].flatten(0, 1) for name in flat}
        options["cu_seqlens"] = torch.tensor([0, 2, B * T])
    torch.compiler.reset()
    compiled = torch.compile(loss_of(form), fullgraph=True, backend="aot_eager")
    found = results(compiled, arguments, options)
    for a, b in zip(found, results(loss_of(form), arguments, options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@served
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype, backend: str, ids: Tensor) -> None:
    """Not even the products of the head, which must stay in fp32."""
    leaves, anchor = inputs("linear")
    options = {**anchor, "kl": "reverse", "return_entropy": True, "backend": backend}
    arguments = [*leaves, ids, normal(B)]
    expected = results(warp_fast.linear_warp_loss, arguments, options)
    with torch.autocast("cpu", dtype):
        found = results(warp_fast.linear_warp_loss, arguments, options)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@served
@both
@pytest.mark.parametrize("kl", ["reward", "reverse", "forward"])
def test_gradients_flow_to_the_policy_alone(
    kl: str, form: str, backend: str, ids: Tensor, mask: Tensor
) -> None:
    leaves, anchor = inputs(form)
    others = {k: v.requires_grad_() for k, v in anchor.items()}
    others["old_logprobs"] = (-torch.rand(B, T)).requires_grad_()
    advantages = normal(B).requires_grad_()
    normalizer = torch.tensor(3.0, requires_grad=True)
    loss_of(form)(
        *leaves, ids, advantages, **others, mask=mask, kl=kl, normalizer=normalizer, backend=backend
    ).loss.backward()
    for leaf in leaves:
        assert leaf.grad is not None and leaf.grad.any()
    for other in (*others.values(), advantages, normalizer):
        assert other.grad is None


@served
@pytest.mark.parametrize("kl", ["reward", "k2"])
def test_anchor_logprobs_receive_no_gradient(kl: Any, backend: str, ids: Tensor) -> None:
    (logits,), _ = inputs("logits")
    anchor = (-torch.rand(B, T)).requires_grad_()
    result = warp_fast.warp_loss(
        logits, ids, normal(B), anchor_logprobs=anchor, kl=kl, backend=backend
    )
    torch.autograd.backward(result.loss)
    assert anchor.grad is None and not result.anchor_logprobs.requires_grad


@served
@both
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 0), (2, 3, 2)], ids=str)
def test_logprobs_take_any_leading_shape(shape: tuple[int, ...], form: str, backend: str) -> None:
    """And any integers as ids."""
    heads = [normal(*shape, V)] if form == "logits" else [normal(*shape, D), normal(V, D)]
    function: Any = (
        warp_fast.token_logprobs if form == "logits" else warp_fast.linear_token_logprobs
    )
    ids = torch.randint(0, V, shape)
    options: Any = {"softcap": 3.0, "backend": backend}
    logits = heads[0] if form == "logits" else heads[0] @ heads[1].T
    logp = torch.log_softmax(3 * torch.tanh(logits / 3), -1)
    expected = logp.gather(-1, ids[..., None])[..., 0]
    for dtype in (torch.int64, torch.int32, torch.uint8):
        torch.testing.assert_close(function(*heads, ids.to(dtype), **options), expected)
    again, entropy = function(*heads, ids, **options, return_entropy=True)
    torch.testing.assert_close((again, entropy), (expected, -(logp.exp() * logp).sum(-1)))


@served
@pytest.mark.parametrize("kl", ["reward", "reward_to_go", "k2"])
def test_float64_beside_fp32_logits_leaves_fp32(kl: Any, backend: str, ids: Tensor) -> None:
    (logits,), _ = inputs("logits")
    given = -torch.rand(B, T, dtype=torch.float64)
    result = warp_fast.warp_loss(
        logits, ids, given, anchor_logprobs=given, old_logprobs=given, clip_range=0.2, kl=kl,
        normalizer=torch.tensor(2.0, dtype=torch.float64), return_entropy=True, backend=backend,
    )  # fmt: skip
    assert [value.dtype for value in result if value is not None] == [torch.float32] * 5


# torch leaves the methods of this class untyped
class GradientSizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records how many numbers each linear op returns as gradients, of hidden and of weight."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if "linear_loss" in str(func) or "linear_token_stats_backward" in str(func):
            self.seen.append((found[-2].numel(), found[-1].numel()))
        return found


@served
@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_gradient_of_a_frozen_input_is_not_computed(frozen: str, backend: str, ids: Tensor) -> None:
    leaves, anchor = inputs("linear")
    sizes = [
        0 if frozen in (name, "both") else leaf.numel()
        for name, leaf in zip(("hidden", "weight"), leaves, strict=True)
    ]
    for leaf, size in zip(leaves, sizes, strict=True):
        leaf.requires_grad_(size > 0)
    with GradientSizes() as counted:
        loss = loss_of("linear")(*leaves, ids, normal(B), **anchor, backend=backend).loss
        if frozen != "both":
            loss.backward(retain_graph=True)
            loss.backward()
    assert counted.seen == [tuple(sizes)] * (1 if frozen == "both" else 2)
    assert [leaf.grad is None for leaf in leaves] == [size == 0 for size in sizes]


@served
def test_no_gradient_is_computed_without_grad_mode(backend: str, ids: Tensor) -> None:
    leaves, anchor = inputs("linear")
    with torch.no_grad(), GradientSizes() as counted:
        loss_of("linear")(*leaves, ids, normal(B), **anchor, backend=backend)
    assert counted.seen == [(0, 0)]


@served
@pytest.mark.parametrize("kl", ["reward", "reverse", "forward"])
def test_anchor_without_a_weight_has_the_policys_detached(
    kl: str, backend: str, ids: Tensor
) -> None:
    leaves, anchor = inputs("linear")
    options = {"kl": kl, "return_entropy": True, "backend": backend}
    options["anchor_hidden"] = anchor["anchor_hidden"]
    arguments = [*leaves, ids, normal(B)]
    found = results(warp_fast.linear_warp_loss, arguments, options)
    options["anchor_weight"] = leaves[1].detach().clone()
    expected = results(warp_fast.linear_warp_loss, arguments, options)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
