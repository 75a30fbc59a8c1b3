"""Calls of the linear_loss kernels, and how to hold one to the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.tolerances import assert_close, largest
from warp_fast._loss_checks import Terms
from warp_fast._objective import Tokens
from warp_fast.reference.linear_loss import Heads, LinearLoss, linear_loss_reference

V, D = 23, 6
LENGTHS = (3, 1, 4, 4)  # of sequences; padded ones have as many tokens as the longest

Kernel = Callable[..., LinearLoss]
Call = tuple[Heads, Tokens, Terms]


def rows_of(packed: bool) -> Tokens:
    """Some masked; one sequence entirely."""
    lengths = LENGTHS if packed else (max(LENGTHS),) * len(LENGTHS)
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    count = len(sequence)
    mask = (torch.arange(count) % 5 != 1) & (sequence != 2)
    ids = torch.where(mask, torch.arange(count) * 7 % V, 0)
    longest = count if packed else max(LENGTHS)
    return Tokens(ids.shape, ids, mask, sequence, len(lengths), longest)


def call(
    kl: str, packed: bool = False, ratio: bool = False, dtype: torch.dtype = torch.float32
) -> Call:
    """Advantages of some rows are 0 where the coefficient is made of nothing else."""
    rows = rows_of(packed)
    count = len(rows.mask)
    hidden, weight = torch.randn(count, D), torch.randn(V, D)
    # what a mask hides must reach no result
    hidden[~rows.mask] = torch.nan
    policy, anchor = (hidden, weight), (hidden + 0.1, weight * 0.9)
    a, b, c, d = (x.to(dtype) for x in (*policy, *anchor))
    heads = Heads(a, b, c, d, temperature=0.7, softcap=5.0)
    advantages = torch.where(rows.mask, torch.randn(rows.count)[rows.sequence], 0)
    if kl == "none":
        advantages = torch.where(torch.arange(count) % 3 == 0, 0, advantages)
    old = torch.where(rows.mask, -3 + torch.randn(count), 0) if ratio else None
    return heads, rows, Terms(advantages, None, old, (0.2, 0.3) if ratio else None, 0.3, kl)


def on_device(given: Call, device: str = "cuda" if torch.cuda.is_available() else "cpu") -> Call:
    def moved(part: Any) -> Any:
        of = part._asdict() if isinstance(part, Heads) else vars(part)
        fields = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in of.items()}
        return type(part)(**fields)

    heads, rows, terms = (moved(part) for part in given)
    return heads, rows, terms


def widened(heads: Heads) -> Heads:
    return Heads(*[x.double() if isinstance(x, Tensor) else x for x in heads])  # type: ignore[arg-type]


def finite(heads: Heads) -> Heads:
    """With 0 where the mask hides NaN, for comparisons."""
    return Heads(*[torch.nan_to_num(x) if isinstance(x, Tensor) else x for x in heads])  # type: ignore[arg-type]


def check(kernel: Kernel, given: Call, needs: tuple[bool, bool] = (True, True)) -> None:
    """Every output against float64 and against the reference in the same dtype."""
    heads, rows, terms = given
    found = kernel(heads, rows, terms, True, needs)
    gold = linear_loss_reference(widened(heads), rows, terms, True, needs)
    plain = linear_loss_reference(heads, rows, terms, True, needs)
    scale = 1 + max(largest(gold.logprobs), largest(gold.anchor_logprobs), largest(gold.total))
    for name in LinearLoss._fields:
        if name == "state":
            continue
        ours, exact, eager = (getattr(x, name) for x in (found, gold, plain))
        if ours.dim() < 2:
            assert_close(name, ours, exact, eager, scale)
            continue
        rounded = _rounded(eager, exact, heads.hidden.dtype)
        assert_close(name, ours, exact, rounded, scale * max(1.0, largest(exact)))


def _rounded(eager: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Of 16-bit inputs the gradients of the logits may be rounded to 16 bits as well."""
    if dtype == torch.float32:
        return eager
    return exact + torch.finfo(dtype).eps * largest(exact)
