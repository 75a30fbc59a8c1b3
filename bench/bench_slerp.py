"""SLERP of task vectors beside its peers: time, share of the two-pass floor, memory, error.

    python -m bench.bench_slerp [--quick]      pytest bench/bench_slerp.py --benchmark-only

Each provider is gated against what it computes, in float64. `off WARP` is the error of its task
vector against WARP's slerp in float64, so it shows both another formula and the rounding of the
output: of bf16 weights that alone is several percent of a task vector of 2 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.bench_ema import GEMMA_3_270M_BLOCK, ON_GPU
from bench.harness import Absent, Provider, Scale, measure, parse, relative_error
from bench.peers import MERGES, MergePeer, Tensors, missing, rerun_under, warp_target
from bench.report import Group, dtype_name, environment, publish
from warp_fast import gram, slerp

Shapes = Sequence[tuple[int, ...]]
Family = tuple[Tensors, list[Tensors]]

GEMMA_3_1B_BLOCK = [(6912, 1152)] * 3 + [(1024, 1152)] * 2 + [(256, 1152)] * 2 + [(1152,)] * 4
GATE = [(257, 129), (4096,)]
CASES = [(2, torch.float32), (2, torch.bfloat16), (3, torch.float32), (5, torch.bfloat16)]
OURS, IN_PLACE, GRAM = "warp_fast", "warp_fast, out=", "warp_fast, Gram pass"
# output rounding and a few operations of the size of the weights
_ALLOWED = {torch.float32: 16 * 2.0**-24, torch.bfloat16: 2.0**-8}
_GRAM_ALLOWED = 1e-6  # deltas in fp32, sums in fp64


def gram_bytes(runs: int, itemsize: int) -> int:
    """Bytes per element of the Gram pass, as `warp_fast.gram` states."""
    return (runs + 1) * itemsize


def slerp_bytes(runs: int, itemsize: int, etas: int = 1) -> int:
    """Bytes per element of both passes, as `warp_fast.slerp` states."""
    return gram_bytes(runs, itemsize) + (runs + 1 + etas) * itemsize


def gram_flops(runs: int) -> int:
    """Per element: the differences, then a product and a sum for every pair."""
    return runs + runs * (runs + 1)


def slerp_flops(runs: int, etas: int = 1) -> int:
    """Per element of both passes: the differences again, and a product and a sum for each."""
    return gram_flops(runs) + runs + 2 * runs * etas


def family(shapes: Shapes, runs: int, dtype: torch.dtype, device: torch.device) -> Family:
    """Weights of sigma 0.02 and policies that lie 2 % away in independent directions."""
    init = [0.02 * torch.randn(shape, device=device) for shape in shapes]
    policies = [
        [(start + 4e-4 * torch.randn_like(start)).to(dtype) for start in init] for _ in range(runs)
    ]
    return [start.to(dtype) for start in init], policies


def merge_all(peer: MergePeer, init: Tensors, policies: list[Tensors]) -> Tensors:
    """A peer merges one tensor after the other."""
    return [peer.merge(s, list(ends)) for s, *ends in zip(init, *policies, strict=True)]


def task_error(merged: Tensors, init: Tensors, policies: list[Tensors]) -> float:
    """|merged - WARP's merge| over |WARP's merge - init|, all tensors together."""
    off = moved = 0.0
    for ours, start, *ends in zip(merged, init, *policies, strict=True):
        gold = warp_target(start, list(ends))
        off += float((ours.double() - gold).square().sum())
        moved += float((gold - start.double()).square().sum())
    return math.sqrt(off / moved)


def _gram_error(small: Family) -> float:
    init, policies = small
    ends = zip(init, *policies, strict=True)
    deltas = [torch.stack([(e.double() - s.double()).flatten() for e in es]) for s, *es in ends]
    return relative_error([gram(init, policies)], [torch.stack([d @ d.T for d in deltas])])


def peers(runs: int) -> tuple[list[MergePeer], list[Absent]]:
    able = [peer for peer in MERGES if runs <= peer.most]
    absent = [Absent(p.name, how) for p in able if (how := missing(p.package)) is not None]
    return [peer for peer in able if missing(peer.package) is None], absent


def provider(
    name: str,
    run: Callable[[], object],
    merge: Callable[[Tensors, list[Tensors]], Tensors],
    target: Callable[[Tensor, Tensors], Tensor],
    weights: Family,
) -> Provider:
    """What `run` does with `weights`, as a provider; `merge` shows on small weights that it can."""
    init, policies = weights
    runs, dtype, device = len(policies), init[0].dtype, init[0].device
    elements = sum(start.numel() for start in init)
    small = family(GATE, runs, dtype, device)
    shown: dict[str, str] = {}

    def error() -> float:
        merged = merge(*small)
        shown["off WARP %"] = f"{100 * task_error(merged, *small):.2g}"
        gold = [target(start, list(ends)) for start, *ends in zip(small[0], *small[1], strict=True)]
        return relative_error(merged, gold)

    return Provider(
        name,
        run,
        error,
        _ALLOWED[dtype],
        elements,
        elements * slerp_bytes(runs, dtype.itemsize),
        shown,
        ours=name.startswith(OURS),
        read_bytes=elements * gram_bytes(runs, dtype.itemsize),
        flops=elements * slerp_flops(runs),
    )


def ours(weights: Family) -> dict[str, Provider]:
    """Both passes into new tensors as all peers do, both into old ones, and the Gram pass alone."""
    init, policies = weights
    out = [torch.empty_like(start) for start in init]
    elements = sum(start.numel() for start in init)
    small = family(GATE, len(policies), init[0].dtype, init[0].device)
    found = [
        provider(OURS, lambda: slerp(init, policies), slerp, warp_target, weights),
        provider(IN_PLACE, lambda: slerp(init, policies, out=out), slerp, warp_target, weights),
        Provider(
            name=GRAM,
            run=lambda: gram(init, policies),
            error=lambda: _gram_error(small),
            allowed=_GRAM_ALLOWED,
            elements=elements,
            bytes=elements * gram_bytes(len(policies), init[0].dtype.itemsize),
            ours=True,
            read_bytes=elements * gram_bytes(len(policies), init[0].dtype.itemsize),
            flops=elements * gram_flops(len(policies)),
        ),
    ]
    return {each.name: each for each in found}


def of_peer(peer: MergePeer, weights: Family) -> Provider:
    merge = partial(merge_all, peer)
    return provider(peer.name, lambda: merge(*weights), merge, peer.target, weights)


def compare(
    runs: int, dtype: torch.dtype, shapes: Shapes, device: torch.device, scale: Scale
) -> Group:
    """All who can merge `runs` policies, in one run."""
    weights = family(shapes, runs, dtype, device)
    able, absent = peers(runs)
    providers = [*ours(weights).values(), *(of_peer(peer, weights) for peer in able)]
    size = sum(start.numel() for start in weights[0]) / 1e6
    title = f"SLERP of {runs} policies, {dtype_name(dtype)}, {size:.1f} M elements"
    return Group(title, measure(providers, device, scale), absent, "probe: update", IN_PLACE)


@pytest.mark.parametrize("name", [OURS, IN_PLACE, GRAM, *(peer.name for peer in MERGES)])
@pytest.mark.parametrize(("runs", "dtype"), CASES[:3])
def test_slerp(
    name: str,
    runs: int,
    dtype: torch.dtype,
    timed: Callable[[str, Callable[[torch.device], Provider]], None],
) -> None:
    peer = next((peer for peer in MERGES if peer.name == name), None)
    if peer is not None and (how := missing(peer.package)):
        pytest.skip(how)
    if peer is not None and runs > peer.most:
        pytest.skip(f"{name} merges at most {peer.most}")

    def build(device: torch.device) -> Provider:
        weights = family(GEMMA_3_270M_BLOCK, runs, dtype, device)
        return ours(weights)[name] if peer is None else of_peer(peer, weights)

    timed(f"SLERP of {runs}, {dtype_name(dtype)}", build)


def main(given: Sequence[str] | None = None) -> None:
    options = parse(__doc__ or "", given)
    if options.mergekit_python:
        rerun_under(options.mergekit_python, "bench.bench_slerp", given)
    stamp = environment(options.device)
    large = ON_GPU if options.device.type == "cuda" else GEMMA_3_1B_BLOCK
    shapes = GEMMA_3_270M_BLOCK * 2 if options.quick else large
    runs = [(case, shapes) for case in options.chosen(CASES[:2] if options.quick else CASES)]
    if options.device.type == "cuda":
        runs.append((CASES[1], GEMMA_3_270M_BLOCK))  # the second pass finds all of it in L2
    groups = (compare(*case, shapes, options.device, options.scale) for case, shapes in runs)
    publish("slerp", groups, stamp, options)


if __name__ == "__main__":
    main()
