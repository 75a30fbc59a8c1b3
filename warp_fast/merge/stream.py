"""The two passes over mapped checkpoints, tile by tile, in bounded memory."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from warp_fast import _ops
from warp_fast._solve import scaled
from warp_fast.merge.checkpoint import CheckpointError
from warp_fast.merge.mapped import MappedFiles, prefetch
from warp_fast.merge.plan import MergePlan
from warp_fast.merge.steps import Piece, Step, merge_steps
from warp_fast.merge.write import Writer

_AHEAD = 8  # tiles the kernel is asked to read ahead; cold reads gain up to here, not beyond
_ALIGNMENT = 64


@dataclass(frozen=True)
class Solution:
    """Segments in the order asked for: gram [S, M, M], coefficients [S, M], degenerate [S]."""

    gram: Tensor
    coefficients: Tensor
    degenerate: Tensor


class _Buffer:
    """Merged tiles on their way to the disk, one at a time."""

    def __init__(self, size: int) -> None:
        self.raw = mmap.mmap(-1, size)
        self.bytes = torch.frombuffer(self.raw, dtype=torch.uint8)
        self.written: Future[None] | None = None

    def wait(self) -> None:
        """Until it is free; raises what went wrong with its last tile."""
        if self.written is not None:
            self.written.result()


class Merger:
    """Runs a plan: the Gram of a group of segments, their coefficients, then their merged tensors.

    Tensors are cut at fixed places and Grams summed by name, so the result does not depend on how
    the tensors lie in files.
    """

    def __init__(
        self, plan: MergePlan, files: MappedFiles, writers: Sequence[Writer], backend: str
    ) -> None:
        self.gram_op, self.apply_op = _ops.GRAM[backend], _ops.SLERP_APPLY[backend]
        self.coefficients_of = _ops.SOLVE[backend]
        self.plan, self.files, self.writers = plan, files, writers
        self.steps = list(merge_steps(plan))
        self.segment_of = {n: s for s, names in plan.segments.items() for n in names}
        runs = len(plan.policies)
        nothing = torch.zeros(runs, runs, dtype=torch.float64, device="cpu")
        self.grams = {name: nothing.clone() for name in self.segment_of}
        sizes = [self._output_bytes(step.tile) for step in self.steps if step.apply]
        # one is filled while the other is written
        self.buffers = [_Buffer(max(sizes, default=1)) for _ in range(2)]

    @property
    def total_bytes(self) -> int:
        """What `advance` will have been told of in the end."""
        return sum(map(self._moved, self.steps))

    def run(self, advance: Callable[[int], None]) -> Solution:
        """Merge all segments; `advance` is told of the bytes that each step read and wrote."""
        solved: tuple[list[str], Tensor] | None = None
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as disk:
            for i, step in enumerate(self.steps):
                for ahead in self.steps[i + _AHEAD : i + _AHEAD + 1]:
                    reader.submit(self._prefetch, ahead.tile)
                inputs = [self._views(m, step.tile) for m in range(len(self.plan.inputs))]
                if step.gram:
                    self._add_gram(step.tile, inputs)
                if step.apply:
                    if solved is None or solved[0] is not step.group:
                        solved = step.group, self.solve(step.group).coefficients
                    self._apply(step, inputs, solved[1], disk)
                advance(self._moved(step))
                self.files.release()
            for buffer in self.buffers:
                buffer.wait()
        return self.solve(list(self.plan.segments))

    def solve(self, segments: list[str]) -> Solution:
        """Coefficients from the Grams as they are now."""
        names = [sorted(self.plan.segments[s]) for s in segments]
        gram = torch.stack([torch.stack([self.grams[n] for n in group]).sum(0) for group in names])
        if self.plan.method == "slerp":
            return Solution(gram, *self.coefficients_of(gram))
        runs = gram.shape[1]
        coefficients = torch.full_like(gram[:, 0], 1 / runs)
        return Solution(gram, coefficients, torch.zeros_like(gram[:, 0, 0], dtype=torch.bool))

    def _views(self, m: int, tile: list[Piece]) -> list[Tensor]:
        entries = self.plan.inputs[m].entries
        return [self.files.view(entries[p.name], p.start, p.stop) for p in tile]

    def _add_gram(self, tile: list[Piece], inputs: list[list[Tensor]]) -> None:
        init, *policies = inputs
        flat = [tensor for policy in policies for tensor in policy]
        grams = self.gram_op(init, flat, list(range(len(tile))), len(tile))
        if not grams.isfinite().all():
            self._refuse(tile, inputs)
        for piece, gram in zip(tile, grams, strict=True):
            self.grams[piece.name] += gram

    def _refuse(self, tile: list[Piece], inputs: list[list[Tensor]]) -> None:
        for checkpoint, tensors in zip(self.plan.inputs, inputs, strict=True):
            for piece, tensor in zip(tile, tensors, strict=True):
                if not tensor.isfinite().all():
                    raise CheckpointError(f"{checkpoint}: {piece.name} holds NaN or inf")
        raise CheckpointError(f"the task vectors of {tile[0].name} or the next overflow")

    def _apply(
        self, step: Step, inputs: list[list[Tensor]], coefficients: Tensor, disk: Executor
    ) -> None:
        """Merge a tile into a free buffer, and hand it to the thread that writes."""
        init, *policies = inputs
        flat = [tensor for policy in policies for tensor in policy]
        position = {segment: s for s, segment in enumerate(step.group)}
        segment = [position[self.segment_of[piece.name]] for piece in step.tile]
        rows = scaled(coefficients, self.plan.etas)
        buffer = self.buffers[0]
        buffer.wait()
        merged = [
            buffer.bytes[at : at + p.output_bytes].view(self.plan.out_dtype(p.name))
            for at, p in zip(self._places(step.tile), step.tile * len(self.writers), strict=True)
        ]
        self.apply_op(merged, init, flat, rows, segment)
        suspects = self._suspects(step.tile, rows[:, segment])
        for piece, tensor in zip(step.tile * len(self.writers), merged, strict=True):
            if piece in suspects and not _finite(tensor):
                raise ValueError(self._overflow(piece.name))
        buffer.written = disk.submit(self._write, step.tile, buffer)
        self.buffers.reverse()

    def _suspects(self, tile: list[Piece], coefficients: Tensor) -> set[Piece]:
        """Pieces that may overflow, from their Grams: what cannot is not looked at.

        Init is finite. Steps of less than half the spacing of the largest numbers do not take one
        of its dtype to inf, and no element moves further than its task vectors are long.
        """
        narrow = {p for p in tile if self._stored(p).max > self._written(p).max}
        if len(narrow) == len(tile):
            return narrow
        norms = torch.stack([self.grams[p.name] for p in tile]).diagonal(dim1=1, dim2=2).sqrt()
        steps = (coefficients.abs() * norms).sum(2).amax(0).tolist()
        ends = [self._written(p) for p in tile]
        # a quarter of the spacing: the steps were rounded themselves
        far = [step >= end.max * end.eps / 8 for step, end in zip(steps, ends, strict=True)]
        return narrow | set(itertools.compress(tile, far))

    def _stored(self, piece: Piece) -> torch.finfo:
        return torch.finfo(self.plan.init.entries[piece.name].dtype)

    def _written(self, piece: Piece) -> torch.finfo:
        return torch.finfo(self.plan.out_dtype(piece.name))

    def _overflow(self, name: str) -> str:
        stored, dtype = self.plan.init.entries[name].dtype, self.plan.out_dtype(name)
        if dtype == torch.float16:
            advice = "choose bfloat16 or float32"
        elif stored == torch.float64 != dtype:
            advice = "give no dtype, to keep float64"
        else:
            advice = "look for weights of that size, or choose a smaller eta"
        largest = torch.finfo(dtype).max
        return f"{name} overflows {str(dtype)[6:]}, which ends at {largest:.3g}; {advice}"

    def _write(self, tile: list[Piece], buffer: _Buffer) -> None:
        places = iter(self._places(tile))
        for writer in self.writers:
            for piece in tile:
                at = next(places)
                content = memoryview(buffer.raw)[at : at + piece.output_bytes]
                writer.write(piece.name, piece.start * piece.itemsize, content)

    def _places(self, tile: list[Piece]) -> list[int]:
        """First byte in the buffer of every piece of every output."""
        places, end = [], 0
        for piece in tile * len(self.writers):
            places.append(end)
            end += -(-piece.output_bytes // _ALIGNMENT) * _ALIGNMENT
        return places

    def _output_bytes(self, tile: list[Piece]) -> int:
        return self._places(tile)[-1] + tile[-1].output_bytes

    def _moved(self, step: Step) -> int:
        """Bytes read and written by a step; a tile that serves both passes is read once."""
        read = sum(
            (p.stop - p.start) * c.entries[p.name].dtype.itemsize
            for p in step.tile
            for c in self.plan.inputs
        )
        written = len(self.writers) * sum(p.output_bytes for p in step.tile) * step.apply
        return read + written

    def _prefetch(self, tile: list[Piece]) -> None:
        for checkpoint in self.plan.inputs:
            prefetch((checkpoint.entries[p.name], p.start, p.stop) for p in tile)


def _finite(tensor: Tensor) -> bool:
    """isfinite().all(), which takes ten times as long."""
    return all(end.isfinite() for end in tensor.aminmax())
