"""The in-place EMA update; the anchor of a policy that is built on it is in anchor.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from operator import index
from typing import Any

import torch
from torch import Tensor

from warp_fast import _ops, _sharded
from warp_fast._backend import resolve

_PARAM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def ema_update_(
    ema: Tensor | Sequence[Tensor],
    params: Tensor | Sequence[Tensor],
    rate: float | Tensor,
    *,
    residual: Tensor | Sequence[Tensor] | None = None,
    stochastic: bool = False,
    seed: int = 0,
    step: int = 0,
    backend: str = "auto",
) -> Tensor | Sequence[Tensor]:
    """Move an exponential moving average toward the parameters, in place, computed in fp32.

        ema <- ema + rate * (params - ema)          (arXiv 2406.16768, Algorithm 1; rate is mu)

    Args:
        ema: a tensor, or a sequence of tensors, in one of three storages:
            fp32 (or fp64, for oracles);
            split: bf16, with `residual` int16 of the same shapes; bits of the fp32 value are
            (ema << 16) + residual, so the pair is an exact fp32 EMA and `ema` alone its rounding
            to bf16;
            stochastic: bf16, rounded up or down at random, unbiased.
            DTensors are updated shard by shard, without communication.
        params: same count, shapes and placements; bf16, fp16 or fp32 (fp64 with an fp64 ema).
        rate: in [0, 1]; a number, or a 0-dim tensor on the device of ema, read on the device (its
            value is not checked).
        residual: selects split storage.
        stochastic: selects stochastic storage.
        seed, step: with `stochastic`, the random bits are a function of (seed, step, index of the
            element in the concatenated list), equal on every backend. In [0, 2**63).
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Returns: `ema`.

    Raises:
        ValueError: counts, shapes, devices or the rate do not fit, a written tensor shares memory
            with another (pass tied weights once), or a DTensor in stochastic storage is not sharded
            along its first dimension. TypeError: a dtype does not fit its storage. All before
            any write.

    Traffic: bytes per element: reads and writes ema (fp32 8, split 8, stochastic 4), reads params
        (bf16 2).
    Numerics: no fused multiply-add; split and stochastic storage are bitwise equal on every
        backend. A number 0 leaves ema alone whatever params hold, 1 makes it params whatever it
        held; else what is not finite, in them or their difference, goes into ema as inf or NaN.
    """
    averages, values = _listed("ema", ema), _listed("params", params)
    remainders = [] if residual is None else _listed("residual", residual)
    _check(averages, values, remainders, residual is not None, stochastic)
    if not averages:
        return ema
    number, device_rate = _checked_rate(rate, averages[0].device)
    seed, step = counter("seed", seed), counter("step", step)
    op = _ops.EMA_UPDATE[resolve("ema", backend, averages[0].device)]
    if number == 0 and device_rate is None:
        return ema  # where 0 times what diverged would be NaN
    shards = [_sharded.all_local(tensors) for tensors in (averages, values, remainders)]
    first = _first_indices(averages, stochastic)
    with torch.no_grad():
        op(*shards, number, device_rate, stochastic, seed, step, first)
    return ema


def _first_indices(averages: list[Tensor], stochastic: bool) -> list[int]:
    """The index of the first element of each in the concatenated list."""
    found, end = [], 0
    for average in averages:
        found.append(end + (_sharded.first_index(average) if stochastic else 0))
        end += average.numel()
    return found


def _listed(name: str, tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    came, found = type(tensors).__name__, list(tensors) if isinstance(tensors, Iterable) else []
    # one look at each type: this is called for every update
    odd = [kind.__name__ for kind in set(map(type, found)) if not issubclass(kind, Tensor)]
    if odd or not isinstance(tensors, Iterable):
        raise TypeError(
            f"{name} must be a tensor or a list of tensors; got {' of '.join([came, *odd[:1]])}"
        )
    return found


def counter(name: str, given: int) -> int:
    """An integer that the ops take."""
    if isinstance(given, int) and torch.compiler.is_compiling():
        return given  # a look at its value would tie the trace to it
    try:
        number = index(given)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer; got {type(given).__name__}") from error
    if not 0 <= number < 2**63:
        raise ValueError(
            f"{name} must be in [0, 2**63); got {number}: take it modulo 2**63, as in "
            "torch.initial_seed() % 2**63"
        )
    return number


def check_rate(rate: Any) -> None:
    """A number, or a tensor whose value can be looked at here, in [0, 1]."""
    if not isinstance(rate, (Real, Tensor)):
        raise TypeError(f"rate must be a number or a tensor; got {type(rate).__name__}")
    if not 0.0 <= float(rate) <= 1.0:
        raise ValueError(f"rate must be in [0, 1]; got {rate}")


def _checked_rate(rate: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    if not isinstance(rate, Tensor):
        check_rate(rate)
        return float(rate), None
    if rate.dim() != 0 or rate.device != device or not rate.is_floating_point():
        raise ValueError(
            f"a tensor rate must be a floating 0-dim tensor on {device}; "
            f"got shape {tuple(rate.shape)} {rate.dtype} on {rate.device}"
        )
    return 0.0, rate.detach()


def _check(
    ema: list[Tensor], params: list[Tensor], residual: list[Tensor], split: bool, stochastic: bool
) -> None:
    if split and stochastic:
        raise ValueError("residual and stochastic are two storages; give one of them")
    if len(ema) != len(params) or (split and len(residual) != len(ema)):
        counts = f"{len(ema)} ema, {len(params)} params" + f", {len(residual)} residual" * split
        raise ValueError(f"there must be as many params (and residual) as ema; got {counts}")
    if not ema:
        return
    for name, others in [("params", params)] + ([("residual", residual)] if split else []):
        _check_partners(name, others, ema)
    # one of each combination: this is called for every update
    dtypes = list(zip([x.dtype for x in ema], [x.dtype for x in params], strict=True))
    for average, value in dict.fromkeys(dtypes):
        _check_dtypes(dtypes.index((average, value)), average, value, split or stochastic)
    for i, dtype in enumerate([x.dtype for x in residual]):
        if dtype != torch.int16:
            raise TypeError(f"residual[{i}] must be int16; got {dtype}")


def _check_partners(name: str, others: list[Tensor], ema: list[Tensor]) -> None:
    device = ema[0].device
    shapes, expected = [x.shape for x in others], [x.shape for x in ema]
    if shapes != expected or {device} != {x.device for x in (*ema, *others)}:
        for i, (average, other) in enumerate(zip(ema, others, strict=True)):
            if other.shape != average.shape or other.device != device:
                raise ValueError(
                    f"{name}[{i}] must be {tuple(average.shape)} on {device} like ema; "
                    f"got {tuple(other.shape)} on {other.device}"
                )
            if average.device != device:
                raise ValueError(f"ema[{i}] must be on {device}; got {average.device}")
    for i, (average, other) in enumerate(_sharded.among(ema, others)):
        _sharded.check_layout(f"{name}[{i}]", other, average)


def _check_dtypes(i: int, average: torch.dtype, value: torch.dtype, in_bf16: bool) -> None:
    if in_bf16:
        if average != torch.bfloat16:
            raise TypeError(f"ema[{i}] must be bfloat16 in this storage; got {average}")
    elif average == torch.bfloat16:
        raise TypeError(
            f"ema[{i}] is bfloat16: a bf16 average stalls at small rates. Give residual (split "
            "storage), stochastic=True, or an fp32 ema"
        )
    elif average not in (torch.float32, torch.float64):
        raise TypeError(f"ema[{i}] must be float32 (or bfloat16, split); got {average}")
    allowed = (*_PARAM_DTYPES, torch.float64) if average == torch.float64 else _PARAM_DTYPES
    if value not in allowed:
        raise TypeError(f"params[{i}] must be one of {allowed}; got {value}")
