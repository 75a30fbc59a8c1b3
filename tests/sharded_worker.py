"""What test_sharded.py runs under torchrun: every check on each of two processes."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from warp_fast import EMAAnchor, FlatParameters, ema_update_, gram, lerp, slerp

# 5 and 3 rows do not halve; one row leaves the second process with nothing
SHAPES = {"a": (5, 4), "b": (3,), "c": (1, 7), "d": (6, 5)}
PLACEMENTS = {"a": Shard(0), "b": Shard(0), "c": Shard(0), "d": Shard(1)}


def raises(message: str, call: Any, *arguments: Any, **options: Any) -> None:
    """Check that a call is refused with a message."""
    try:
        call(*arguments, **options)
    except (TypeError, ValueError) as error:
        assert message in str(error), error
        return
    raise AssertionError(f"not refused: {message}")


def weights(seed: int, mesh: Any, replicated: bool = False) -> tuple[Any, Any]:
    """The same weights whole and sharded; "b" replicated where asked."""
    source = torch.Generator().manual_seed(seed)
    whole = {name: torch.randn(shape, generator=source) for name, shape in SHAPES.items()}
    placements = {**PLACEMENTS, "b": Replicate()} if replicated else PLACEMENTS
    sharded = {
        name: distribute_tensor(tensor, mesh, [placements[name]]) for name, tensor in whole.items()
    }
    return whole, sharded


def full(tensor: Any) -> Tensor:
    gathered: Tensor = tensor.full_tensor()
    return gathered


def slerp_equals_unsharded(mesh: Any, replicated: bool) -> None:
    pairs = [weights(seed, mesh, replicated) for seed in range(4)]
    (init, sharded_init), (policies, sharded) = pairs[0], zip(*pairs[1:], strict=True)
    torch.testing.assert_close(
        gram(sharded_init, sharded), gram(init, policies), rtol=1e-13, atol=1e-13
    )
    for merge in (slerp, lerp):
        expected = merge(init, policies, eta=[0.5, 1.0], segments=[["a", "b"], ["c", "d"]])
        found = merge(sharded_init, sharded, eta=[0.5, 1.0], segments=[["a", "b"], ["c", "d"]])
        for ours, theirs in zip(found, expected, strict=True):
            for name in SHAPES:
                assert isinstance(ours[name], DTensor)
                torch.testing.assert_close(full(ours[name]), theirs[name], rtol=1e-6, atol=1e-6)


def plain_tensors_count_once(mesh: Any) -> None:
    """Beside DTensors a plain one is the same on every rank."""
    mixed = []
    for seed in range(3):
        whole, sharded = weights(seed, mesh)
        mixed.append((whole, {**sharded, "b": whole["b"]}))
    (init, mixed_init), (policies, others) = mixed[0], zip(*mixed[1:], strict=True)
    torch.testing.assert_close(
        gram(mixed_init, others), gram(init, policies), rtol=1e-13, atol=1e-13
    )


def slerp_refuses(mesh: Any) -> None:
    init, sharded = weights(0, mesh)
    partial = {n: DTensor.from_local(t, mesh, [Partial()]) for n, t in init.items()}
    raises("Partial placement", slerp, partial, [partial])
    raises("must have placements", slerp, sharded, [weights(1, mesh, replicated=True)[1]])
    raises("one is a DTensor", slerp, sharded, [weights(1, mesh)[0]])
    raises("must be a plain tensor; got a DTensor", FlatParameters, sharded)
    # a sum over one mesh is not one over another
    other = init_device_mesh("cpu", (1, 2))
    mixed = {**sharded, "b": distribute_tensor(init["b"], other, [Replicate(), Shard(0)])}
    raises("on one device mesh", gram, mixed, [mixed])
    broken = {name: tensor.clone() for name, tensor in weights(1, mesh)[1].items()}
    if dist.get_rank() == 1:
        broken["a"].to_local()[0, 0] = float("nan")
    # every process refuses what one of them sees
    raises("must be finite", slerp, sharded, [broken])


def ema_equals_unsharded(mesh: Any, storage: str) -> None:
    ema, sharded_ema = weights(0, mesh)
    params, sharded_params = weights(1, mesh)
    names = ["a", "b", "c"]  # along dimension 0, as stochastic storage needs
    options: dict[str, Any] = {"seed": 3, "step": 5, "stochastic": storage == "stochastic"}
    lists = []
    for group in (ema, sharded_ema, params, sharded_params):
        dtype = torch.bfloat16 if storage != "fp32" else torch.float32
        lists.append([group[name].to(dtype) for name in names])
    residuals: list[Any] = [None, None]
    if storage == "split":
        residuals = [[torch.zeros_like(t, dtype=torch.int16) for t in lists[i]] for i in (0, 1)]
    ema_update_(lists[0], lists[2], 0.3, residual=residuals[0], **options)
    ema_update_(lists[1], lists[3], 0.3, residual=residuals[1], **options)
    for ours, theirs in zip(lists[1], lists[0], strict=True):
        assert torch.equal(full(ours), theirs)
    raises(
        "must have placements",
        ema_update_,
        lists[1][:1],
        [lists[3][0].redistribute(mesh, [Replicate()])],
        0.3,
        residual=residuals[1] and residuals[1][:1],
        **options,
    )


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


def anchor_follows_fsdp2(mesh: Any) -> None:
    plain, sharded, module = build(), build(), build().bfloat16()
    plain_anchor = EMAAnchor(plain, rate=0.2, storage="split")
    for part in (sharded, module):
        fully_shard(part, mesh=mesh)
    anchor = EMAAnchor(sharded, rate=0.2, storage="split", module=module)
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    for policy, follower in ((plain, plain_anchor), (sharded, anchor)):
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            policy(inputs).square().sum().backward()
            optimizer.step()
            follower.update()
    expected = plain_anchor.averaged_state_dict()
    for name, average in anchor.averaged_state_dict().items():
        torch.testing.assert_close(full(average), expected[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        anchor.module(inputs.bfloat16()), plain_anchor.module(inputs.bfloat16())
    )
    state = copy.deepcopy(anchor.state_dict())
    anchor.update()
    whole = {"averages": {n: full(t) for n, t in state["averages"].items()}}
    raises("averages of 0.weight must be sharded", anchor.load_state_dict, {**state, **whole})
    anchor.load_state_dict(state)
    for name, average in anchor.state_dict()["averages"].items():
        assert torch.equal(full(average), full(state["averages"][name]))
    with contextlib.ExitStack() as stack:
        raises("cannot be swapped", stack.enter_context, anchor.swapped())
    raises("module must have the policy's parameters", EMAAnchor, plain, module=nn.Linear(3, 3))


def anchor_of_fsdp1() -> None:
    cpu = torch.device("cpu")
    policy, module = (FullyShardedDataParallel(build(), device_id=cpu) for _ in range(2))
    raises("give module=", EMAAnchor, policy)
    anchor = EMAAnchor(policy, rate=0.2, storage="fp32", module=module)
    with contextlib.ExitStack() as stack:
        raises("cannot be swapped", stack.enter_context, anchor.swapped())


def main() -> None:
    """Run all checks; an assertion ends the process, and torchrun tells."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for replicated in (False, True):
        slerp_equals_unsharded(mesh, replicated)
    plain_tensors_count_once(mesh)
    slerp_refuses(mesh)
    for storage in ("fp32", "split", "stochastic"):
        ema_equals_unsharded(mesh, storage)
    anchor_follows_fsdp2(mesh)
    anchor_of_fsdp1()
    dist.destroy_process_group()
    print("every check passed")


if __name__ == "__main__":
    main()
