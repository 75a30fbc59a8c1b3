"""The statistics of the loss, their gradient and the loss from hidden states and a head.

Per part of some hundred rows: logits in fp32 from one GEMM and the kernels of `loss.py` on them.
Gradients of logits are collected for a block of some thousand rows, for two more GEMMs. The loss
makes them in the forward pass, while it has the logits: before the coefficients of the rows are
known, which then scale the rows of both GEMMs instead.

No GEMM is told on the host how many rows a mask keeps, which would wait for the GPU: a masked row
costs its share of the GEMMs, though no pass over its logits, and what it holds is never read into a
result. Callers who pack their sequences pay for no such row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from warp_fast._loss_checks import Terms
from warp_fast._objective import (
    COUPLED,
    exact_kl_of,
    objective,
    slopes,
    with_given_anchor,
)
from warp_fast._objective import Rows as Tokens
from warp_fast.kernels.loss import Found, Rows, check_on_host, row_gradient, row_statistics
from warp_fast.reference.linear_loss import Heads, LinearLoss
from warp_fast.reference.loss import Stats

# rows whose logits are alive: 0.5 GiB for each head of 256k tokens
_PART = 512
# Rows whose gradients of logits are: 1.4 GiB in bf16. The gradient of the weight is read and
# written in fp32 once for so many: a fifteenth of the time of the GEMMs, whatever V and D are.
_BLOCK = 2816

_HALF = (torch.bfloat16, torch.float16)


def _operands(states: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both as a GEMM with a result in `dtype` takes them: 16-bit on a GPU, else in `dtype`."""
    if states.is_cuda and dtype == torch.float32:
        if states.dtype == weight.dtype and states.dtype in _HALF:
            return states, weight
    return states.to(dtype), weight.to(dtype)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, summed and returned in `dtype`."""
    if left.dtype == dtype:
        return torch.mm(left, right)
    return torch.mm(left, right, out_dtype=dtype)


def _accumulate(total: Tensor, left: Tensor, right: Tensor, beta: int) -> None:
    """total = beta total + left @ right, summed in the dtype of total."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=beta)
    else:
        torch.addmm(total, left, right, beta=beta, out_dtype=total.dtype, out=total)


def _cut(whole: slice, size: int) -> Iterator[slice]:
    """Pieces of at most `size` rows."""
    return (slice(at, min(at + size, whole.stop)) for at in range(whole.start, whole.stop, size))


class _Logits:
    """Makes the logits of policy and anchor, a part of the rows at a time."""

    def __init__(
        self, heads: Heads, token_ids: Tensor, kept: Tensor, exact_kl: str, anchored: bool
    ) -> None:
        self.dtype = heads.compute_dtype
        self.policy = _operands(heads.hidden, heads.weight, self.dtype)
        self.anchor = None
        if anchored and heads.anchor_hidden is not None and heads.anchor_weight is not None:
            self.anchor = _operands(heads.anchor_hidden, heads.anchor_weight, self.dtype)
        self.token_ids, self.kept = token_ids, kept
        self.head = (heads.temperature, heads.softcap, exact_kl)

    def rows(self, part: slice) -> Rows:
        anchor = None if self.anchor is None else self._product(self.anchor, part)
        logits = self._product(self.policy, part)
        return Rows.of(logits, anchor, self.token_ids[part], self.kept[part], self.head)

    def _product(self, operands: tuple[Tensor, Tensor], part: slice) -> Tensor:
        return _product(operands[0][part], operands[1].T, self.dtype)


class _Gradients:
    """Gradients of logits, a block of rows at a time, and what they sum to.

    Attributes:
        block: rows of a block, at most.
        states: [N, D] of hidden; weight: [V, D]; both in the dtype of the computation.
    """

    def __init__(self, heads: Heads, needs: tuple[bool, bool]) -> None:
        dtype = heads.compute_dtype
        hidden, weight = heads[:2]
        both_bf16 = hidden.dtype == weight.dtype == torch.bfloat16
        rounded = torch.bfloat16 if both_bf16 and dtype == torch.float32 else dtype
        self.block = max(1, _BLOCK * 2 // rounded.itemsize)
        self.needs, self.dtype = needs, dtype
        # the GEMMs take bf16 on a GPU alone, but dlogits are rounded alike everywhere
        states, matrix = _operands(hidden, weight, dtype)
        operand = states.dtype if both_bf16 else dtype
        self.operands = states.to(operand), matrix.to(operand)
        rows = min(self.block, len(hidden))
        self.dlogits = hidden.new_empty((rows, len(weight)), dtype=rounded)
        self.states, self.weight = (
            torch.zeros_like(of, dtype=dtype) if need else of.new_empty(0, dtype=dtype)
            for of, need in zip((hidden, weight), needs, strict=True)
        )
        self.begun = False

    def put(self, rows: Rows, state: Tensor, upstream: Tensor, place: slice) -> None:
        """Gradients of the logits of some rows of the block."""
        row_gradient(rows, state.contiguous(), upstream.contiguous(), self.dlogits[place])

    def add(self, block: slice, live: Tensor, scale: Tensor | None) -> None:
        """Two GEMMs of what was put; rows that are not live hold anything.

        scale: [n], what the gradients of the logits of a row are to be multiplied by.
        """
        states, matrix = self.operands
        dlogits = self.dlogits[: block.stop - block.start].to(matrix.dtype)
        if self.needs[0]:
            found = _product(dlogits, matrix, self.dtype)
            found = found if scale is None else found * scale[:, None]
            self.states[block] = torch.where(live[:, None], found, 0)
        if self.needs[1]:
            right = states[block]
            right = right if scale is None else (right * scale[:, None]).to(right.dtype)
            # 0 * NaN of a row without a gradient must not reach the sum
            right = torch.where(live[:, None], right, 0)
            _accumulate(self.weight, dlogits.T, right, int(self.begun))
            self.begun = True


def linear_token_stats_triton(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    anchor_hidden: Tensor | None,
    anchor_weight: Tensor | None,
    temperature: float,
    softcap: float | None,
    exact_kl: str,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`linear_token_stats_reference` and the state for the gradient, without waiting for the GPU.

    Traffic: 2 N V D flops for each head; writes and reads fp32 logits, some rows at a time.
    """
    check_on_host(token_ids, mask, weight.shape[0])
    heads = Heads(hidden, weight, anchor_hidden, anchor_weight, temperature, softcap)
    out = Found.empty(hidden, len(token_ids), heads.compute_dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = _Logits(heads, token_ids, mask, exact_kl, anchored=True)
        for part in _cut(slice(0, len(token_ids)), _PART):
            row_statistics(logits.rows(part), out.at(part), entropy)
    return out


def linear_token_stats_backward_triton(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    anchor_hidden: Tensor | None,
    anchor_weight: Tensor | None,
    temperature: float,
    softcap: float | None,
    exact_kl: str,
    needs_hidden: bool,
    needs_weight: bool,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_token_stats_backward_reference`, without waiting for the GPU.

    state: as the forward pass found it, with entropy if that has a gradient; else found again.
    Traffic: 2 N V D flops for each head, and 2 N V D for each gradient.
    Numerics: the gradient of the logits is rounded to bf16 where hidden and weight are bf16, and
        else stays fp32 (so do its GEMMs, which for fp16 are slow: fp16 would lose small gradients).
        dweight is summed in fp32 over all rows.
    """
    heads = Heads(hidden, weight, anchor_hidden, anchor_weight, temperature, softcap)
    live = (upstream != 0).any(1)
    if state is None:
        anchor = (anchor_hidden, anchor_weight) if exact_kl else (None, None)
        head = (temperature, softcap, exact_kl)
        state = linear_token_stats_triton(hidden, weight, token_ids, live, *anchor, *head, True)[4]
    with torch.autocast(hidden.device.type, enabled=False):
        logits = _Logits(heads, token_ids, live, exact_kl, anchored=bool(exact_kl))
        gradients = _Gradients(heads, (needs_hidden, needs_weight))
        for block in _cut(slice(0, len(token_ids)), gradients.block):
            _put_block(gradients, logits, block, state, upstream[block])
            gradients.add(block, live[block], None)
    return gradients.states, gradients.weight


def _put_block(
    gradients: _Gradients, logits: _Logits, block: slice, state: Tensor, upstream: Tensor
) -> None:
    """The gradients of the logits of a block, which are made for it; upstream is of the block."""
    for part in _cut(block, _PART):
        place = slice(part.start - block.start, part.stop - block.start)
        gradients.put(logits.rows(part), state[part], upstream[place], place)


def linear_loss_triton(
    heads: Heads, tokens: Tokens, terms: Terms, entropy: bool, needs: tuple[bool, bool]
) -> LinearLoss:
    """`linear_loss_reference`, without waiting for the GPU.

    Traffic: 8 N V D flops with an anchor and both gradients. Where coefficients depend on a whole
        sequence, up to 10 if one may have more than `_BLOCK` tokens (packed ones may: their lengths
        are not known here).
    Numerics: as `linear_token_stats_backward_triton`; where those coefficients scale bf16 hidden
        states these are rounded once more.
    """
    count, exact_kl = len(tokens.mask), exact_kl_of(terms)
    check_on_host(tokens.token_ids, tokens.mask, heads.weight.shape[0])
    out = Found.empty(heads.hidden, count, heads.compute_dtype)
    with torch.autocast(heads.hidden.device.type, enabled=False):
        logits = _Logits(heads, tokens.token_ids, tokens.mask, exact_kl, anchored=True)
        making = _Making(logits, _Gradients(heads, needs), out, tokens, terms, entropy)
        for group in _groups(count, tokens.longest, terms.kl in COUPLED, making.gradients.block):
            making.add_group(group)
    stats = with_given_anchor(Stats(*out[:4]), terms)
    made = making.gradients
    return LinearLoss(
        objective(tokens, stats, terms),
        *out,
        slopes(tokens, stats, terms),
        made.states,
        made.weight,
    )


@dataclass
class _Making:
    """The statistics and the gradients of the loss, a group of rows after the other."""

    logits: _Logits
    gradients: _Gradients
    out: Found
    tokens: Tokens
    terms: Terms
    entropy: bool

    def add_group(self, group: slice) -> None:
        """Rows whose coefficients depend on no other row; the last block is made only once."""
        blocks = list(_cut(group, self.gradients.block))
        for block in blocks:
            self._add_statistics(block, block is blocks[-1])
        if not any(self.gradients.needs):
            return
        upstream = self._slopes(group)
        for block in reversed(blocks):
            here = slice(block.start - group.start, block.stop - group.start)
            given, scale = upstream[here], None
            if block is not blocks[-1]:
                _put_block(self.gradients, self.logits, block, self.out.state, given)
            elif not exact_kl_of(self.terms):
                scale = given[:, 0]
            self.gradients.add(block, (given != 0).any(1), scale)

    def _add_statistics(self, block: slice, keep: bool) -> None:
        """And, to keep, the gradients of the logits: the exact KL knows their coefficients by now,
        the others are of the log-prob itself."""
        for part in _cut(block, _PART):
            rows = self.logits.rows(part)
            row_statistics(rows, self.out.at(part), self.entropy)
            if not keep or not any(self.gradients.needs):
                continue
            if exact_kl_of(self.terms):
                upstream = self._slopes(part)
            else:
                upstream = self.out.logprobs.new_zeros((part.stop - part.start, 3))
                upstream[:, 0] = 1
            place = slice(part.start - block.start, part.stop - block.start)
            self.gradients.put(rows, self.out.state[part], upstream, place)

    def _slopes(self, rows: slice) -> Tensor:
        terms = self.terms.at(rows)
        found = with_given_anchor(Stats(*self.out.at(rows)[:4]), terms)
        return slopes(self.tokens.at(rows), found, terms)


def _groups(count: int, longest: int, coupled: bool, limit: int) -> Iterator[slice]:
    """Rows that do not depend on each other, as far as the host knows: whole sequences of the
    longest length if they are coupled, else about equal parts."""
    if coupled:
        size = max(1, limit // max(1, longest)) * max(1, longest)
    else:
        size = -(-count // max(1, -(-count // limit)))
    return _cut(slice(0, count), max(1, size))
