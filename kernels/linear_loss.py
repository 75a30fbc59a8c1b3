"""The statistics of the loss, their gradient and the loss from hidden states and a head.

GEMMs make logits in fp32, on which the kernels of `loss.py` work. The loss makes its gradients in
the forward pass, while it has the logits of some rows: those of a block of rows in bf16, before the
normalizers and the coefficients of the rows are known, which scale the rows of two more GEMMs
instead. The backward pass of the statistics has the vocabulary as its outer loop, so that it sums
the gradient of the weight a tile at a time.

Rows outside a mask that the host has are left out first. Of a mask on the GPU no GEMM is told how
many rows it keeps, which would wait for the GPU: a masked row costs its share of the GEMMs, though
no pass over its logits, and what it holds is never read into a result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from warp_fast._loss_checks import Terms, sent
from warp_fast._loss_rows import Found
from warp_fast._objective import (
    COUPLED,
    Tokens,
    exact_kl_of,
    objective,
    slopes,
    with_given_anchor,
)
from warp_fast._precision import as_given
from warp_fast._slices import cut, groups, within
from warp_fast.kernels.loss import Odds, Rows, check_on_host, row_gradient, row_statistics
from warp_fast.reference.linear_loss import Heads, LinearLoss
from warp_fast.reference.loss import Stats

# rows whose logits are alive, all columns: 0.4 GiB of 256k tokens
_PART = 384
# Rows whose gradients of logits are kept: 1 GiB in bf16. The gradient of the weight is read and
# written in fp32 once for so many: a tenth of the time of the GEMMs, whatever V and D are.
_BLOCK = 2048
# a tile of the backward pass: 128 MiB
_ROWS, _COLUMNS = 4096, 8192

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


def _accumulate(total: Tensor, left: Tensor, right: Tensor, begin: bool = False) -> None:
    """total += left @ right, summed in the dtype of total; to begin, total = left @ right."""
    wider = {} if left.dtype == total.dtype else {"out_dtype": total.dtype}
    if begin:
        torch.mm(left, right, out=total, **wider)
    else:
        torch.addmm(total, left, right, out=total, **wider)


class _Logits:
    """Makes the logits of policy and anchor, for some rows and columns at a time."""

    def __init__(self, heads: Heads, token_ids: Tensor, kept: Tensor, exact_kl: str) -> None:
        self.dtype = heads.compute_dtype
        self.policy = _operands(heads.hidden, heads.weight, self.dtype)
        self.anchor = None
        if heads.anchor_hidden is not None and heads.anchor_weight is not None:
            self.anchor = _operands(heads.anchor_hidden, heads.anchor_weight, self.dtype)
        self.token_ids, self.kept = token_ids, kept
        self.temperature, self.softcap, self.exact_kl = heads.temperature, heads.softcap, exact_kl
        self.at_once = 2 if exact_kl else 1  # heads whose logits are alive together

    def rows(self, part: slice, columns: slice | None = None) -> Rows:
        """Of the policy, and for an exact KL of the anchor beside it."""
        beside = self.anchor is not None and self.exact_kl != ""
        anchor = self._product(self.anchor, part, columns) if beside else None
        logits = self._product(self.policy, part, columns)
        ids = self.token_ids[part] - (0 if columns is None else columns.start)
        head = (self.temperature, self.softcap, self.exact_kl)
        return Rows.of(logits, anchor, ids, self.kept[part], head)

    def anchor_rows(self, part: slice) -> Rows:
        """Of the anchor as if it were the policy."""
        logits = self._product(self.anchor, part, None)
        head = (self.temperature, self.softcap, "")
        return Rows.of(logits, None, self.token_ids[part], self.kept[part], head)

    def _product(
        self, operands: tuple[Tensor, Tensor] | None, part: slice, columns: slice | None
    ) -> Tensor:
        assert operands is not None
        states, weight = operands
        return _product(states[part], weight[columns or slice(None)].T, self.dtype)

    def add_anchor(self, part: slice, out: Found) -> None:
        """Its log-probs where no exact KL found them: one head's logits in memory at a time."""
        if self.anchor is None or self.exact_kl:
            return
        found = Found.empty(out.logprobs, len(out.logprobs), self.dtype)
        row_statistics(self.anchor_rows(part), found, entropy=False)
        out.anchor_logprobs.copy_(found.logprobs)


class _Gradients:
    """What the gradients of logits sum to.

    Attributes:
        rounded: dtype that those gradients have.
        operands: hidden and weight as their GEMMs take them.
        states: [N, D] of hidden; weight: [V, D] or, of a tile of columns, its first rows; both in
            the dtype of the computation.
    """

    def __init__(self, heads: Heads, needs: tuple[bool, bool], columns: int) -> None:
        dtype = heads.compute_dtype
        hidden, weight = heads[:2]
        both_bf16 = hidden.dtype == weight.dtype == torch.bfloat16
        self.rounded = torch.bfloat16 if both_bf16 and dtype == torch.float32 else dtype
        # the GEMMs take bf16 on a GPU alone, but dlogits are rounded alike everywhere
        states, matrix = _operands(hidden, weight, dtype)
        operand = states.dtype if both_bf16 else dtype
        self.needs, self.operands = needs, (states.to(operand), matrix.to(operand))
        size, width = weight.shape
        self.states = hidden.new_zeros(hidden.shape if needs[0] else 0, dtype=dtype)
        self.begins = True  # with the next product the sum for the weight
        make = weight.new_empty if len(hidden) else weight.new_zeros
        self.weight = make((min(columns, size), width) if needs[1] else 0, dtype=dtype)

    def add(
        self,
        rows: slice,
        columns: slice,
        dlogits: Tensor,
        live: Tensor,
        scale: Tensor | None = None,
    ) -> None:
        """Two GEMMs, of which that for the weight adds to the one before.

        live: [n], rows that have a gradient; of others dlogits are finite, hidden may be anything.
        scale: [n], what the gradients of the logits of a row are to be multiplied by.
        """
        states, matrix = (x[part] for x, part in zip(self.operands, (rows, columns), strict=True))
        dlogits = dlogits.to(matrix.dtype)
        if self.needs[0] and scale is None:
            _accumulate(self.states[rows], dlogits, matrix)
        elif self.needs[0]:
            found = _product(dlogits, matrix, self.states.dtype)
            self.states[rows].addcmul_(found, scale[:, None])
        if self.needs[1]:
            states = states if scale is None else (states * scale[:, None]).to(states.dtype)
            # NaN in the hidden state of a row without a gradient must not reach the sum
            states = torch.where(live[:, None], states, 0)
            _accumulate(self.weight[: dlogits.shape[1]], dlogits.T, states, self.begins)
            self.begins = False

    def taken(self, columns: int) -> Tensor:
        """[columns, D], the sum for the weight so far; the next product begins another one."""
        self.begins = True
        return self.weight[:columns]

    def of_hidden(self, live: Tensor) -> Tensor:
        """[N, D], 0 in the rows that have no gradient; empty if not needed."""
        return torch.where(live[:, None], self.states, 0) if self.needs[0] else self.states


def linear_token_stats_triton(
    heads: Heads, token_ids: Tensor, mask: Tensor, exact_kl: str, entropy: bool
) -> Found:
    """`linear_token_stats_reference` and the state for the gradient, without waiting for the GPU.

    Traffic: 2 N V D flops for each head; writes and reads fp32 logits, some rows at a time.
    """
    check_on_host(token_ids, mask, heads.weight.shape[0])
    out = Found.empty(heads.hidden, len(token_ids), heads.compute_dtype)
    with as_given(heads.hidden.device.type):
        logits = _Logits(heads, token_ids, mask, exact_kl)
        for part in cut(slice(0, len(token_ids)), max(1, _PART // logits.at_once)):
            row_statistics(logits.rows(part), out.at(part), entropy)
            logits.add_anchor(part, out.at(part))
    return out


def linear_token_stats_backward_triton(
    upstream: Tensor,
    heads: Heads,
    token_ids: Tensor,
    exact_kl: str,
    needs: tuple[bool, bool],
    state: Tensor | None = None,
    host_mask: Tensor | None = None,
    weight_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_token_stats_backward_reference`, without waiting for the GPU.

    state: as the forward pass found it, with entropy if that has a gradient; else found again.
    host_mask: on the CPU, the rows that may have a gradient.
    Traffic: 2 N V D flops for each head, and 2 N V D for each gradient.
    Numerics: the gradient of the logits is rounded to bf16 where hidden and weight are bf16, and
        else stays fp32 (so do its GEMMs, which for fp16 are slow: fp16 would lose small gradients).
        dweight, returned in weight_dtype, is summed in fp32, a tile of the vocabulary at a time.
    """
    dtype = weight_dtype or upstream.dtype
    if not exact_kl:
        heads = heads._replace(anchor_hidden=None, anchor_weight=None)
    if state is None:
        live = (upstream != 0).any(1)
        state = linear_token_stats_triton(heads, token_ids, live, exact_kl, True).state
    if host_mask is None:
        return _backward(upstream, heads, token_ids, exact_kl, needs, state, dtype)
    index = _index(host_mask, upstream.device)
    upstream, token_ids, state = (x[index] for x in (upstream, token_ids, state))
    found, dweight = _backward(upstream, heads.at(index), token_ids, exact_kl, needs, state, dtype)
    return _spread(found, index, len(host_mask)) if needs[0] else found, dweight


def _index(mask: Tensor, device: torch.device) -> Tensor:
    """[n] the rows inside a mask on the CPU; nothing waits for the device."""
    return sent(mask.nonzero()[:, 0], device)


def _spread(values: Tensor, index: Tensor, count: int) -> Tensor:
    """[N, ...] with 0 in the other rows."""
    return values.new_zeros((count, *values.shape[1:])).index_copy_(0, index, values)


def _backward(
    upstream: Tensor,
    heads: Heads,
    token_ids: Tensor,
    exact_kl: str,
    needs: tuple[bool, bool],
    state: Tensor,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    live = (upstream != 0).any(1)
    dweight = heads.weight.new_empty(heads.weight.shape if needs[1] else 0, dtype=weight_dtype)
    with as_given(upstream.device.type):
        logits = _Logits(heads, token_ids, live, exact_kl)
        gradients = _Gradients(heads, needs, _COLUMNS)
        for columns in cut(slice(0, len(heads.weight)), _COLUMNS):
            for part in cut(slice(0, len(token_ids)), max(1, _ROWS // logits.at_once)):
                rows = logits.rows(part, columns)
                out = rows.logits
                if out.dtype != gradients.rounded:
                    out = torch.empty_like(out, dtype=gradients.rounded)
                row_gradient(rows, state[part].contiguous(), upstream[part].contiguous(), out)
                gradients.add(part, columns, out, live[part])
            if needs[1]:
                dweight[columns] = gradients.taken(columns.stop - columns.start)
    return gradients.of_hidden(live), dweight


def linear_loss_triton(
    heads: Heads, tokens: Tokens, terms: Terms, entropy: bool, needs: tuple[bool, bool]
) -> LinearLoss:
    """`linear_loss_reference`, without waiting for the GPU.

    Traffic: 8 N V D flops with an anchor and both gradients. Where coefficients depend on a whole
        sequence, up to 10 if it may have more than `_BLOCK` tokens (packed ones may, if their
        bounds are on the GPU).
    Numerics: as `linear_token_stats_backward_triton`; where those coefficients scale bf16 hidden
        states these are rounded once more.
    """
    check_on_host(tokens.token_ids, tokens.mask, heads.weight.shape[0])
    count, coupled, lengths = len(tokens.mask), terms.kl in COUPLED, None
    if tokens.on_host is None:
        if coupled:
            lengths = [tokens.longest] * (count // max(1, tokens.longest))
        return _loss(heads, tokens, terms, entropy, needs, lengths)
    mask, sequence = tokens.on_host
    index = _index(mask, heads.hidden.device)
    if coupled:
        lengths = sequence[mask].bincount().tolist()
    total, *of_rows, dhidden, dweight = _loss(
        heads.at(index), tokens.at(index), terms.at(index), entropy, needs, lengths
    )
    if needs[0]:
        dhidden = _spread(dhidden, index, count)
    of_rows = [_spread(values, index, count) for values in of_rows]
    return LinearLoss._make([total, *of_rows, dhidden, dweight])


def _loss(
    heads: Heads,
    tokens: Tokens,
    terms: Terms,
    entropy: bool,
    needs: tuple[bool, bool],
    lengths: list[int] | None,
) -> LinearLoss:
    """lengths: as `groups` takes them."""
    exact_kl = exact_kl_of(terms.kl)
    if any(needs):
        out = Found.empty(heads.hidden, len(tokens.mask), heads.compute_dtype)
        with as_given(heads.hidden.device.type):
            logits = _Logits(heads, tokens.token_ids, tokens.mask, exact_kl)
            gradients = _Gradients(heads, needs, len(heads.weight))
            making = _Making(logits, gradients, out, tokens, terms, entropy)
            for group in groups(len(tokens.mask), lengths, making.block):
                making.add_group(group)
        del making
    else:
        out = linear_token_stats_triton(heads, tokens.token_ids, tokens.mask, exact_kl, entropy)
    stats = with_given_anchor(Stats(*out[:4]), terms)
    total, upstream = objective(tokens, stats, terms), slopes(tokens, stats, terms)
    if not any(needs):
        return LinearLoss(total, *out, upstream, *[out.logprobs.new_empty(0)] * 2)
    dhidden = gradients.of_hidden((upstream != 0).any(1))
    return LinearLoss(total, *out, upstream, dhidden, gradients.weight)


@dataclass
class _Making:
    """The statistics and the gradients of the loss, a group of rows after the other."""

    logits: _Logits
    gradients: _Gradients
    out: Found
    tokens: Tokens
    terms: Terms
    entropy: bool

    def __post_init__(self) -> None:
        of, vocabulary = self.logits.token_ids, len(self.gradients.operands[1])
        self.block = max(1, _BLOCK * 2 // self.gradients.rounded.itemsize)
        self.dlogits = of.new_empty(
            (min(self.block, len(of)), vocabulary), dtype=self.gradients.rounded
        )
        self.factors = self.out.logprobs.new_empty(len(self.dlogits))

    def add_group(self, group: slice) -> None:
        """Rows whose coefficients depend on no other row; the last block is made only once."""
        blocks = list(cut(group, self.block))
        for block in blocks:
            self._add_statistics(block, block is blocks[-1])
        upstream = self._slopes(group)
        for block in reversed(blocks):
            given, scale = upstream[within(group, block)], None
            if block is not blocks[-1]:
                for part in cut(block, _PART):
                    self._put(self.logits.rows(part), block, part, given[within(block, part)])
            elif not self.logits.exact_kl:
                scale = given[:, 0] * self.factors[: len(given)]
            dlogits = self.dlogits[: len(given)]
            self.gradients.add(block, slice(None), dlogits, (given != 0).any(1), scale)

    def _add_statistics(self, block: slice, keep: bool) -> None:
        """And, to keep, the gradients of the logits: of the loss where the coefficients of a row
        are known by now, which are those of an exact KL, else of the log-prob itself."""
        for part in cut(block, _PART):
            rows, out, odds = self.logits.rows(part), self.out.at(part), None
            if keep and not self.logits.exact_kl:
                place = within(block, part)
                odds = Odds(self.dlogits[place], self.factors[place])
            row_statistics(rows, out, self.entropy, odds)
            if keep and self.logits.exact_kl:
                self._put(rows, block, part, self._slopes(part))
            del rows
            self.logits.add_anchor(part, out)

    def _put(self, rows: Rows, block: slice, part: slice, upstream: Tensor) -> None:
        """Gradients of the logits of a part of the block, 0 where a row has none."""
        out, state = self.dlogits[within(block, part)], self.out.state[part]
        rows = rows._replace(kept=(upstream != 0).any(1).view(torch.uint8))
        row_gradient(rows, state.contiguous(), upstream.contiguous(), out)

    def _slopes(self, rows: slice) -> Tensor:
        terms = self.terms.at(rows)
        found = with_given_anchor(Stats(*self.out.at(rows)[:4]), terms)
        return slopes(self.tokens.at(rows), found, terms)
