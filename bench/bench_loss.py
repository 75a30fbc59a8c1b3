"""Policy-gradient loss from hidden states, forward and backward, beside its peers: time, memory.

    python -m bench.bench_loss [--quick]      pytest bench/bench_loss.py --benchmark-only

Every provider computes loss, gradient of the hidden states and of the head weight of REINFORCE with
the KL to an anchor in the reward, all from hidden states of policy and anchor: fp32 on CPU, bf16 on
GPUs. The gate judges all three against float64 on a small head. Elements are logits, rows outside
the mask included. `work` is the peak less both gradients, which all return; `of floor` the time of
the four products of the rows inside the mask, at the rate of a product measured in turn with them,
over the time. Then log-prob, KL and its gradients near an anchor, from bf16 (loss_accuracy.py).
Where others use the machine too, --threads 1 times the loss and not the waiting of its threads. Two
cores need one to two hours for all cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench.harness import Provider, Scale, backends, matmul_probe, measure, parse, relative_error
from bench.loss_accuracy import accuracy
from bench.peers_loss import BETA, EAGER, FORMULA, Batch, Loss, full_logprobs, peers, reinforce
from bench.report import Group, dtype_name, environment, publish
from warp_fast import linear_warp_loss

SEQUENCES = 8
OURS = "warp_fast"
# of the largest gradient: sums of fp32 products in any order; roundings of bf16 where it is rounded
_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2.0**-5}
_PRODUCTS = 4  # scores of policy and anchor, and two gradients


class Case(NamedTuple):
    """Sizes and the share of tokens outside the mask."""

    tokens: int
    width: int
    vocabulary: int
    masked: float

    def __str__(self) -> str:
        sizes = f"N {self.tokens}, D {self.width}, V {self.vocabulary}"
        return f"{sizes}, {100 * self.masked:.0f} % masked"


GATE = Case(64, 128, 1000, 0.3)  # verl's kernels take widths of whole 128
QUICK = [Case(256, 128, 8192, masked) for masked in (0.0, 0.5)]
ON_CPU = [
    Case(1024, width, vocabulary, masked)
    for vocabulary in (32_768, 262_144)
    for width in (256, 1024)
    for masked in (0.0, 0.5)
]
ON_GPU = [
    Case(tokens, width, vocabulary, masked)
    for vocabulary in (256_128, 262_144)
    for width in (2048, 2304, 3584)
    for tokens, masked in ((1024, 0.0), (8192, 0.0), (8192, 0.5), (32_768, 0.0))
]


def batch_of(case: Case, device: torch.device, dtype: torch.dtype, exact: bool = False) -> Batch:
    """A peaked policy and an anchor near it; `exact` gives the same numbers in float64.

    Advantages are of one sign: a loss whose terms cancel would be judged by its roundings alone.
    """
    make: Any = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    shape = SEQUENCES, case.tokens // SEQUENCES
    hidden = torch.randn(*shape, case.width, **make)
    weight = torch.randn(case.vocabulary, case.width, **make).mul_(3 / case.width**0.5)
    rows = (hidden, weight, hidden * 1.01, weight * 0.99)
    kept = torch.float64 if exact else dtype
    first, head, anchor, anchor_head = (x.to(dtype).to(kept) for x in rows)
    mask = torch.rand(shape, **make) >= case.masked
    return Batch(
        first.requires_grad_(),
        head.requires_grad_(),
        anchor,
        anchor_head,
        torch.randint(0, case.vocabulary, shape, **make),
        0.3 + 0.3 * torch.randn(SEQUENCES, **make).abs(),
        mask,
        mask.cpu(),
    )


def warp(
    batch: Batch, backend: str = "auto", low_memory: bool = False, on_host: bool = False
) -> Tensor:
    return linear_warp_loss(
        batch.hidden,
        batch.weight,
        batch.token_ids,
        batch.advantages,
        anchor_hidden=batch.anchor_hidden,
        anchor_weight=batch.anchor_weight,
        mask=batch.mask_on_host if on_host else batch.mask,
        beta=BETA,
        low_memory=low_memory,
        backend=backend,
    ).loss


def losses(device: torch.device) -> dict[str, Loss]:
    """Providers by name, ours first."""
    ours: dict[str, Loss] = {}
    for backend in backends("linear_loss", device):
        ours[f"{OURS}, {backend}"] = partial(warp, backend=backend)
        if backend != "reference":
            small = partial(warp, backend=backend, low_memory=True)
            ours[f"{OURS}, {backend}, low_memory"] = small
        if device.type == "cuda":
            ours[f"{OURS}, {backend}, mask on the host"] = partial(
                warp, backend=backend, on_host=True
            )
    return {**ours, **{peer.name: peer.loss for peer in peers()[0]}}


def step(loss: Loss, batch: Batch) -> list[Tensor]:
    """Loss and gradients."""
    found = loss(batch)
    torch.autograd.backward(found)
    assert batch.hidden.grad is not None and batch.weight.grad is not None
    return [found.detach(), batch.hidden.grad, batch.weight.grad]


def loss_error(loss: Loss, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of loss and gradients, on the case of the gate."""
    eager = partial(reinforce, logprobs=full_logprobs)
    gold = step(eager, batch_of(GATE, device, dtype, exact=True))
    ours = step(loss, batch_of(GATE, device, dtype))
    return max(relative_error([a], [b]) for a, b in zip(ours, gold, strict=True))


def loss_bytes(case: Case, itemsize: int) -> int:
    """Both weights, that of the policy again for the gradients, and its gradient."""
    return 4 * itemsize * case.vocabulary * case.width


def loss_flops(case: Case, batch: Batch) -> int:
    return _PRODUCTS * 2 * int(batch.mask.sum()) * case.vocabulary * case.width


def provider(name: str, loss: Loss, case: Case, batch: Batch) -> Provider:
    dtype = batch.hidden.dtype

    def forget() -> None:
        batch.hidden.grad = batch.weight.grad = None

    return Provider(
        name,
        lambda: step(loss, batch),
        lambda: loss_error(loss, batch.hidden.device, dtype),
        _ALLOWED[dtype],
        case.tokens * case.vocabulary,
        loss_bytes(case, dtype.itemsize),
        ours=name.startswith(OURS),
        prepare=forget,
        returned=batch.hidden.nbytes + batch.weight.nbytes,
        flops=loss_flops(case, batch),
    )


def compare(case: Case, device: torch.device, scale: Scale) -> Group:
    """All who are here, in one run."""
    torch.compiler.reset()  # past eight sizes torch.compile would run eagerly
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    batch = batch_of(case, device, dtype)
    probe = matmul_probe(device, dtype, case.tokens, case.width)
    everyone = [provider(name, loss, case, batch) for name, loss in losses(device).items()]
    results = measure([probe, *everyone], device, scale)
    title = f"linear_warp_loss, {case}, {dtype_name(dtype)}"
    return Group(title, results, peers()[1], "probe: update", FORMULA, probe.name)


@pytest.mark.parametrize("name", [OURS, FORMULA, EAGER])
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_linear_warp_loss(
    name: str, case: Case, timed: Callable[[str, Callable[[torch.device], Provider]], None]
) -> None:
    def build(device: torch.device) -> Provider:
        loss = warp if name == OURS else losses(device)[name]
        return provider(name, loss, case, batch_of(case, device, torch.float32))

    timed(f"linear_warp_loss, {case}", build)


def main(given: Sequence[str] | None = None) -> None:
    options = parse(__doc__ or "", given)
    stamp = environment(options.device)
    cases = QUICK if options.quick else ON_GPU if options.device.type == "cuda" else ON_CPU
    chosen = options.chosen(cases)
    timed = (compare(case, options.device, options.scale) for case in chosen)
    judged = accuracy(options.device, backends("linear_loss", options.device))
    publish("loss", itertools.chain(timed, judged), stamp, options)


if __name__ == "__main__":
    main()
