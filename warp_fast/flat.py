"""FlatParameters: named segments over one contiguous buffer per dtype."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from warp_fast._sharded import is_sharded

PLAIN = (Tensor, nn.Parameter)  # types of tensors that have an address
ALIGNMENT = 16  # bytes: one vector load of any kernel never straddles two segments


class Segment(NamedTuple):
    """Elements [start, stop) of the buffer of `dtype`; tied weights share them, under all names."""

    start: int
    stop: int
    name: str
    shape: torch.Size
    dtype: torch.dtype
    names: tuple[str, ...]


class FlatParameters:
    """Copy parameters into one contiguous buffer per dtype, every tensor a named segment.

    Args:
        module_or_named_tensors: a module (all its parameters, frozen ones included; its buffers
            stay where they are), a mapping or an iterable of (name, tensor).

    Attributes:
        buffers: dict from dtype to a 1-D tensor. Segments start at multiples of 16 bytes; the gaps
            between them are zero.
        segments: list of Segment in the order of the input, one per distinct tensor: tied weights
            are stored once and keep all their names in `Segment.names`.

    Raises:
        TypeError: something is not a tensor. ValueError: no tensors, a name twice, or tensors on
            several devices.

    Traffic: reads and writes every parameter once.
    """

    def __init__(
        self,
        module_or_named_tensors: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    ) -> None:
        groups = _group_tied(_named_tensors(module_or_named_tensors))
        sizes: dict[torch.dtype, int] = {}
        self.segments: list[Segment] = []
        for names, tensor in groups:
            step = max(1, ALIGNMENT // tensor.element_size())
            start = -(-sizes.get(tensor.dtype, 0) // step) * step
            sizes[tensor.dtype] = start + tensor.numel()
            self.segments.append(
                Segment(start, sizes[tensor.dtype], names[0], tensor.shape, tensor.dtype, names)
            )
        device = groups[0][1].device
        self.buffers = {
            dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes.items()
        }
        with torch.no_grad():
            for segment, (_, tensor) in zip(self.segments, groups, strict=True):
                self._view(segment).copy_(tensor)

    def _view(self, segment: Segment) -> Tensor:
        return self.buffers[segment.dtype][segment.start : segment.stop].view(segment.shape)

    def views(self) -> dict[str, Tensor]:
        """Every name with its tensor, a view of the buffer; tied names get the same view."""
        return {name: self._view(segment) for segment in self.segments for name in segment.names}

    def rebind_(self, module: nn.Module) -> nn.Module:
        """Make the parameters of `module` views of the buffer, and return the module.

        The Parameter objects stay (optimizers keep working, ties stay tied, `requires_grad` is
        kept); only their data moves, so the module takes on the values of the buffer.

        Raises:
            ValueError: names, shapes or dtypes differ from the segments; nothing is changed then.
        """
        groups = _group_tied(list(module.named_parameters(remove_duplicate=False)))
        group_of = {name: g for g, (names, _) in enumerate(groups) for name in names}
        flat = {name for segment in self.segments for name in segment.names}
        covered = {group_of[name] for name in flat & group_of.keys()}
        odd = flat - group_of.keys() | {n for n, g in group_of.items() if g not in covered}
        if odd:
            raise ValueError(
                f"module must have exactly the flat names; differing: {sorted(odd)[:5]}"
            )
        segment_of: dict[int, Segment] = {}
        for segment in self.segments:
            for g in {group_of[name] for name in segment.names}:
                names, parameter = groups[g]
                if g in segment_of or not set(segment.names) <= set(names):
                    tied = sorted({*names, *segment.names})
                    raise ValueError(f"weights must be tied in both or in neither; see {tied[:5]}")
                if (parameter.shape, parameter.dtype) != (segment.shape, segment.dtype):
                    raise ValueError(
                        f"{names[0]} must be {tuple(segment.shape)} {segment.dtype}; "
                        f"got {tuple(parameter.shape)} {parameter.dtype}"
                    )
                segment_of[g] = segment
        for name, parameter in module.named_parameters(remove_duplicate=False):
            parameter.data = self._view(segment_of[group_of[name]])
        return module


def _named_tensors(
    source: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
) -> list[tuple[str, Tensor]]:
    if isinstance(source, nn.Module):
        pairs: list[tuple[str, Tensor]] = list(source.named_parameters(remove_duplicate=False))
    else:
        pairs = list(source.items() if isinstance(source, Mapping) else source)
    if not pairs:
        raise ValueError("there must be at least one tensor; got none")
    for entry in pairs:
        if not (isinstance(entry, tuple | list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise TypeError(
                "there must be pairs of a name, a string, and a tensor; got a "
                f"{type(entry).__name__}"
            )
        name, tensor = entry
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if is_sharded(tensor):
            raise TypeError(f"{name} must be a plain tensor; got a DTensor: give its to_local()")
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("names must be unique; one is given twice")
    devices = {tensor.device for _, tensor in pairs}
    if len(devices) > 1:
        raise ValueError(f"tensors must share one device; got {sorted(map(str, devices))}")
    return pairs


def memory_of(tensor: Tensor) -> object:
    """What is equal for tensors that hold the same elements; of others for one object alone."""
    if tensor.numel() == 0 or tensor.is_meta or type(tensor) not in PLAIN:
        return id(tensor)
    return tensor.data_ptr(), tensor.device, tensor.shape, tensor.stride(), tensor.dtype


def _group_tied(pairs: list[tuple[str, Tensor]]) -> list[tuple[tuple[str, ...], Tensor]]:
    """Join names that hold the same elements (same memory, shape, strides and dtype)."""
    tied: dict[object, tuple[list[str], Tensor]] = {}
    for name, tensor in pairs:
        tied.setdefault(memory_of(tensor), ([], tensor))[0].append(name)
    return [(tuple(names), tensor) for names, tensor in tied.values()]
