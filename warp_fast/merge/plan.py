"""What a merge will read and write, decided and checked from headers alone."""

from __future__ import annotations

import errno
import math
import os
import re
import resource
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from warp_fast._etas import read_etas
from warp_fast.merge.carry import carried_files
from warp_fast.merge.checkpoint import Checkpoint, open_checkpoint
from warp_fast.merge.layout import OutputFile, output_files
from warp_fast.merge.match import FLOATING, check_floating, check_match, tied_heads
from warp_fast.merge.write import aside_of

METHODS = ("slerp", "lerp")
GRANULARITIES = ("tensor", "block", "model")
OUT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SPARE = 64  # files that a merge opens beside weights: locks, tokenizers, fonts
_BLOCK = re.compile(r"^(?:.*?\.)?(?:layers?|blocks?|h)\.\d+(?=\.)")


@dataclass(frozen=True)
class MergePlan:
    """A merge that passed every check on headers.

    Attributes:
        segments: names of the float tensors that share an angle, by the name of the segment.
        copied: tensors that are not floating point; they come from init, and must not differ.
        tied: heads that are the embedding by the config; they are neither read nor written.
        carried: files and directories of init that are copied beside the weights.
        outputs: one directory per eta.
        files: the safetensors files of each output.
    """

    init: Checkpoint
    policies: list[Checkpoint]
    output: Path
    method: str
    granularity: str
    etas: list[float]
    dtype: str | None
    segments: dict[str, list[str]]
    copied: list[str]
    tied: list[str]
    carried: list[Path]
    outputs: list[Path]
    files: list[OutputFile]

    @property
    def inputs(self) -> list[Checkpoint]:
        return [self.init, *self.policies]

    def out_dtype(self, name: str) -> torch.dtype:
        """What a float tensor is written as."""
        return OUT_DTYPES[self.dtype] if self.dtype else self.init.entries[name].dtype

    @property
    def bytes_read(self) -> int:
        """Bytes of the tensors that are needed; SLERP goes over them twice, mostly in cache."""
        merged = [name for group in self.segments.values() for name in group]
        needed = [*self.copied, *merged]
        return sum(c.entries[name].nbytes for c in self.inputs for name in needed)

    @property
    def bytes_written(self) -> int:
        return len(self.outputs) * sum(file.size for file in self.files)

    def describe(self) -> str:
        """The plan, for a person."""
        tensors = sum(len(group) for group in self.segments.values())
        lines = [
            f"{self.method} of {len(self.policies)} policies per {self.granularity}, eta "
            + ", ".join(f"{eta:g}" for eta in self.etas),
            *(f"  {checkpoint}" for checkpoint in self.inputs),
            f"{tensors} tensors in {len(self.segments)} segments",
        ]
        if self.copied:
            lines.append(f"copied from init, not floating point: {', '.join(self.copied)}")
        if self.tied:
            lines.append(f"tied to the embedding, not written: {', '.join(self.tied)}")
        lines += [
            *self._describe_carried(),
            f"reads {self.bytes_read / 1e9:.3f} GB, writes {self.bytes_written / 1e9:.3f} GB",
            *(f"  {output / file.name}" for output in self.outputs for file in self.files),
        ]
        return "\n".join(lines)

    def _describe_carried(self) -> list[str]:
        names = [path.name for path in self.carried]
        if self.init.config:
            return [f"carried over from init: {', '.join(['config.json', *names])}"]
        others = [policy for policy in self.policies if policy.config]
        advice = f"; copy that of {others[0]} to init if it fits" if others else ""
        return [
            f"carried over from init: {', '.join(names) or 'nothing'}",
            f"no config.json in init, so none in the output{advice}",
        ]


def _path(given: str | Path) -> Path:
    """With ~ as the home, which a shell leaves alone after `--output=`."""
    return Path(os.path.expanduser(given))


def plan_merge(
    init: str | Path,
    policies: Iterable[str | Path],
    output: str | Path,
    *,
    method: str,
    granularity: str,
    eta: float | Sequence[float],
    dtype: str | None,
) -> MergePlan:
    """Check the arguments, the headers and the place of the output; raise at the first fault.

    Raises:
        ValueError: an argument is out of its range. CheckpointError: an input cannot be read, or
            does not match init. OSError: the output exists, or does not fit on the disk, or there
            are more files than this process may open.
    """
    policies = _listed(policies)
    etas = _checked(method, granularity, eta, dtype)
    start = open_checkpoint(_path(init), "init")
    ends = [open_checkpoint(_path(p), f"policy {m}") for m, p in enumerate(policies, 1)]
    tied = tied_heads(start, ends)
    names = [name for name in start.names if name not in tied]
    for end in ends:
        check_match(start, end, names, tied)
    check_floating([start, *ends])
    floating = [n for n in names if start.entries[n].dtype in FLOATING]
    dtypes = {n: OUT_DTYPES[dtype] if dtype else start.entries[n].dtype for n in floating}
    shapes = [(n, dtypes.get(n, start.entries[n].dtype), start.entries[n].shape) for n in names]
    target = _path(output)
    plan = MergePlan(
        init=start,
        policies=ends,
        output=target,
        method=method,
        granularity=granularity,
        etas=etas,
        dtype=dtype,
        segments=_segments([n for n in floating if start.entries[n].numel], granularity),
        copied=[n for n in names if start.entries[n].dtype not in FLOATING],
        tied=sorted(tied),
        carried=carried_files(start),
        outputs=[target / f"eta-{e:g}" for e in etas] if len(etas) > 1 else [target],
        files=output_files(shapes),
    )
    _check_output(plan)
    _allow_open_files(plan)
    return plan


def _listed(policies: Iterable[str | Path]) -> list[str | Path]:
    several = isinstance(policies, Iterable) and not isinstance(policies, str | Path)
    listed = list(policies) if several else []
    if not listed:
        raise ValueError(f"policies must be a list of at least one directory; got {policies!r}")
    return listed


def _checked(
    method: str, granularity: str, eta: float | Sequence[float], dtype: str | None
) -> list[float]:
    for name, value, known in (
        ("method", method, METHODS),
        ("granularity", granularity, GRANULARITIES),
        ("dtype", dtype, (None, *OUT_DTYPES)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(str, known))}; got {value!r}")
    etas = [e + 0.0 for e in read_etas(eta)[0]]  # -0.0 is 0.0
    if not etas or not all(math.isfinite(e) and 0 <= e <= 2 for e in etas):
        raise ValueError(f"eta must be in [0, 2] (0 is init, 1 the merge); got {eta}")
    if len({f"{e:g}" for e in etas}) < len(etas):
        raise ValueError(f"each eta must be given once, to six digits; got {eta}")
    return etas


def _segments(names: list[str], granularity: str) -> dict[str, list[str]]:
    segments: dict[str, list[str]] = {}
    for name in names:
        block = _BLOCK.match(name) if granularity == "block" else None
        key = "model" if granularity == "model" else block.group() if block else name
        segments.setdefault(key, []).append(name)
    return segments


def _check_output(plan: MergePlan) -> None:
    output = plan.output
    final, aside = output.resolve(), aside_of(output)
    for checkpoint in plan.inputs:
        place = checkpoint.path.resolve()
        if final.is_relative_to(place):
            raise ValueError(f"output {output} is inside {checkpoint}; choose another place")
        if place.is_relative_to(aside):
            raise ValueError(
                f"{checkpoint} is where {output} is written before it is whole; move it, or choose "
                "another output"
            )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            errno.EEXIST, "output exists and is not empty; delete it or choose another", str(output)
        )
    if os.path.ismount(output):
        raise ValueError(
            f"output {output} is a mount point, which nothing can be renamed to; "
            f"give a directory in it, such as {output / 'merged'}"
        )
    if output.exists() and output.samefile(os.curdir):
        raise ValueError(
            f"output {output} is the current directory, which a merge would replace; "
            f"give a directory in it, such as {output / 'merged'}"
        )
    parent = next(p for p in final.parents if p.is_dir())
    free = shutil.disk_usage(parent).free
    if plan.bytes_written > free:
        raise OSError(
            errno.ENOSPC,
            f"the merge needs {plan.bytes_written / 1e9:.3f} GB, {free / 1e9:.3f} GB are free",
            str(parent),
        )


def _allow_open_files(plan: MergePlan) -> None:
    """All files of weights are open at once; a limit that is lower is raised, as far as may be."""
    read = len({entry.file for checkpoint in plan.inputs for entry in checkpoint.entries.values()})
    written = len(plan.outputs) * len(plan.files)
    others = len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else 0
    needed = read + written + others + _SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != hard < needed:
        raise OSError(
            errno.EMFILE,
            f"the merge opens {read} files to read and {written} to write, and needs a limit of "
            f"{needed} open files; it is {hard} at most. Raise it (ulimit -Hn), give one eta at a "
            "time, or save the inputs in fewer shards",
        )
    if resource.RLIM_INFINITY != soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
