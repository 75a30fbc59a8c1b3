"""The statistics of the loss, their gradient and the loss by warp_fast._C, from hidden states.

Hidden states meet the head a tile at a time, some thousand rows by some thousand tokens of the
vocabulary: torch multiplies in fp32, the kernel works on the tile while it is in cache. For the
statistics the vocabulary is the outer loop, so a 16-bit weight is widened a tile at a time and each
row of its gradient is written once. The loss makes its gradient in the forward pass: it keeps the
logits of some hundred rows until their coefficients are known, and saves a product. fp64 inputs are
served by the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from warp_fast._loss_checks import Terms
from warp_fast._loss_rows import STATE, check_ids
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
from warp_fast.native._state import by_row, coefficients_of, new_state, statistics_of
from warp_fast.native._tiles import Gradients, Product, side_by_side
from warp_fast.native.loss import Head
from warp_fast.reference import linear_loss as reference
from warp_fast.reference.linear_loss import Heads, LinearLoss
from warp_fast.reference.loss import Stats

# Rows whose logits are kept: 48 MiB of a vocabulary of 32k. The weights are read, and the gradient
# of the weight is read and written, once for so many rows: some percent of the time of the
# products, whatever the sizes are.
_KEPT_ROWS = 384


def linear_token_stats_cpp(
    heads: Heads, token_ids: Tensor, mask: Tensor, exact_kl: str, entropy: bool
) -> tuple[Tensor, ...]:
    """Statistics of hidden @ weight.T, and the [N, 8] state; see `linear_token_stats_reference`.

    Traffic: reads both weights once, whatever N is.
    """
    if heads.compute_dtype == torch.float64:
        wide = reference.linear_token_stats_reference(heads, token_ids, mask, exact_kl, entropy)
        return *wide, wide[0].new_zeros(len(token_ids), STATE)
    rows = mask.nonzero()[:, 0]
    check_ids(token_ids, rows, heads.weight.shape[0])
    state, ids = new_state(rows), token_ids[rows]
    head = Head(heads.temperature, heads.softcap, exact_kl)
    with as_given("cpu"):
        policy = Product(heads.hidden[rows], heads.weight)
        anchor = None
        if heads.anchor_hidden is not None and heads.anchor_weight is not None:
            buffer = None if exact_kl else policy.buffer
            anchor = Product(heads.anchor_hidden[rows], heads.anchor_weight, buffer)
        _add_policy(head, policy, anchor if exact_kl else None, ids, state, entropy)
        if anchor is not None and not exact_kl:
            _add_anchor(head, anchor, ids, state)
    return by_row(state, rows, len(token_ids), anchor is not None, exact_kl, entropy)


def _add_policy(
    head: Head, policy: Product, anchor: Product | None, ids: Tensor, state: Tensor, entropy: bool
) -> None:
    """Add the policy to the state of rows, for an exact KL with the anchor beside it."""
    for piece, first, logits, other in side_by_side(policy, anchor):
        head.stats(logits, other, ids[piece], state[piece], entropy, first)


def _add_anchor(head: Head, anchor: Product, ids: Tensor, state: Tensor) -> None:
    for piece, first, logits in anchor.tiles():
        head.stats(logits, None, ids[piece], state[piece, STATE // 2 :], False, first)


def linear_token_stats_backward_cpp(
    upstream: Tensor,
    heads: Heads,
    token_ids: Tensor,
    exact_kl: str,
    needs: tuple[bool, bool],
    state: Tensor | None = None,
    host_mask: Tensor | None = None,
    weight_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(dhidden [N, D], dweight [V, D]) from upstream [N, 3], as those of the reference."""
    if upstream.dtype == torch.float64:
        return reference.linear_token_stats_backward_reference(
            upstream, heads, token_ids, exact_kl, needs, weight_dtype=weight_dtype
        )
    if state is None:
        state = linear_token_stats_cpp(heads, token_ids, upstream.any(1), exact_kl, True)[-1]
    rows = upstream.any(1).nonzero()[:, 0]
    coefficients = coefficients_of(state[rows], upstream[rows], exact_kl, heads.temperature)
    head, ids = Head(heads.temperature, heads.softcap, exact_kl), token_ids[rows]
    with as_given("cpu"):
        policy, anchor = Product(heads.hidden[rows], heads.weight), None
        if heads.anchor_hidden is not None and heads.anchor_weight is not None and exact_kl:
            anchor = Product(heads.anchor_hidden[rows], heads.anchor_weight)
        gradients = Gradients(policy, *needs)
        for piece, first, logits, other in side_by_side(policy, anchor):
            head.gradient(logits, other, ids[piece], coefficients[piece], logits, first)
            gradients.add(piece, first, logits)
    dhidden = torch.zeros(heads.hidden.shape if needs[0] else 0, dtype=torch.float32)
    if needs[0]:
        dhidden[rows] = gradients.states
    return dhidden, gradients.weight.to(weight_dtype or torch.float32)


def linear_loss_cpp(
    heads: Heads, tokens: Tokens, terms: Terms, entropy: bool, needs: tuple[bool, bool]
) -> LinearLoss:
    """`linear_loss_reference`: the gradients for little more than two products.

    Traffic: 8 N V D flops with an anchor and both gradients; 10 in sequences of more than
        `_KEPT_ROWS` tokens whose coefficients depend on the whole sequence.
    """
    if heads.compute_dtype == torch.float64:
        wide = reference.linear_loss_reference(heads, tokens, terms, entropy, needs)
        return wide._replace(state=wide.state.new_zeros(len(wide.state), STATE))
    exact_kl = exact_kl_of(terms.kl)
    if any(needs):
        making = _Making(heads, tokens, terms, entropy, needs)
        with as_given("cpu"):
            making.run()
        anchored, count = heads.anchor_hidden is not None, len(tokens.mask)
        *found, state = by_row(making.state, making.index, count, anchored, exact_kl, entropy)
        gradients = making.dhidden, making.dweight
    else:
        *found, state = linear_token_stats_cpp(
            heads, tokens.token_ids, tokens.mask, exact_kl, entropy
        )
        gradients = found[0].new_empty(0), found[0].new_empty(0)
    stats = with_given_anchor(Stats(*found), terms)
    total, upstream = objective(tokens, stats, terms), slopes(tokens, stats, terms)
    return LinearLoss(total, *found, state, upstream, *gradients)  # type: ignore[call-arg]


class _Making:
    """The statistics and the gradients of the loss, some hundred rows after the other.

    Attributes:
        index: [n] the rows inside the mask; tokens, terms, ids and state are of these alone.
        dhidden, dweight: of all rows, in fp32.
    """

    def __init__(
        self, heads: Heads, tokens: Tokens, terms: Terms, entropy: bool, needs: tuple[bool, bool]
    ) -> None:
        self.index = tokens.mask.nonzero()[:, 0]
        check_ids(tokens.token_ids, self.index, heads.weight.shape[0])
        self.heads, self.entropy, self.needs = heads, entropy, needs
        self.tokens, self.terms = tokens.at(self.index), terms.at(self.index)
        self.ids, self.state = self.tokens.token_ids, new_state(self.index)
        self.head = Head(heads.temperature, heads.softcap, exact_kl_of(terms.kl))
        self.anchored = heads.anchor_hidden is not None
        hidden, weight = heads[:2]
        self.dhidden = torch.zeros(hidden.shape if needs[0] else 0, dtype=torch.float32)
        self.dweight = torch.empty(weight.shape if needs[1] else 0, dtype=torch.float32)
        self.weighed = False  # whether dweight holds anything

    def run(self) -> None:
        _, weight, anchor_hidden, anchor_weight, *_ = self.heads
        exact, count = bool(self.head.exact_kl), len(self.index)
        limit = _KEPT_ROWS // 2 if exact else _KEPT_ROWS
        size = min(limit, count) * len(weight)
        buffers = [torch.empty(size, dtype=torch.float32) for _ in range(1 + exact)]
        if anchor_hidden is not None and anchor_weight is not None and not exact:
            anchor = Product(anchor_hidden[self.index], anchor_weight, buffers[0])
            _add_anchor(self.head, anchor, self.ids, self.state)
        coupled = self.terms.kl in COUPLED
        lengths = self.tokens.sequence.bincount().tolist() if coupled else None
        for group in groups(count, lengths, limit):
            self._add_group(list(cut(group, limit)), buffers)
        if not self.weighed:
            self.dweight.zero_()

    def _add_group(self, blocks: list[slice], buffers: list[Tensor]) -> None:
        """Rows whose coefficients depend on no other row; the logits of the last block are kept."""
        for block in blocks:
            policy, anchor = self._heads_of(block, buffers)
            given = (self.ids[block], self.state[block], self.entropy)
            _add_policy(self.head, policy, anchor, *given)
        whole = slice(blocks[0].start, blocks[-1].stop)
        tokens, terms = self.tokens.at(whole), self.terms.at(whole)
        found = statistics_of(self.state[whole], self.anchored, self.head.exact_kl, self.entropy)
        upstream = slopes(tokens, with_given_anchor(Stats(*found), terms), terms)
        for block in reversed(blocks):
            kept = block is blocks[-1]
            heads = self._heads_of(block, buffers)
            self._add_gradient(block, *heads, kept, upstream[within(whole, block)])

    def _heads_of(self, block: slice, buffers: list[Tensor]) -> tuple[Product, Product | None]:
        """Policy and, for the exact KL, anchor."""
        index, given, anchor = self.index[block], self.heads, None
        if given.anchor_hidden is not None and given.anchor_weight is not None and buffers[1:]:
            states = given.anchor_hidden[index]
            anchor = Product(states, given.anchor_weight, buffers[1], keep=True)
        return Product(given.hidden[index], given.weight, buffers[0], keep=True), anchor

    def _add_gradient(
        self, block: slice, policy: Product, anchor: Product | None, kept: bool, upstream: Tensor
    ) -> None:
        """Of the rows whose upstream is not 0; the others cost nothing here."""
        live = upstream.any(1).nonzero()[:, 0]
        if not len(live):
            return
        place, some = live + block.start, len(live) < len(upstream)
        exact_kl, temperature = self.head.exact_kl, self.head.temperature
        given = coefficients_of(self.state[place], upstream[live], exact_kl, temperature)
        states, ids = policy.states[live], self.ids[place]
        dstates = torch.zeros_like(states)
        for _, first, logits, other in side_by_side(policy, anchor, again=kept):
            if some:
                logits, other = logits[live], None if other is None else other[live]
            self.head.gradient(logits, other, ids, given, logits, first)
            if self.needs[0]:
                dstates.addmm_(logits, policy.head)
            if self.needs[1]:
                target = self.dweight[first : first + len(policy.head)]
                target.addmm_(logits.T, states, beta=int(self.weighed))
        if self.needs[0]:
            self.dhidden[self.index[place]] = dstates
        self.weighed = True
