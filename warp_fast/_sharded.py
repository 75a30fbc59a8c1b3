"""Sharded tensors (DTensor): local shards for the kernels, and what crosses ranks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def _dtensors() -> Any:
    """The module of DTensor, or None: where it was never imported there are none."""
    return sys.modules.get("torch.distributed.tensor")


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    module = _dtensors()
    return module is not None and isinstance(tensor, module.DTensor)


def holds_fsdp1(module: nn.Module) -> bool:
    """Whether FullyShardedDataParallel is in it, which keeps parameters in places of its own."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrapper = getattr(fsdp, "FullyShardedDataParallel", None)
    return wrapper is not None and any(isinstance(part, wrapper) for part in module.modules())


def local(tensor: Any) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    found: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return found


def all_local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`local` of each."""
    return list(tensors) if _dtensors() is None else [local(tensor) for tensor in tensors]


def among(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The pairs that may hold a DTensor: none in a process that never imported it."""
    return [] if _dtensors() is None else list(zip(first, second, strict=True))


def with_local(shard: Tensor, like: Any) -> Tensor:
    """The tensor laid out as `like` of which this rank holds `shard`."""
    if not is_sharded(like):
        return shard
    found: Tensor = type(like).from_local(
        shard,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return found


def gatherers(module: nn.Module) -> list[Any]:
    """The parts of a module that FSDP2 gathers before a forward pass."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in module.modules() if isinstance(m, fsdp.FSDPModule)]


def check_layout(name: str, tensor: Any, like: Any) -> None:
    """Refuse what cannot be combined shard by shard with `like`, or has no value on any rank."""
    if is_sharded(tensor) != is_sharded(like):
        raise ValueError(f"{name} must be sharded like its partner; one is a DTensor, one is not")
    if not is_sharded(tensor):
        return
    if tensor.device_mesh != like.device_mesh or tensor.placements != like.placements:
        raise ValueError(f"{name} must have placements {like.placements}; got {tensor.placements}")
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"{name} has a Partial placement: no rank holds its value; redistribute it first"
        )


def common_mesh(tensors: Sequence[Any]) -> Any:
    """The device mesh of all DTensors among the tensors, or None."""
    meshes = [tensor.device_mesh for tensor in tensors if is_sharded(tensor)]
    if odd := [mesh for mesh in meshes if mesh != meshes[0]]:
        raise ValueError(f"DTensors must be on one device mesh; got {meshes[0]} and {odd[0]}")
    return meshes[0] if meshes else None


def counted_here(tensor: Any, mesh: Any) -> bool:
    """Whether this rank's copy counts in a sum over a mesh: the first of all replicas does.

    A plain tensor beside DTensors is taken to be the same on every rank.
    """
    if mesh is None:
        return True
    placements = tensor.placements if is_sharded(tensor) else [None] * mesh.ndim
    return all(
        mesh.get_local_rank(dim) == 0
        for dim, placement in enumerate(placements)
        if placement is None or placement.is_replicate()
    )


def sum_over_ranks_(values: Tensor, mesh: Any) -> None:
    """Add `values` up over the ranks of a mesh: one all-reduce per dimension."""
    if mesh is None:
        return
    import torch.distributed as dist

    for dim in range(mesh.ndim):
        dist.all_reduce(values, group=mesh.get_group(dim))


def first_index(tensor: Any) -> int:
    """Index, in the whole tensor, of the first local element; they must be neighbours."""
    if not is_sharded(tensor):
        return 0
    row, rows = 0, tensor.shape[0] if tensor.dim() else 1
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard" or placement.dim != 0:
            raise ValueError(
                "stochastic storage needs tensors sharded along dimension 0, so that random bits "
                f"do not depend on the sharding; got {placement}"
            )
        share = -(-rows // tensor.device_mesh.size(dim))
        begin = min(tensor.device_mesh.get_local_rank(dim) * share, rows)
        row, rows = row + begin, min(share, rows - begin)
    return row * (tensor.numel() // tensor.shape[0] if tensor.dim() and tensor.shape[0] else 1)
