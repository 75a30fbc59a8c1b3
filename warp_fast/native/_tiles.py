"""Hidden states times a head weight, and back, a tile of rows by vocabulary at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_COLUMNS = 2048  # of a tile
_TILE = 1 << 22  # logits of a tile: 16 MiB

Tile = tuple[slice, int, Tensor]  # rows, first column, logits


class Product:
    """states [n, D] @ weight [V, D].T in fp32, a tile at a time in one buffer, a given one if it is
    large enough.

    The vocabulary is the outer loop. With keep a tile has all rows and a place of its own, so that
    the tiles can be had again.
    """

    def __init__(
        self, states: Tensor, weight: Tensor, buffer: Tensor | None = None, keep: bool = False
    ) -> None:
        self.states, self.weight, self.keep = states.float(), weight, keep
        self.columns = min(_COLUMNS, len(weight))
        self.rows = len(states) if keep else min(max(1, _TILE // self.columns), len(states))
        size = self.rows * (len(weight) if keep else self.columns)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.float32)
        self.buffer = buffer
        self.head = weight[:0]

    def tiles(self, again: bool = False) -> Iterator[Tile]:
        """The product, or what is kept of it; `head` is the weight of those columns in fp32."""
        for first in range(0, len(self.weight) if self.rows else 0, self.columns):
            self.head = self.weight[first : first + self.columns].float()
            place = self.rows * first if self.keep else 0
            for start in range(0, len(self.states), self.rows):
                piece = slice(start, min(start + self.rows, len(self.states)))
                shape = piece.stop - start, len(self.head)
                logits = self.buffer[place : place + shape[0] * shape[1]].view(shape)
                if not again:
                    torch.mm(self.states[piece], self.head.T, out=logits)
                yield piece, first, logits


def side_by_side(
    policy: Product, anchor: Product | None, again: bool = False
) -> Iterator[tuple[slice, int, Tensor, Tensor | None]]:
    """The tiles of the policy, each with that of the anchor, if there is one."""
    others = None if anchor is None else anchor.tiles(again)
    for tile in policy.tiles(again):
        yield *tile, None if others is None else next(others)[2]


class Gradients:
    """Sums over tiles of dlogits, in fp32: [n, D] of the states, [V, D] of the weight."""

    def __init__(self, product: Product, needs_states: bool, needs_weight: bool) -> None:
        self.product, self.needs_states, self.needs_weight = product, needs_states, needs_weight
        states, weight = product.states, product.weight
        self.states = torch.zeros(states.shape if needs_states else 0, dtype=torch.float32)
        # written whole by the first rows, if there are any
        make = torch.empty if product.rows else torch.zeros
        self.weight = make(weight.shape if needs_weight else 0, dtype=torch.float32)

    def add(self, piece: slice, first: int, dlogits: Tensor) -> None:
        states, head = self.product.states[piece], self.product.head
        if self.needs_states:
            self.states[piece].addmm_(dlogits, head)
        if self.needs_weight:
            target = self.weight[first : first + len(head)]
            target.addmm_(dlogits.T, states, beta=int(piece.start > 0))
