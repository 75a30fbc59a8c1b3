"""Rows cut into pieces that are worked on one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def cut(whole: slice, size: int) -> Iterator[slice]:
    """Pieces of at most `size`."""
    return (slice(at, min(at + size, whole.stop)) for at in range(whole.start, whole.stop, size))


def within(whole: slice, part: slice) -> slice:
    """The place of a part in what it is a part of."""
    return slice(part.start - whole.start, part.stop - whole.start)


def groups(count: int, lengths: Iterable[int] | None, limit: int) -> list[slice]:
    """Cut `count` rows where they do not depend on each other.

    Args:
        lengths: rows of each sequence, in their order, if those of a sequence depend on each other:
            then groups are of whole ones, and have more than `limit` rows only if one has; else
            they are about equal.
    """
    if lengths is None:
        size = max(1, -(-count // max(1, -(-count // limit))))
        return list(cut(slice(0, count), size))
    found, start, stop = [], 0, 0
    for length in lengths:
        if stop > start and stop + length - start > limit:
            found.append(slice(start, stop))
            start = stop
        stop += length
    return [*found, slice(start, stop)] if stop > start else found
