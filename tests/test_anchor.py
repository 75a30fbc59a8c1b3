"""EMAAnchor: an exact copy at first, an exact average later, and its state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from warp_fast import EMAAnchor

STORAGES = ("split", "fp32", "bf16")


class Small(nn.Module):
    """Two layers with a tied head, a frozen part and buffers, as language models have them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.frozen = nn.Linear(5, 5)
        self.frozen.requires_grad_(False)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(1, dtype=torch.long))
        self.to(dtype)

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(self.drop(self.frozen(self.embed(ids))))


def move(policy: nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(by)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", ["split", "fp32"])
def test_starts_as_an_exact_copy(storage: Any, dtype: torch.dtype) -> None:
    policy = Small(dtype)
    averaged = EMAAnchor(policy, 0.1, storage).averaged_state_dict()
    assert averaged.keys() == policy.state_dict().keys()
    for name, tensor in policy.state_dict().items():
        assert torch.equal(averaged[name].float(), tensor.float())


@pytest.mark.parametrize("given", [False, True])
def test_a_parameter_that_is_unfrozen_later_is_refused(given: bool) -> None:
    """It would be shared with the anchor, or never follow; the averages are as they were."""
    policy = Small(torch.float32)
    module = Small(torch.float32) if given else None
    anchor = EMAAnchor(policy, 0.5, "fp32", module=module)
    before = copy.deepcopy(anchor.state_dict())
    move(policy, 1.0)
    policy.frozen.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'frozen\.weight', 'frozen\.bias'.* require a gradient"):
        anchor.update()
    after = anchor.state_dict()
    assert after["step"] == 0
    for name, average in before["averages"].items():
        assert torch.equal(after["averages"][name], average)
    policy.frozen.requires_grad_(False)
    anchor.update()


@pytest.mark.parametrize("name", ["embed.weight", "frozen.bias"])
def test_a_parameter_that_is_another_object_later_is_refused(name: str) -> None:
    """The anchor would follow, or share, what the policy does not use any more."""
    policy = Small(torch.float32)
    anchor = EMAAnchor(policy, 0.5, "fp32")
    other = {name: torch.ones_like(policy.get_parameter(name))}
    policy.load_state_dict(other, strict=False)
    anchor.update()
    policy.load_state_dict(other, strict=False, assign=True)
    for call in (anchor.update, anchor.reset_, anchor.swapped().__enter__):
        with pytest.raises(ValueError, match=rf"other parameters .*\['{name}'\].*assign=True"):
            call()
    assert anchor.step == 1


def test_a_static_anchor_outlives_a_policy_that_diverged() -> None:
    policy = Small(torch.float32)
    anchor = EMAAnchor(policy, 0.0)
    before = anchor.averaged_state_dict()
    move(policy, float("nan"))
    anchor.update()
    assert all(torch.equal(x, before[name]) for name, x in anchor.averaged_state_dict().items())


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"version": 3}


def test_extra_state_is_passed_on() -> None:
    averaged: Any = EMAAnchor(WithExtraState(2, 2)).averaged_state_dict()
    assert averaged["_extra_state"] == {"version": 3}


@pytest.mark.parametrize("storage", STORAGES)
def test_ties_stay_tied_frozen_is_shared_buffers_are_copied(storage: Any) -> None:
    policy = Small(torch.float32)
    anchor = EMAAnchor(policy, 0.5, storage)
    module: Any = anchor.module
    assert module.head.weight is module.embed.weight
    assert module.frozen.weight is policy.frozen.weight
    policy.get_buffer("seen").fill_(3)
    anchor.update()
    assert module.seen.item() == 3 and module.seen is not policy.seen
    assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_storage_is_what_it_says() -> None:
    policy = Small(torch.bfloat16)
    for storage, dtype in (("split", torch.bfloat16), ("fp32", torch.float32)):
        assert EMAAnchor(policy, 0.1, storage).module.embed.weight.dtype == dtype  # type: ignore[union-attr, arg-type]
    assert EMAAnchor(Small(torch.float64), 0.1, "fp32").module.embed.weight.dtype == torch.float64  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("storage", "tolerance"), [("split", 1e-6), ("fp32", 1e-6), ("bf16", 0.05)]
)
def test_follows_the_policy(storage: Any, tolerance: float) -> None:
    torch.manual_seed(0)
    policy = Small(torch.float32)
    anchor = EMAAnchor(policy, 0.1, storage)
    expected = policy.embed.weight.detach().double()
    for _ in range(20):
        move(policy, 0.01)
        anchor.update()
        expected += 0.1 * (policy.embed.weight.detach().double() - expected)
    found = anchor.averaged_state_dict()["head.weight"].double()
    assert (found - expected).abs().max() < tolerance
    assert anchor.step == 20


def test_tiny_steps_move_split_storage_and_not_bf16_lerp() -> None:
    """A bf16 policy that drifts by one part in 10^4 per step: the plain bf16 average stalls."""
    torch.manual_seed(0)
    policy = Small(torch.float32)
    anchor = EMAAnchor(policy, 0.01, "split")
    stalled = policy.embed.weight.detach().bfloat16()
    start = policy.embed.weight.detach().clone()
    for _ in range(300):
        move(policy, 1e-5)
        anchor.update()
        stalled.lerp_(policy.embed.weight.detach().bfloat16(), 0.01)
    moved = (anchor.averaged_state_dict()["embed.weight"] - start).mean()
    assert moved == pytest.approx(1e-5 * (300 - 99 * (1 - 0.99**300)), rel=0.01)
    assert (stalled.float() - start).mean() < 0.5 * moved


@pytest.mark.parametrize("storage", STORAGES)
def test_state_goes_on_exactly(storage: Any) -> None:
    torch.manual_seed(0)
    policy = Small(torch.float32)
    whole = EMAAnchor(policy, 0.1, storage, seed=5)
    for _ in range(3):
        move(policy, 0.01)
        whole.update()
    state = copy.deepcopy(whole.state_dict())
    resumed = EMAAnchor(policy, 0.9, storage)
    resumed.load_state_dict(state)
    for _ in range(3):
        move(policy, 0.01)
        whole.update()
        resumed.update()
    ours, theirs = whole.averaged_state_dict(), resumed.averaged_state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_reset_restarts_from_the_policy() -> None:
    policy = Small(torch.float32)
    anchor = EMAAnchor(policy, 0.1)
    move(policy, 1.0)
    anchor.update()
    anchor.reset_()
    assert torch.equal(anchor.averaged_state_dict()["embed.weight"], policy.embed.weight.detach())
    assert anchor.step == 0


def test_update_leaves_the_policy_and_its_gradients_alone() -> None:
    policy = Small(torch.float32)
    anchor = EMAAnchor(policy, 1.0)
    before = policy.embed.weight.detach().clone()
    policy(torch.tensor([1, 2])).sum().backward()
    anchor.update()
    assert torch.equal(policy.embed.weight.detach(), before)
    assert policy.embed.weight.grad is not None and policy.embed.weight.requires_grad


def test_refuses() -> None:
    policy = Small(torch.float32)
    with pytest.raises(ValueError, match="storage must be"):
        EMAAnchor(policy, 0.1, "int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\]; got 1.5"):
        EMAAnchor(policy, 1.5)
    with pytest.raises(TypeError, match="float64, which split storage cannot hold"):
        EMAAnchor(Small(torch.float64), 0.1)
    with pytest.raises(ValueError, match="another module than the policy"):
        EMAAnchor(policy, 0.1, "fp32", module=policy)
    assert policy.embed.weight.requires_grad
    anchor = EMAAnchor(policy, 0.1)
    with pytest.raises(ValueError, match="storage must be 'split'; the state has 'fp32'"):
        anchor.load_state_dict(EMAAnchor(policy, 0.1, "fp32").state_dict())
    other = EMAAnchor(nn.Linear(2, 2), 0.1)
    with pytest.raises(ValueError, match="differing"):
        anchor.load_state_dict(other.state_dict())
    state = anchor.state_dict()
    before = {name: average.clone() for name, average in state["averages"].items()}
    short = {key: value for key, value in state.items() if key != "step"}
    with pytest.raises(ValueError, match=r"must hold \['step'\]"):
        anchor.load_state_dict(short)
    halves = {name: torch.ones_like(x, dtype=torch.float16) for name, x in before.items()}
    with pytest.raises(ValueError, match=r"averages of .* torch.bfloat16; got .* torch.float16"):
        anchor.load_state_dict({**state, "averages": halves})
    assert all(torch.equal(anchor.state_dict()["averages"][name], x) for name, x in before.items())


def test_a_loaded_anchor_has_the_buffers_of_its_policy() -> None:
    policy = nn.BatchNorm1d(3)
    state = EMAAnchor(policy, 0.1).state_dict()
    fresh = nn.BatchNorm1d(3)
    anchor = EMAAnchor(fresh, 0.1)
    fresh.get_buffer("running_mean").fill_(7)  # as the policy's own checkpoint does
    anchor.load_state_dict(state)
    assert anchor.module.get_buffer("running_mean").tolist() == [7, 7, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", STORAGES)
def test_swapped_policy_has_the_averages_and_then_its_own(storage: Any, dtype: torch.dtype) -> None:
    policy = Small(dtype)
    anchor = EMAAnchor(policy, 0.25, storage)
    move(policy, 1.0)
    anchor.update()
    own = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    averaged = anchor.averaged_state_dict()
    with pytest.raises(RuntimeError, match="evaluation failed"), anchor.swapped() as swapped:
        assert swapped is policy and policy.head.weight is policy.embed.weight
        for name, tensor in policy.state_dict().items():
            torch.testing.assert_close(tensor.float(), averaged[name].float(), rtol=2**-8, atol=0)
        raise RuntimeError("evaluation failed")
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, own[name])


@pytest.mark.parametrize("first", ["policy", "anchor"])
def test_autocast_keeps_no_weights_over_a_swap(first: str) -> None:
    """It caches the casts of a parameter, whose place then has other weights."""
    policy, x = nn.Linear(3, 3), torch.ones(2, 3)
    anchor = EMAAnchor(policy, 0.25, "fp32")
    move(policy, 1.0)

    def swapped() -> Tensor:
        with anchor.swapped() as of_anchor:
            found: Tensor = of_anchor(x)
        return found

    with torch.autocast("cpu", torch.bfloat16):
        expected = policy(x).detach(), anchor.module(x)
    with torch.autocast("cpu", torch.bfloat16):
        calls = [lambda: policy(x), swapped]
        found = [call() for call in (calls if first == "policy" else calls[::-1])]
    for made, right in zip(found if first == "policy" else found[::-1], expected, strict=True):
        assert torch.equal(made, right)


@pytest.mark.gpu
def test_update_on_a_side_stream() -> None:
    policy = Small(torch.bfloat16).cuda()
    anchor, expected = (EMAAnchor(policy, 0.25) for _ in range(2))
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for _ in range(5):
        move(policy, 0.5)
        anchor.update(side)
        torch.cuda.current_stream().wait_stream(side)
        expected.update()
    for name, tensor in anchor.averaged_state_dict().items():
        assert torch.equal(tensor, expected.averaged_state_dict()[name])
