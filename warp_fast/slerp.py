"""SLERP of task vectors: one Gram pass, a tiny solve, one apply pass, for any M policies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from warp_fast import _ops, _sharded, _weights
from warp_fast._backend import resolve
from warp_fast._etas import read_etas
from warp_fast._overlap import refuse_overlap
from warp_fast._solve import scaled
from warp_fast._task_vectors import TaskVectors
from warp_fast._weights import Weights


class SlerpReport(TaskVectors):
    """What a merge found, per segment.

    Attributes:
        segments: S names; of ranges of a flat tensor, [start:stop].
        gram: [S, M, M] fp64, <delta_i, delta_j>.
        coefficients: [S, M] fp64, on the task vectors, before eta.
    """

    @property
    def angles(self) -> Tensor:
        """[S, M, M] angles between task vectors, radians; NaN where one of the pair is zero."""
        return self._angles()


@torch.no_grad()
def gram(
    init: Weights, policies: Sequence[Weights], *, segments: Any = None, backend: str = "auto"
) -> Tensor:
    """Inner products of the task vectors of M policies, per segment.

        G[s, i, j] = <theta_i - theta_init, theta_j - theta_init> over segment s

    Args:
        init, policies, segments, backend: as in `slerp`.

    Returns: [S, M, M] fp64 on the device of init. Grams of unions of segments are sums of these.

    Traffic: reads init and every policy once.
    Numerics: differences in fp32 (exact for bf16 weights of like size), sums in fp64,
        deterministic.
    """
    layout = _weights.layout_of(init, policies, segments)
    ends, starts = _weights.matched(layout, init, policies), layout.tensors(init)
    return _gram(layout, starts, ends, resolve("slerp", backend, starts[0].device))


def _gram(
    layout: _weights.Layout, init: list[Tensor], policies: list[Tensor], backend: str
) -> Tensor:
    mesh = _sharded.common_mesh(init)
    if mesh is not None:
        init, policies = ([_counted(x, mesh) for x in each] for each in (init, policies))
    result: Tensor = _ops.GRAM[backend](init, policies, layout.segment, len(layout.names))
    _sharded.sum_over_ranks_(result, mesh)
    return result


def _counted(tensor: Tensor, mesh: Any) -> Tensor:
    """The local shard; nothing of it where another rank's replica is the one that counts."""
    shard = _sharded.local(tensor)
    return shard if _sharded.counted_here(tensor, mesh) else shard.flatten()[:0]


def slerp_coefficients(gram: Tensor) -> Tensor:
    """Coefficients c with slerp_M = sum_m c_m delta_m, from the Gram matrices alone.

        v_1 = delta_1;  v_m = slerp(v_{m-1}, delta_m, 1/m)      (arXiv 2406.16768, eq. 26)

    Args:
        gram: [S, M, M] fp64, of finite values.

    Returns: [S, M] fp64 on the device of gram. The order of the policies matters for M >= 3.

    Raises:
        ValueError: gram is not [S, M, M], or holds NaN or inf. TypeError: it is not fp64.

    Numerics: pairs that are zero, parallel or antiparallel (sin of their angle below 1e-6) get the
        linear rule (1 - 1/m, 1/m), with a warning; never NaN.
    """
    if not isinstance(gram, Tensor):
        raise TypeError(f"gram must be a tensor; got {type(gram).__name__}")
    if gram.dim() != 3 or gram.shape[1] != gram.shape[2] or gram.shape[1] == 0:
        raise ValueError(f"gram must be [S, M, M] with M >= 1; got {tuple(gram.shape)}")
    if gram.dtype != torch.float64:
        raise TypeError(f"gram must be float64; got {gram.dtype}")
    names = [f"segment {s}" for s in range(gram.shape[0])]
    result: Tensor = _ops.SLERP_COEFFICIENTS(gram.detach(), names)
    return result


def slerp(
    init: Weights,
    policies: Sequence[Weights],
    *,
    segments: Any = None,
    eta: float | Sequence[float] = 1.0,
    out: Any = None,
    return_report: bool = False,
    backend: str = "auto",
) -> Any:
    """Merge M policies by spherical interpolation of their task vectors, then go eta of the way.

        delta_m = theta_m - theta_init
        out = theta_init + eta * slerp_M(delta_1 .. delta_M)    (arXiv 2406.16768, eq. 2-4 and 26)

    Args:
        init: a tensor, a list of tensors, or a dict of tensors; any mix of float dtypes. DTensors
            are merged shard by shard, with one all-reduce of the Gram matrices; every rank calls.
        policies: M >= 1 of the same form, names and shapes.
        segments: what shares one angle. For a flat tensor: (start, stop) pairs or
            `FlatParameters.segments` (elements outside them keep the value of init); None is one
            segment. For a dict: groups of names (a list of lists, or a dict of lists); None is one
            segment per tensor. A list has one per tensor. Of names in a dict that are tied in init
            and in every policy the first counts, and the results are tied; but in a trace, which
            knows no addresses, each name has a tensor of its own.
        eta: LITI step, finite; 0 is init, 1 the merge, above 1 extrapolates. A sequence gives a
            list of results from the same two passes.
        out: where to write, of the form of the result and of any float dtype, to which it is
            rounded once; may be init itself for one eta.
        return_report: also return a SlerpReport.
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Returns: out, or new weights of the form and dtypes of init (a list of them for a sequence of
        eta); with return_report a pair (weights, report).

    Raises:
        ValueError: names, shapes, devices or segments disagree, out overlaps an input, or a task
            vector holds NaN or inf. TypeError: forms or dtypes disagree. All before any write.

    Traffic: the Gram pass reads (M + 1) weights, the apply pass reads them again and writes one per
        eta.
    Numerics: coefficients in fp64 as in `slerp_coefficients`, applied in fp32 (fp64 for fp64
        weights), rounded once. Deterministic. Order matters for M >= 3.
    """
    return _merge("slerp", init, policies, segments, eta, out, return_report, backend)


def lerp(
    init: Weights,
    policies: Sequence[Weights],
    *,
    segments: Any = None,
    eta: float | Sequence[float] = 1.0,
    out: Any = None,
    return_report: bool = False,
    backend: str = "auto",
) -> Any:
    """Merge M policies by the uniform mean of their task vectors, then go eta of the way.

        out = theta_init + eta * mean_m (theta_m - theta_init)

    Arguments, results and errors are those of `slerp`, but NaN and inf are not looked for. Traffic:
    reads M + 1 weights and writes one per eta; with `return_report` the Gram pass is made as well.
    """
    return _merge("lerp", init, policies, segments, eta, out, return_report, backend)


@torch.no_grad()
def _merge(
    method: Literal["slerp", "lerp"],
    init: Weights,
    policies: Sequence[Weights],
    segments: Any,
    eta: float | Sequence[float],
    out: Any,
    return_report: bool,
    backend: str,
) -> Any:
    layout = _weights.layout_of(init, policies, segments)
    ends = _weights.matched(layout, init, policies)
    starts = layout.tensors(init)
    etas, several = _finite_etas(eta)
    runs = len(policies)
    backend = resolve("slerp", backend, starts[0].device)
    if method == "slerp" or return_report:
        products = _gram(layout, starts, ends, backend)
    # a GPU is at that while the host gets the apply pass ready
    results = _outputs(layout, init, out, len(etas), several)
    # the op sees the segments alone, but what is between is copied; a trace knows no addresses
    if layout.ranges is not None and not torch.compiler.is_compiling():
        whole: list[Any] = [init, *policies]
        refuse_overlap(results, whole, same=len(results) == 1)
    written = [tensor for result in results for tensor in layout.tensors(result)]
    shards = [_sharded.all_local(tensors) for tensors in (written, starts, ends)]
    if method == "slerp":
        op = _ops.SLERP[backend]
        coefficients = op(*shards, products, etas, layout.names, layout.segment)
    else:
        shape = len(layout.names), runs
        coefficients = torch.full(shape, 1 / runs, dtype=torch.float64, device=starts[0].device)
        _ops.SLERP_APPLY[backend](*shards, scaled(coefficients, etas), layout.segment)
    for result in results:
        _weights.copy_gaps(layout, init, result)
        _weights.copy_tied(layout, result)
    merged = results if several else results[0]
    if not return_report:
        return merged
    return merged, SlerpReport(
        layout.names, products, coefficients.to(products.device, non_blocking=True)
    )


def _finite_etas(eta: Any) -> tuple[list[float], bool]:
    etas, several = read_etas(eta)
    if not etas or not all(abs(e) < math.inf for e in etas):
        raise ValueError(f"eta must be a finite number, or at least one of them; got {eta}")
    return etas, several


def _outputs(layout: _weights.Layout, init: Any, out: Any, count: int, listed: bool) -> list[Any]:
    if out is None:
        return [_weights.empty_like(layout, init) for _ in range(count)]
    results = list(out) if listed else [out]
    if len(results) != count:
        raise ValueError(f"out must hold one result per eta ({count}); got {len(results)}")
    _weights.matched(layout, init, results, "out")
    return results
