"""Hidden states times a head weight, and back, a tile of rows by vocabulary at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_COLUMNS = 2048  # of a tile
_TILE = 1 << 22  # logits of a tile: 16 MiB


class Product:
    """states [n, D] @ weight [V, D].T in fp32, a tile at a time in one buffer."""

    def __init__(self, states: Tensor, weight: Tensor, buffer: Tensor | None = None) -> None:
        self.states, self.weight = states.float(), weight
        self.columns = min(_COLUMNS, len(weight))
        self.rows = min(max(1, _TILE // self.columns), len(states))
        size = self.rows * self.columns
        self.buffer = torch.empty(size) if buffer is None else buffer
        self.head = weight[:0]

    def tiles(self) -> Iterator[tuple[slice, int, Tensor]]:
        """(rows, first column, logits); `head` is the weight of those columns in fp32."""
        for first in range(0, len(self.weight) if self.rows else 0, self.columns):
            self.head = self.weight[first : first + self.columns].float()
            for start in range(0, len(self.states), self.rows):
                piece = slice(start, min(start + self.rows, len(self.states)))
                shape = piece.stop - start, len(self.head)
                logits = self.buffer[: shape[0] * shape[1]].view(shape)
                yield piece, first, torch.mm(self.states[piece], self.head.T, out=logits)


class Gradients:
    """Sums over tiles of dlogits: [n, D] of the states, [V, D] of the weight."""

    def __init__(self, product: Product, needs_states: bool, needs_weight: bool) -> None:
        self.product, self.needs_states, self.needs_weight = product, needs_states, needs_weight
        self.states = torch.zeros_like(product.states) if needs_states else torch.empty(0)
        of = product.weight
        self.weight = of.new_empty(0)
        if needs_weight:
            self.weight = torch.empty_like(of) if product.rows else torch.zeros_like(of)
        direct = of.dtype == torch.float32
        self.scratch = None if direct else torch.empty(product.columns, of.shape[1])

    def add(self, piece: slice, first: int, dlogits: Tensor) -> None:
        states, head = self.product.states[piece], self.product.head
        if self.needs_states:
            self.states[piece].addmm_(dlogits, head)
        if not self.needs_weight:
            return
        target = self.weight[first : first + len(head)]
        total = target if self.scratch is None else self.scratch[: len(head)]
        if piece.start == 0:
            torch.mm(dlogits.T, states, out=total)
        else:
            total.addmm_(dlogits.T, states)
        if total is not target and piece.stop == len(self.product.states):
            target.copy_(total)
