"""The EMA update beside its peers: time, bandwidth, memory, and whether the average moves at all.

    python -m bench.bench_ema [--quick]        pytest bench/bench_ema.py --benchmark-only

`captured` is the projection of the average's displacement on the true one, in percent, after steps
of Adam's size at lr 1e-6: 100 is right, a bf16 average that is rounded to nearest stays behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from bench.harness import Absent, Provider, Scale, measure, parse, relative_error
from bench.peers import AVERAGES, Average, AveragePeer, Tensors, missing
from bench.report import Group, dtype_name, environment, publish
from warp_fast import ema_update_
from warp_fast.reference.ema import join_float32, split_float32

RATE = 0.01
GEMMA_2_2B_BLOCK = [(9216, 2304)] * 3 + [(2048, 2304)] * 2 + [(1024, 2304)] * 2 + [(2304,)] * 4
GEMMA_3_270M_BLOCK = [(2048, 640)] * 3 + [(1024, 640)] * 2 + [(256, 640)] * 2 + [(640,)] * 4
ON_GPU = GEMMA_2_2B_BLOCK * 8
GATE = [(257, 129), (1,), (4096,)]
_GATE_RATE = 0.3  # of the order of the values: a wrong formula shows above bf16 rounding
# three roundings of the product formulas, or one stochastic rounding
_ALLOWED = {torch.float32: 4 * 2.0**-24, torch.bfloat16: 4 * 2.0**-8}


def ema_bytes(storage: torch.dtype, params: torch.dtype, split: bool = False) -> int:
    """Bytes per element, as `warp_fast.ema_update_` states: the average twice, params once."""
    return 2 * (4 if split else storage.itemsize) + params.itemsize


def _full(params: Tensors, rate: float) -> Average:
    ema = [param.float() for param in params] if params[0].dtype != torch.float32 else None
    ema = ema or [param.clone() for param in params]
    return Average(lambda: ema_update_(ema, params, rate), lambda: ema)


def _split(params: Tensors, rate: float) -> Average:
    halves = [split_float32(param.float()) for param in params]
    high, low = [h for h, _ in halves], [w for _, w in halves]

    def values() -> Tensors:
        return [join_float32(h, w) for h, w in zip(high, low, strict=True)]

    return Average(lambda: ema_update_(high, params, rate, residual=low), values)


def _stochastic(params: Tensors, rate: float) -> Average:
    ema = [param.bfloat16().clone() for param in params]
    steps = iter(range(1 << 62))

    def update() -> object:
        return ema_update_(ema, params, rate, stochastic=True, step=next(steps))

    return Average(update, lambda: ema)


_BOTH = (torch.bfloat16, torch.float32)
EMA_FLOPS = 3  # per element: a difference, a product, a sum
OURS = [
    AveragePeer("warp_fast", torch.float32, _BOTH, _full),
    AveragePeer("warp_fast split", torch.float32, _BOTH, _split),
    AveragePeer("warp_fast stochastic", torch.bfloat16, (torch.bfloat16,), _stochastic),
]


def label(peer: AveragePeer) -> str:
    return f"{peer.name}, {dtype_name(peer.storage)}"


def takers(params: torch.dtype) -> tuple[list[AveragePeer], list[Absent]]:
    """Who can average parameters of this dtype, and who could if installed."""
    able = [peer for peer in [*OURS, *AVERAGES] if params in peer.gives]
    absent = [Absent(label(p), how) for p in able if (how := missing(p.package)) is not None]
    return [peer for peer in able if missing(peer.package) is None], absent


def one_update_error(peer: AveragePeer, dtype: torch.dtype, device: torch.device) -> float:
    """Relative error of one update against start + rate * (end - start) in float64."""
    random = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=random).to(device, dtype) for shape in GATE]
    end = [torch.randn(shape, generator=random).to(device, dtype) for shape in GATE]
    params = [tensor.clone() for tensor in start]
    average = peer.make(params, _GATE_RATE)
    for param, value in zip(params, end, strict=True):
        param.copy_(value)
    average.update()
    gold = [a.double().lerp(b.double(), _GATE_RATE) for a, b in zip(start, end, strict=True)]
    return relative_error(average.values(), gold)


def captured(
    peers: Sequence[AveragePeer], dtype: torch.dtype, steps: int, weights: int, lr: float = 1e-6
) -> dict[str, float]:
    """Share of the true displacement that each average makes; all see the same policy.

    Its fp32 weights (sigma 0.02) move by +-lr a step, a fifth of it steadily; params are their
    rounding to `dtype`, and the true average is that of params in float64.
    """
    random = torch.Generator().manual_seed(0)
    policy = 0.02 * torch.randn(weights, generator=random)
    drift = 0.2 * torch.randn(weights, generator=random).sign()
    params = [policy.to(dtype, copy=True)]
    start = params[0].double()
    true = start.clone()
    averages = {label(peer): peer.make(params, RATE) for peer in peers}
    for _ in range(steps):
        policy += lr * (drift + torch.randn(weights, generator=random).sign())
        params[0].copy_(policy)
        true.lerp_(params[0].double(), RATE)
        for average in averages.values():
            average.update()
    moved = true - start

    def share(average: Average) -> float:
        return float((average.values()[0].double() - start) @ moved / (moved @ moved))

    return {name: share(average) for name, average in averages.items()}


def provider(peer: AveragePeer, params: Tensors, shown: dict[str, str] | None = None) -> Provider:
    """A peer at work on `params`."""
    dtype, device = params[0].dtype, params[0].device
    elements = sum(param.numel() for param in params)
    return Provider(
        name=label(peer),
        run=peer.make(params, RATE).update,
        error=lambda: one_update_error(peer, dtype, device),
        allowed=_ALLOWED[peer.storage],
        elements=elements,
        bytes=elements * ema_bytes(peer.storage, dtype),
        shown=shown or {},
        ours=peer in OURS,
        flops=elements * EMA_FLOPS,
    )


def compare(
    dtype: torch.dtype, shapes: Sequence[Any], device: torch.device, scale: Scale, steps: int
) -> Group:
    """All who can average parameters of `dtype`, in one run."""
    peers, absent = takers(dtype)
    shares = captured(peers, dtype, steps, weights=1 << 14)
    params = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    providers = [
        provider(peer, params, {"captured %": f"{100 * shares[label(peer)]:.1f}"}) for peer in peers
    ]
    size = sum(param.numel() for param in params) / 1e6
    title = f"EMA of {dtype_name(dtype)} parameters, {size:.1f} M elements"
    results = measure(providers, device, scale)
    return Group(title, results, absent, "probe: update", label(OURS[0]))


_CASES = {
    f"{label(peer)}, {dtype_name(dtype)} parameters": (peer, dtype)
    for dtype in _BOTH
    for peer in [*OURS, *AVERAGES]
    if dtype in peer.gives
}


@pytest.mark.parametrize("case", _CASES)
def test_ema(case: str, timed: Callable[[str, Callable[[torch.device], Provider]], None]) -> None:
    peer, dtype = _CASES[case]
    if how := missing(peer.package):
        pytest.skip(how)

    def build(device: torch.device) -> Provider:
        params = [torch.randn(shape).to(device, dtype) for shape in GEMMA_3_270M_BLOCK]
        return provider(peer, params)

    timed(f"EMA, {dtype_name(dtype)} parameters", build)


def main(given: Sequence[str] | None = None) -> None:
    options = parse(__doc__ or "", given)
    stamp = environment(options.device)
    large = ON_GPU if options.device.type == "cuda" else GEMMA_2_2B_BLOCK
    shapes = GEMMA_3_270M_BLOCK * 4 if options.quick else large
    chosen = options.chosen(_BOTH)
    groups = (compare(dtype, shapes, options.device, options.scale, 3000) for dtype in chosen)
    publish("ema", groups, stamp, options)


if __name__ == "__main__":
    main()
