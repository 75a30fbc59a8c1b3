"""LITI steps as users give them: numbers of Python, numpy or torch, alone or several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, SupportsFloat

from torch import SymFloat, SymInt

_PLAIN = (int, float, SymInt, SymFloat)  # the latter two in a trace


def read_etas(eta: Any) -> tuple[list[float], bool]:
    """(the numbers, whether they came as several: an iterable, a vector of numpy or torch).

    Raises:
        TypeError: eta is neither a number nor several of them in one dimension.
    """
    several = not isinstance(eta, (*_PLAIN, str, bytes)) and isinstance(eta, Iterable)
    several = several and getattr(eta, "ndim", 1) == 1
    etas = list(eta) if several else [eta]
    return [_number(e) for e in etas], several


def _number(eta: Any) -> float:
    if isinstance(eta, _PLAIN):
        return float(eta)
    text = isinstance(eta, str | bytes)
    if text or not isinstance(eta, SupportsFloat) or getattr(eta, "ndim", 0) != 0:
        raise TypeError(f"eta must be a number, or a sequence of numbers; got {eta!r}")
    return float(eta)
