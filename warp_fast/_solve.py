"""Between the two passes of SLERP: coefficients from Gram matrices, without the host in between."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from warp_fast._define import Kernel
from warp_fast._table import side_stream

Solve = Callable[[Tensor], tuple[Tensor, Tensor]]


def solved_on_host(solve: Solve) -> Kernel:
    """The op that solves on the CPU and judges what was found."""

    def run(gram: Tensor, names: list[str]) -> Tensor:
        host = gram.cpu()
        return _judged(*solve(host), host, names).to(gram.device)

    return run


def solved_and_applied(solve: Solve, apply: Kernel) -> Kernel:
    """The op that solves, scales by the etas, applies, and judges what was found.

    On a GPU all of it is queued before the host waits for anything. A gram of NaN or inf gives
    coefficients of NaN, and those write nothing: it is not too late to refuse.
    """

    def run(
        out: list[Tensor],
        init: list[Tensor],
        policies: list[Tensor],
        gram: Tensor,
        etas: list[float],
        names: list[str],
        segment: list[int],
    ) -> Tensor:
        coefficients, linear = solve(gram)
        rows = scaled(coefficients, etas)
        if not gram.is_cuda:
            coefficients = _judged(coefficients, linear, gram, names)
            apply(out, init, policies, rows, segment)
            return coefficients
        solved = torch.cuda.current_stream(gram.device).record_event()
        apply(out, init, policies, rows, segment)
        side = side_stream(gram.device)
        side.wait_event(solved)
        with torch.cuda.stream(side):
            return _judged(coefficients, linear, gram, names)

    return run


def scaled(coefficients: Tensor, etas: Sequence[float]) -> Tensor:
    """[K, S, M]: eta_k times the coefficients, on their device."""
    rows = [coefficients * eta for eta in etas]
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _judged(coefficients: Tensor, linear: Tensor, gram: Tensor, names: Sequence[str]) -> Tensor:
    """The coefficients on the host; refuses NaN and inf, warns where the linear rule was taken."""
    coefficients, linear = coefficients.cpu(), linear.cpu()
    if coefficients.isnan().any():
        bad = ~gram.cpu().isfinite()
        s = int(bad.flatten(1).any(1).nonzero()[0])
        where = bad[s].diagonal().nonzero().flatten().tolist()
        raise ValueError(
            f"task vectors must be finite, and their squares fit fp64; in {names[s]} those of "
            f"policies {where} (or init) hold NaN, inf or numbers too large for that"
        )
    found = linear.nonzero().flatten().tolist()
    warn_linear("slerp", [names[s] for s in found], len(names))
    return coefficients


def warn_linear(who: str, names: Sequence[str], count: int) -> None:
    """Name the segments, of `count`, that were merged linearly, if there are any."""
    if names:
        warnings.warn(
            f"{who}: zero, parallel or antiparallel task vectors in {len(names)} of {count} "
            f"segments ({first_of(names)}); these were merged linearly",
            stacklevel=3,
        )


def first_of(names: Sequence[str]) -> str:
    """Up to five of them."""
    return ", ".join([*names[:5], *["..."] * (len(names) > 5)])
