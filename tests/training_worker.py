"""What test_loss_training.py runs under torchrun: every check on each of two processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.small_lm import WIDTH, Batch, SmallLM, batch, gradients
from warp_fast import EMAAnchor, linear_warp_loss

SEQUENCES, PROCESSES = 6, 2
# DDP and FSDP take the mean over processes, which this makes the sum over all sequences
NORMALIZER = SEQUENCES / PROCESSES
RATE = 0.2


def mine(tensors: Any, rank: int | None = None) -> Any:
    """The rows of one process, by default of this one."""
    rank = dist.get_rank() if rank is None else rank
    half = SEQUENCES // PROCESSES
    return tensors[rank * half : (rank + 1) * half]


def whole(masked_rank: int | None) -> Batch:
    """The batch of both processes; with masked_rank nothing counts of what that one has."""
    given = batch(SEQUENCES)
    if masked_rank is not None:
        mine(given, masked_rank).mask.fill_(False)
    return given


def check(found: dict[str, Any], expected: nn.Module) -> None:
    """Gradients, gathered where they are sharded."""
    for name, gradient in gradients(expected).items():
        ours = found[name]
        ours = ours.full_tensor() if isinstance(ours, DTensor) else ours
        torch.testing.assert_close(ours, gradient, rtol=1e-5, atol=1e-7)


def ddp_equals_one_process(masked_rank: int | None) -> None:
    given, alone = whole(masked_rank), SmallLM()
    anchor_logprobs = SmallLM(seed=1).logprobs(given)
    alone.loss(given, anchor_logprobs, normalizer=SEQUENCES).backward()
    wrapped = DistributedDataParallel(SmallLM())
    wrapped(mine(given), mine(anchor_logprobs), normalizer=NORMALIZER).backward()
    check(gradients(wrapped.module), alone)


def sharded(mesh: Any, reshard: bool, **options: Any) -> Any:
    """README.md has this recipe."""
    module = SmallLM()
    for block in module.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard, **options)
    for method in ("loss", "logprobs"):
        register_fsdp_forward_method(module, method)
    return module


def steps(policy: Any, anchor: EMAAnchor, given: Batch, normalizer: float) -> None:
    """Three steps, and the gradients of a fourth."""
    averaged: Any = anchor.module
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        policy.loss(given, averaged.logprobs(given), normalizer=normalizer).backward()
        if step < 3:
            optimizer.step()
            anchor.update()


def fsdp2_equals_one_process(mesh: Any, reshard: bool, masked_rank: int | None) -> None:
    given, alone, policy = whole(masked_rank), SmallLM(), sharded(mesh, reshard)
    steps(alone, EMAAnchor(alone, rate=RATE, storage="fp32"), given, SEQUENCES)
    anchor = EMAAnchor(policy, rate=RATE, storage="fp32", module=sharded(mesh, reshard))
    steps(policy, anchor, mine(given), NORMALIZER)
    check(gradients(policy), alone)


def a_sharded_head_is_refused(mesh: Any) -> None:
    """Outside of a registered method the weight is a shard of it."""
    policy, given = sharded(mesh, reshard=True), batch(SEQUENCES)
    hidden = torch.zeros(*given.inputs.shape, WIDTH)
    try:
        linear_warp_loss(hidden, policy.head.weight, given.targets, given.advantages, kl="none")
    except ValueError as error:
        assert "weight must be a plain tensor; got a DTensor" in str(error), error
        return
    raise AssertionError("a sharded weight was not refused")


def mixed_precision_keeps_logprobs(mesh: Any, cast: bool) -> None:
    """FSDP2 casts what enters a registered method, log-probs too, unless told not to."""
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=cast)
    policy, module = (sharded(mesh, True, mp_policy=precision) for _ in range(2))
    anchor: Any = EMAAnchor(policy, storage="fp32", module=module).module
    given = mine(whole(None))
    given.advantages.zero_()
    if not cast:
        # of an exact copy: no noise of 16 bits
        assert policy.loss(given, anchor.logprobs(given), kl="k2") == 0
        return
    try:
        policy.loss(given, anchor.logprobs(given), kl="k2")
    except TypeError as error:
        assert "anchor_logprobs must be float32" in str(error), error
        assert "cast_forward_inputs=False" in str(error), error
        return
    raise AssertionError("log-probs of 16 bits were not refused")


def main() -> None:
    """Run all checks; an assertion ends the process, and torchrun tells."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for masked_rank in (None, 0, 1):
        ddp_equals_one_process(masked_rank)
        fsdp2_equals_one_process(mesh, reshard=masked_rank != 0, masked_rank=masked_rank)
    a_sharded_head_is_refused(mesh)
    for cast in (True, False):
        mixed_precision_keeps_logprobs(mesh, cast)
    dist.destroy_process_group()
    print("every check passed")


if __name__ == "__main__":
    main()
