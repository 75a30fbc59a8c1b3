"""EMAAnchor: what of the policy and of its own module it notices, and refuses before it moves."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import pytest
import torch
from torch import nn

from tests.test_anchor import STORAGES, move
from warp_fast import EMAAnchor


@pytest.mark.parametrize("change", ["replaced", "added", "gone"])
def test_another_layer_is_noticed(change: str) -> None:
    """A low-rank adapter, say: the anchor would follow what the policy does not use any more."""
    policy = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    anchor = EMAAnchor(policy, 1.0)
    if change == "gone":
        del policy[1]
    else:
        policy.register_module("1" if change == "replaced" else "2", nn.Linear(3, 3))
    for call in (anchor.update, anchor.reset_, anchor.swapped().__enter__):
        with pytest.raises(ValueError, match="other parameters than when the anchor was made"):
            call()


@pytest.mark.parametrize("call", ["update", "reset_", "swapped"])
def test_nothing_moves_while_the_weights_are_swapped(call: str) -> None:
    policy = nn.Linear(3, 3)
    anchor = EMAAnchor(policy, 0.5)
    move(policy, 1.0)
    own, before = policy.weight.clone(), anchor.averaged_state_dict()["weight"]
    with anchor.swapped():
        with pytest.raises(RuntimeError, match=r"leave swapped\(\) before that"):
            made = getattr(anchor, call)()
            made.__enter__()
        assert torch.equal(policy.weight, before)
    assert torch.equal(policy.weight, own) and anchor.step == 0
    assert torch.equal(anchor.averaged_state_dict()["weight"], before)
    anchor.update()


def test_a_layer_may_be_wrapped_and_an_anchor_copied() -> None:
    policy = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    anchor = EMAAnchor(policy, 1.0, "fp32")
    policy[1] = nn.Sequential(nn.Identity(), policy[1])
    policy.register_module("last", nn.Identity())
    move(policy, 1.0)
    anchor.update()
    assert torch.equal(anchor.module(torch.ones(3)), policy(torch.ones(3)))
    other = copy.deepcopy(anchor)
    move(other.policy, 1.0)
    other.update()
    assert not torch.equal(other.module(torch.ones(3)), policy(torch.ones(3)))


def test_a_policy_that_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"policy must be a torch\.nn\.Module; got list"):
        EMAAnchor([torch.zeros(3)])  # type: ignore[arg-type]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_an_anchor_that_was_cast_is_refused(storage: Any, dtype: torch.dtype) -> None:
    """The other half of split storage, and the digits of fp32, would be of another number."""
    policy = nn.Linear(4, 4)
    anchor = EMAAnchor(policy, storage=storage)
    state = copy.deepcopy(anchor.state_dict())
    anchor.module.to(dtype)
    for call in (
        anchor.update,
        anchor.reset_,
        anchor.averaged_state_dict,
        anchor.swapped().__enter__,
        lambda: anchor.load_state_dict(state),
    ):
        with pytest.raises(ValueError, match=r"anchor's weight must stay .*autocast"):
            call()


@pytest.mark.parametrize("shape", [(5,), (1,), None])
def test_other_buffers_are_refused_before_anything_moves(shape: tuple[int, ...] | None) -> None:
    policy = nn.BatchNorm1d(2)
    anchor = EMAAnchor(policy, 0.5, "fp32")
    state = copy.deepcopy(anchor.state_dict())
    policy.register_buffer("running_mean", None if shape is None else torch.zeros(shape))
    move(policy, 1.0)
    for call in (anchor.update, anchor.reset_, lambda: anchor.load_state_dict(state)):
        with pytest.raises(ValueError, match=r"buffers of the policy; differing: \['running_mean'"):
            call()
    assert anchor.step == 0
    assert torch.equal(anchor.state_dict()["averages"]["weight"], state["averages"]["weight"])
    with pytest.raises(ValueError, match="buffers of the policy"):
        EMAAnchor(policy, module=nn.BatchNorm1d(2), storage="fp32")


def test_an_expanded_buffer_is_copied() -> None:
    policy = nn.Linear(2, 2)
    policy.register_buffer("scale", torch.ones(1).expand(5))
    anchor = EMAAnchor(policy)
    policy.scale = torch.full((5,), 2.0)
    anchor.update()
    assert anchor.module.get_buffer("scale").tolist() == [2.0] * 5


def test_a_module_that_shares_a_parameter_is_refused_and_the_policy_still_trains() -> None:
    policy, module = nn.Linear(3, 3), nn.Linear(3, 3)
    module.bias = policy.bias
    for given in (module, copy.copy(policy)):
        with pytest.raises(ValueError, match=r"own; it shares \[.*'bias'\]"):
            EMAAnchor(policy, module=given, storage="fp32")
    assert policy.bias.requires_grad and policy.weight.requires_grad


def test_a_forward_that_is_a_function_of_the_policy_is_refused() -> None:
    """Copied, it would call the policy, and the KL would be 0."""
    policy = nn.Sequential(nn.Linear(2, 2))
    plain = policy[0].forward
    policy[0].forward = lambda x: plain(x)
    with pytest.raises(ValueError, match=r"forward of 0 was replaced .*module="):
        EMAAnchor(policy)
    policy[0].forward = types.MethodType(nn.Linear.forward, policy[0])
    anchor = EMAAnchor(policy, storage="fp32", rate=0.0)
    move(policy, 1.0)
    assert not torch.equal(anchor.module(torch.ones(2)), policy(torch.ones(2)))


def test_a_method_that_holds_the_policy_is_refused_and_others_are_copied() -> None:
    """As TRL patches models: the method takes the copy for its self, and calls the policy."""
    policy: Any = nn.Linear(2, 2)
    plain = policy.forward

    @functools.wraps(plain)
    def again(x: torch.Tensor, deep: int = 0) -> torch.Tensor:
        return again(x, 1) if deep == 0 else functools.partial(plain)(x)

    for kept in (lambda self, x: plain(x), lambda self, x: again(x)):
        policy.forward = types.MethodType(kept, policy)
        with pytest.raises(ValueError, match="forward of the policy was replaced"):
            EMAAnchor(policy)
    double: Any = nn.Linear.forward
    method = types.MethodType(lambda self, x: 2 * double(self, x), policy)
    for forward in (method, functools.partial(method), functools.partial(double, policy)):
        policy.forward = forward
        anchor = EMAAnchor(policy, storage="fp32", rate=0.0)
        before = anchor.module(torch.ones(2))
        move(policy, 1.0)
        assert torch.equal(anchor.module(torch.ones(2)), before)
        assert not torch.equal(policy(torch.ones(2)), before)


def test_what_transformers_compiled_of_the_policy_is_not_copied() -> None:
    policy: Any = nn.Linear(2, 2)
    policy._compiled_call = policy.forward
    assert not hasattr(EMAAnchor(policy).module, "_compiled_call")
    assert policy._compiled_call == policy.forward


@pytest.mark.parametrize("change", ["assigned", "replaced", "another"])
def test_an_anchor_that_lost_its_averages_is_refused(change: str) -> None:
    """The averages would go on where no module uses them."""
    policy = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    anchor: Any = EMAAnchor(policy, storage="fp32")
    if change == "assigned":
        anchor.module.load_state_dict(policy.state_dict(), assign=True)
    elif change == "replaced":
        anchor.module[1] = nn.Linear(2, 2)
    else:
        anchor.module = copy.deepcopy(anchor.module)
    for call in (anchor.update, anchor.reset_, anchor.averaged_state_dict):
        with pytest.raises(ValueError, match=r"anchor.module must keep its parameters"):
            call()
    assert anchor.step == 0


@pytest.mark.parametrize(
    ("entry", "value", "match"),
    [
        ("rate", 5.0, "rate must be in"),
        ("step", "x", "step must be an integer"),
        ("seed", 2**63, "seed must be in"),
        ("rate", None, "rate must be a number"),
        ("averages", None, "averages must be tensors by name"),
        ("averages", {"weight": [1.0], "bias": [1.0]}, "averages must be tensors by name"),
    ],
)
def test_a_state_of_something_else_is_refused(entry: str, value: Any, match: str) -> None:
    anchor = EMAAnchor(nn.Linear(3, 3))
    with pytest.raises((ValueError, TypeError), match=match):
        anchor.load_state_dict({**anchor.state_dict(), entry: value})
    assert anchor.rate == 0.01 and anchor.step == 0


@pytest.mark.parametrize("how", ["whole", "part", "disabled"])
def test_a_compiled_policy_has_an_anchor_of_its_own(how: str) -> None:
    policy: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    if how == "whole":
        policy = torch.compile(policy, backend="eager")
    elif how == "part":
        policy[0] = torch.compile(policy[0], backend="eager")
    else:
        disable: Any = torch.compiler.disable
        policy[0] = disable(policy[0])
    anchor, inputs = EMAAnchor(policy, 1.0, "fp32"), torch.ones(2)
    before = policy(inputs)
    move(policy, 1.0)
    assert torch.equal(anchor.module(inputs), before)
    anchor.update()
    assert torch.equal(anchor.module(inputs), policy(inputs))


def test_the_average_outlives_the_policy() -> None:
    policy = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    anchor = EMAAnchor(policy)
    expected = anchor.averaged_state_dict()
    policy[1] = nn.Linear(2, 2)
    for name, tensor in anchor.averaged_state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_buffers_may_become_one() -> None:
    """As those of a rotary embedding of transformers do after a long text."""
    policy = nn.Linear(2, 2)
    policy.register_buffer("inv_freq", torch.ones(3))
    policy.register_buffer("original_inv_freq", torch.ones(3))
    anchor = EMAAnchor(policy)
    policy.inv_freq = policy.original_inv_freq
    anchor.update()
    policy.inv_freq = torch.full((3,), 2.0)
    anchor.update()
    assert anchor.module.get_buffer("inv_freq").tolist() == [2.0] * 3
    assert anchor.module.get_buffer("original_inv_freq").tolist() == [1.0] * 3


def test_what_is_wrapped_for_several_processes_is_refused_wherever_it_is() -> None:
    dist: Any = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        for policy in (wrapped, nn.ModuleDict({"policy": wrapped})):
            with pytest.raises(ValueError, match=r"pass policy\.module"):
                EMAAnchor(policy)
    finally:
        dist.destroy_process_group()
