"""The three forms in which weights come (flat tensor, list, dict), reduced to lists of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, field, replace
from operator import index
from typing import Any

import torch
from torch import Tensor

from warp_fast import _sharded
from warp_fast._table import CODE
from warp_fast.flat import PLAIN, Segment, memory_of
from warp_fast.native.slerp import fresh_like

_FLOATING = [dtype for dtype in CODE if dtype.is_floating_point]
Weights = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """T tensors in S segments: `segment[t]` is the segment of tensor t, `names[s]` its name.

    `keys` are the dict keys, `ranges` the (start, stop) of a flat tensor; else None. `tied` says
    of which key in `keys` a key that is not there has the tensor.
    """

    segment: list[int]
    names: list[str]
    keys: list[str] | None = None
    ranges: list[tuple[int, int]] | None = None
    tied: Mapping[str, str] = field(default_factory=dict)

    def tensors(self, weights: Any) -> list[Tensor]:
        """The T tensors of `weights`, as views."""
        if self.ranges is not None:
            return [weights[start:stop] for start, stop in self.ranges]
        if self.keys is not None:
            return [weights[key] for key in self.keys]
        return [weights] if isinstance(weights, Tensor) else list(weights)

    def other_names(self, weights: Any) -> list[Tensor]:
        """What `weights` have under the names that are tied to others."""
        return [weights[key] for key in self.tied]


def _check_tensors(role: str, weights: Any) -> None:
    """Weights are a tensor, or a list or dict of tensors; role: what the message calls them."""
    if isinstance(weights, Tensor):
        return
    came = type(weights).__name__
    if isinstance(weights, Sized) and isinstance(weights, Iterable):
        entries = weights.values() if isinstance(weights, Mapping) else weights
        odd = [kind for kind in set(map(type, entries)) if not issubclass(kind, Tensor)]
        if not odd:
            return
        came += f" of {odd[0].__name__}"
    raise TypeError(f"{role} must be a tensor, or a list or dict of tensors; got {came}")


def layout_of(init: Weights, policies: Any, segments: Any) -> Layout:
    """Read the form of `init` and the meaning of `segments`; raises on what does not fit it.

    Of names that have one tensor in init and in every policy, the first stands for all.
    """
    layout = _layout_of(init, segments)
    if not isinstance(init, Mapping) or not (tied := _tied(init, policies)):
        return layout
    keys, segment = layout.keys or [], layout.segment
    kept = [(key, s) for key, s in zip(keys, segment, strict=True) if key not in tied]
    number = {s: i for i, s in enumerate(sorted({s for _, s in kept}))}
    return replace(
        layout,
        segment=[number[s] for _, s in kept],
        names=[layout.names[s] for s in number],
        keys=[key for key, _ in kept],
        tied=tied,
    )


def _tied(init: Mapping[str, Tensor], policies: Any) -> dict[str, str]:
    """Names of a tensor that has another one, with that; a trace knows no addresses."""
    if torch.compiler.is_compiling():
        return {}
    # one look at each address: this is called for every merge, and few have tied names
    plain = [tensor for tensor in init.values() if type(tensor) in PLAIN]
    apart = len({tensor.data_ptr() for tensor in plain}) == len(plain)
    if apart or any(map(_sharded.is_sharded, init.values())):
        return {}
    first: dict[Any, str] = {}
    found = {}
    for key, tensor in init.items():
        known = first.setdefault(memory_of(tensor), key)
        if known != key:
            found[key] = known
    listed = isinstance(policies, Iterable) and isinstance(policies, Sized)
    everyone = list(policies) if found and listed else []
    return {
        name: known
        for name, known in found.items()
        if everyone and all(_has_tied(policy, name, known) for policy in everyone)
    }


def _has_tied(policy: Any, name: str, known: str) -> bool:
    if not isinstance(policy, Mapping):
        return False
    pair = [x for x in (policy.get(name), policy.get(known)) if isinstance(x, Tensor)]
    return len(pair) == 2 and memory_of(pair[0]) == memory_of(pair[1])


def _layout_of(init: Weights, segments: Any) -> Layout:
    _check_tensors("init", init)
    if isinstance(init, Tensor):
        if segments is None:
            return Layout([0], ["the tensor"])
        return _flat_layout(init, segments)
    if isinstance(init, Mapping):
        keys = list(init)
        if segments is None:
            return Layout(list(range(len(keys))), [str(key) for key in keys], keys)
        return _grouped_layout(keys, segments)
    if segments is not None:
        raise ValueError("segments must be None for a list: each of its tensors is one segment")
    return Layout(list(range(len(init))), [f"tensor {i}" for i in range(len(init))])


def _flat_layout(init: Tensor, segments: Sequence[Segment | tuple[int, int]]) -> Layout:
    if _sharded.is_sharded(init):
        raise ValueError("a sharded tensor has no segments; give a dict of DTensors instead")
    if init.dim() != 1:
        raise ValueError(f"a tensor with segments must be flat; got shape {tuple(init.shape)}")
    entries, ranges, names, end = list(segments), [], [], 0
    for entry in entries:
        start, stop = _range_of(entry)
        if isinstance(entry, Segment) and entry.dtype != init.dtype:
            continue  # of another buffer of FlatParameters
        if not end <= start <= stop <= init.numel():
            raise ValueError(
                "segments must be ordered, disjoint and inside the tensor of "
                f"{init.numel()} elements; got ({start}, {stop}) after {end}"
            )
        ranges.append((start, stop))
        names.append(entry.name if isinstance(entry, Segment) else f"[{start}:{stop}]")
        end = stop
    if entries and not ranges:
        raise ValueError(f"segments must be {init.dtype} like the flat tensor; none of them is")
    return Layout(list(range(len(ranges))), names, ranges=ranges)


def _range_of(entry: Any) -> tuple[int, int]:
    try:
        return index(entry[0]), index(entry[1])
    except (TypeError, IndexError) as error:
        raise TypeError(
            "segments of a flat tensor must be (start, stop) pairs of integers, or Segments; got "
            f"{entry!r}"
        ) from error


def _names_of(group: Any) -> list[str]:
    if isinstance(group, str | Tensor | Segment) or not isinstance(group, Iterable):
        raise TypeError(
            "segments of a dict must be groups, each a list of its names (ranges are for a flat "
            f"tensor); got {group!r}"
        )
    return sorted(group) if isinstance(group, Set) else list(group)


def _grouped_layout(keys: list[str], segments: Any) -> Layout:
    named = isinstance(segments, Mapping)
    given = list(segments.values()) if named else segments
    if not isinstance(given, Iterable):
        raise TypeError(f"segments of a dict must be groups of its names; got {segments!r}")
    groups = [_names_of(group) for group in given]
    number = {key: s for s, group in enumerate(groups) for key in group}
    listed = [key for group in groups for key in group]
    if odd := set(listed) ^ set(keys) or {k for k in listed if listed.count(k) > 1}:
        raise ValueError(
            f"segments must hold every name exactly once; check {sorted(odd, key=str)[:5]}"
        )
    if not all(groups):
        raise ValueError("a group of segments must hold at least one name; got an empty one")
    names = [str(key) for key in segments] if named else [str(group[0]) for group in groups]
    return Layout([number[key] for key in keys], names, keys)


def matched(
    layout: Layout, init: Weights, policies: Sequence[Weights], role: str = "policy"
) -> list[Tensor]:
    """The M * T policy tensors, after checking that each policy has the form and shapes of init.

    role: what the messages call a policy.
    """
    if isinstance(policies, Tensor | Mapping) or not isinstance(policies, Sized):
        came = type(policies).__name__
        raise ValueError(f"policies must be a sequence of at least one policy; got {came}")
    if len(policies) == 0:
        raise ValueError("policies must be a sequence of at least one policy; got none")
    ours = layout.tensors(init)
    if not ours:
        raise ValueError("init must hold at least one tensor; got none")
    if len(devices := {tensor.device for tensor in ours}) > 1:
        raise ValueError(f"init must be on one device; got tensors on {sorted(map(str, devices))}")
    result: list[Tensor] = []
    for m, policy in enumerate(policies):
        _check_tensors(f"{role} {m}", policy)
        _check_form(f"{role} {m}", init, policy)
        theirs, where = layout.tensors(policy), [*(layout.keys or layout.names), *layout.tied]
        pairs = zip(
            [*ours, *layout.other_names(init)], [*theirs, *layout.other_names(policy)], strict=True
        )
        for t, (a, b) in enumerate(pairs):
            if a.shape != b.shape or a.device != b.device:
                raise ValueError(
                    f"{role} {m}, {where[t]}: must be {tuple(a.shape)} on {a.device} like init; "
                    f"got {tuple(b.shape)} on {b.device}"
                )
            if not (a.dtype in _FLOATING and b.dtype in _FLOATING):
                raise TypeError(
                    f"{role} {m}, {where[t]}: must be floating, of 16 bits or more; "
                    f"got {a.dtype}, {b.dtype}"
                )
        for t, (a, b) in enumerate(_sharded.among(ours, theirs)):
            _sharded.check_layout(f"{role} {m}, {where[t]}", b, a)
        result += theirs
    return result


def _check_form(which: str, init: Any, policy: Any) -> None:
    for form in (Tensor, Mapping):
        if isinstance(init, form) != isinstance(policy, form):
            raise TypeError(
                f"{which} must have the form of init ({type(init).__name__}); "
                f"got {type(policy).__name__}"
            )
    if isinstance(init, Tensor):
        if init.shape != policy.shape:
            raise ValueError(
                f"{which} must have shape {tuple(init.shape)}; got {tuple(policy.shape)}"
            )
    elif isinstance(init, Mapping):
        if init.keys() != policy.keys():
            odd = sorted(init.keys() ^ policy.keys())
            raise ValueError(f"{which} must have the names of init; differing: {odd[:5]}")
    elif len(init) != len(policy):
        raise ValueError(f"{which} must hold {len(init)} tensors like init; got {len(policy)}")


def empty_like(layout: Layout, init: Any) -> Any:
    """New weights of the form of init, tied as the layout says."""
    if isinstance(init, Tensor):
        return fresh_like(init)
    if isinstance(init, Mapping):
        tied = layout.tied
        found = {key: fresh_like(tensor) for key, tensor in init.items() if key not in tied}
        return {key: found[tied.get(key, key)] for key in init}
    return [fresh_like(tensor) for tensor in init]


def copy_tied(layout: Layout, result: Any) -> None:
    """Give tied names the merged tensor, where they have another."""
    for name, known in layout.tied.items():
        if memory_of(result[name]) != memory_of(result[known]):
            result[name].copy_(result[known])


def copy_gaps(layout: Layout, init: Any, result: Any) -> None:
    """Give the elements of a flat result that are in no segment the value of init."""
    if layout.ranges is None:
        return
    ends = [0, *(stop for _, stop in layout.ranges)]
    starts = [*(start for start, _ in layout.ranges), init.numel()]
    for end, start in zip(ends, starts, strict=True):
        result[end:start].copy_(init[end:start])
