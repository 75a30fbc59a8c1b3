"""The order of work: tensors cut into tiles, and which pass needs each tile when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from warp_fast.merge.plan import MergePlan

TILE_BYTES = 32 << 20  # of inputs and outputs together that are worked on at a time


@dataclass(frozen=True)
class Piece:
    """Elements start to stop of one tensor, `itemsize` bytes each in an output."""

    name: str
    start: int
    stop: int
    itemsize: int

    @property
    def output_bytes(self) -> int:
        return (self.stop - self.start) * self.itemsize


@dataclass(frozen=True)
class Step:
    """One tile and what to do with it; `group` names the segments that its pieces are from."""

    tile: list[Piece]
    group: list[str]
    gram: bool
    apply: bool


def merge_steps(plan: MergePlan) -> Iterator[Step]:
    """Every piece once for the Gram and once to be merged, after its whole segment had its Gram.

    The two coincide for lerp, whose coefficients are known, and for a group that fits one tile.
    """
    for group in _groups(plan):
        tiles = list(_tiles(plan, [name for s in group for name in plan.segments[s]]))
        if plan.method == "lerp" or len(tiles) == 1:
            yield from (Step(tile, group, gram=True, apply=True) for tile in tiles)
            continue
        yield from (Step(tile, group, gram=True, apply=False) for tile in tiles)
        # backwards: the last tiles are the most likely to be in a cache
        yield from (Step(tile, group, gram=False, apply=True) for tile in reversed(tiles))


def _groups(plan: MergePlan) -> Iterator[list[str]]:
    """One segment each, or several that fill a tile together."""
    group: list[str] = []
    room = TILE_BYTES
    for segment, names in plan.segments.items():
        size = sum(_element_bytes(plan, name) * plan.init.entries[name].numel for name in names)
        if group and size > room:
            yield group
            group, room = [], TILE_BYTES
        group.append(segment)
        room -= size
    if group:
        yield group


def _tiles(plan: MergePlan, names: list[str]) -> Iterator[list[Piece]]:
    tile: list[Piece] = []
    room = TILE_BYTES
    for name in names:
        per_element = _element_bytes(plan, name)
        # cut at multiples of the same length whatever else is in the tile
        length = max(TILE_BYTES // per_element, 1)
        itemsize = plan.out_dtype(name).itemsize
        numel = plan.init.entries[name].numel
        for start in range(0, numel, length):
            piece = Piece(name, start, min(start + length, numel), itemsize)
            size = (piece.stop - start) * per_element
            if tile and size > room:
                yield tile
                tile, room = [], TILE_BYTES
            tile.append(piece)
            room -= size
    if tile:
        yield tile


def _element_bytes(plan: MergePlan, name: str) -> int:
    read = sum(checkpoint.entries[name].dtype.itemsize for checkpoint in plan.inputs)
    return read + len(plan.outputs) * plan.out_dtype(name).itemsize
