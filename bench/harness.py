"""Correctness first, then time: providers take turns in one process, beside bandwidth probes.

A provider that fails its gate gets no time. Every round runs each provider once, in rotated order,
so that what else the machine does falls on all of them alike; medians are over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from warp_fast._backend import able

Case = TypeVar("Case")
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Scale:
    """How long to measure.

    Attributes:
        rounds: times per provider.
        probe_bytes: of one buffer of the probes; several times the last cache.
        budget: seconds after which a slow provider sits out, but not before three rounds.
    """

    rounds: int
    probe_bytes: int = 1 << 28
    budget: float = 20.0


FULL, QUICK = Scale(rounds=15), Scale(rounds=5, probe_bytes=1 << 27, budget=2.0)


@dataclass
class Provider:
    """One way to do an op.

    Attributes:
        name: as printed.
        run: what is timed, on inputs that are made already.
        error: runs it once on small inputs; the relative error that the gate judges.
        allowed: largest error that passes.
        elements, bytes: size of the op, bytes from the function that its docstring states.
        shown: columns of its own, beside those of the harness.
        ours: whether it is of this package.
        prepare: called before every run, untimed.
        peak: bytes that one run takes at most, where this process is not the one to look at.
        read_bytes: of `bytes`, those in a pass that only reads; for the floor of memory-bound ops.
        returned: bytes of the results that every provider makes; the rest of the peak is its own.
        flops: that nobody can do without; for the loss those of its matrix products.
    """

    name: str
    run: Callable[[], object]
    error: Callable[[], float]
    allowed: float
    elements: int
    bytes: int
    shown: dict[str, str] = field(default_factory=dict)
    ours: bool = False
    prepare: Callable[[], object] = lambda: None
    peak: Callable[[], float] | None = None
    read_bytes: int = 0
    returned: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Absent:
    """A peer that is not installed, and how to get it."""

    name: str
    install: str


@dataclass
class Result:
    """What one provider did; `refused` says why it has no times.

    `host_seconds`, on a GPU: until a call returns, with nothing in front of it.
    """

    provider: Provider
    error: float = math.nan
    refused: str | None = None
    seconds: list[float] = field(default_factory=list)
    host_seconds: float = math.nan
    peak_bytes: float = math.nan

    def quantile(self, q: float) -> float:
        """Seconds; NaN without times."""
        if not self.seconds:
            return math.nan
        return float(torch.tensor(self.seconds, dtype=torch.float64).quantile(q))

    @property
    def bandwidth(self) -> float:
        """Bytes per second at the median."""
        return self.provider.bytes / self.quantile(0.5)


class Clock:
    """Seconds that the device spent on one call; on CUDA by events, with a cold L2.

    A GPU is kept at work until the host has launched what is timed, as it is in a training step:
    what the host takes for that is told apart.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.cold = torch.zeros(4 * cache, dtype=torch.int8, device=device)
            self.cold.max()  # the first one is slow
            self.pass_seconds = self._elapsed(self.cold.max)

    def chill(self, seconds: float = 0.0) -> None:
        """Empty the L2 of inputs; on the device still for at least that long."""
        if self.cuda:
            passes = math.ceil(seconds / self.pass_seconds)
            for _ in range(max(1, passes)):
                self.cold.max()

    def host_seconds(self, run: Callable[[], object]) -> float:
        """What the host takes until a call returns: on the CPU, all of it."""
        if self.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def seconds(self, run: Callable[[], object], host_seconds: float) -> float:
        if not self.cuda:
            return self.host_seconds(run)
        self.chill(2 * host_seconds)
        return self._elapsed(run)

    def _elapsed(self, run: Callable[[], object]) -> float:
        events: Any = torch.cuda.Event
        begin, end = events(enable_timing=True), events(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def peak_bytes(run: Callable[[], object], device: torch.device) -> float:
    """Memory that a call takes beyond what is held before it; NaN where nobody can tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        return float(torch.cuda.max_memory_allocated(device) - held)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what malloc kept from earlier calls would hide this one
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    except OSError:
        run()
        return math.nan
    kept = run()
    peak = _resident("VmHWM") - before
    del kept
    return max(0.0, peak)


def _resident(what: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(what))


def gate(provider: Provider) -> Result:
    """Run a provider once on small inputs and judge it."""
    result = Result(provider)
    try:
        result.error = provider.error()
    except Exception as problem:  # a peer that cannot do the op is listed with its own words
        said = str(problem).strip().splitlines() or ["without a word"]
        result.refused = f"{type(problem).__name__}: {said[0]}"
        return result
    if not result.error <= provider.allowed:
        result.refused = f"wrong: error {result.error:.2g}, allowed {provider.allowed:.2g}"
    return result


def measure(providers: Sequence[Provider], device: torch.device, scale: Scale) -> list[Result]:
    """Gate all, then time those that passed and the bandwidth probes, in turns.

    The inputs of all providers are alive at once. `device` is the one whose clock counts.
    """
    everyone = [*bandwidth_probes(device, scale.probe_bytes), *providers]
    # drawn between the runs, by no thread that would be at work during one
    bars = Progress(console=Console(stderr=True), auto_refresh=False, transient=True)
    with bars:
        results = [gate(provider) for provider in bars.track(everyone, description="errors")]
        gc.collect()  # garbage that is freed later would hide what a call takes
        for result in bars.track(_able(results), description="memory"):
            _measure_memory(result, device)
        clock, turns = Clock(device), list(_turns(_able(results), scale.rounds))
        for turn, result in bars.track(turns, description="time"):
            if turn < 3 or sum(result.seconds) < scale.budget:
                _measure_time(result, clock)
    return results


def _measure_time(result: Result, clock: Clock) -> None:
    """Once more; in front of the first time, how long the host takes."""
    provider = result.provider
    if clock.cuda and not result.seconds:
        provider.prepare()
        result.host_seconds = clock.host_seconds(provider.run)
    provider.prepare()
    result.seconds.append(clock.seconds(provider.run, result.host_seconds))


def _able(results: Sequence[Result]) -> list[Result]:
    return [result for result in results if result.refused is None]


def _turns(results: Sequence[Result], rounds: int) -> Iterator[tuple[int, Result]]:
    """Who runs after whom: every round begins with another provider."""
    for turn in range(rounds):
        first = turn % max(1, len(results))
        for result in [*results[first:], *results[:first]]:
            yield turn, result


def _measure_memory(result: Result, device: torch.device) -> None:
    """Of the second run; one that has not enough of it is refused."""
    provider = result.provider
    try:
        if provider.peak is None:
            provider.prepare()
            provider.run()
        provider.prepare()
        result.peak_bytes = provider.peak() if provider.peak else peak_bytes(provider.run, device)
    except torch.OutOfMemoryError:
        result.refused = "out of memory"
    if result.refused is not None and device.type == "cuda":
        provider.prepare()
        torch.cuda.empty_cache()


def matmul_probe(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> Provider:
    """What products of [rows, width] with 16k columns run at here, into old memory."""
    columns = 1 << 14
    a, b = torch.randn(rows, width, device=device), torch.randn(width, columns, device=device)
    a, b = a.to(dtype), b.to(dtype)
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    return Provider(
        "probe: matmul",
        lambda: torch.mm(a, b, out=out),
        lambda: 0.0,
        0.0,
        out.numel(),
        a.nbytes + b.nbytes + out.nbytes,
        flops=2 * rows * width * columns,
    )


def bandwidth_probes(device: torch.device, size: int) -> list[Provider]:
    """What this machine can do: an in-place update stream, a copy and a read of fp32."""
    x = torch.ones(size // 4, device=device)
    y = torch.ones_like(x)
    streams: dict[str, tuple[Callable[[], Tensor], int]] = {
        "probe: update": (lambda: x.mul_(1.0), 2),
        "probe: copy": (lambda: y.copy_(x), 2),
        "probe: read": (lambda: x.sum(), 1),
    }
    return [
        Provider(name, run, lambda: 0.0, 0.0, x.numel(), x.nbytes * touched)
        for name, (run, touched) in streams.items()
    ]


def backends(op: str, device: torch.device) -> list[str]:
    """What serves an op on a device at speed: not the interpreter of Triton."""
    return [b for b in able(op, device) if device.type == "cuda" or b != "triton"]


def relative_error(ours: Sequence[Tensor], gold: Sequence[Tensor]) -> float:
    """max |ours - gold| / max |gold| over all tensors."""
    pairs = list(zip(ours, gold, strict=True))
    worst = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
    return worst / max(float(b.abs().max()) for _, b in pairs)


@dataclass(frozen=True)
class Options:
    """The command line of a benchmark."""

    quick: bool
    device: torch.device
    scale: Scale
    output: Path
    mergekit_python: str
    directory: Path | None
    only: str

    def chosen(self, cases: Sequence[Case]) -> list[Case]:
        """The cases whose text matches --only."""
        found = [case for case in cases if re.search(self.only, str(case))]
        if not found:
            raise SystemExit(f"--only {self.only!r} matches none of: {'; '.join(map(str, cases))}")
        return found


def parse(description: str, given: Sequence[str] | None = None) -> Options:
    """Read the options that every benchmark has."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=as_written)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--rounds", type=int, help="times per provider")
    parser.add_argument("--threads", type=int, help="CPU threads; default: those that torch takes")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"where to measure; default {default}")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where results are written")
    parser.add_argument(
        "--mergekit-python",
        default=os.environ.get("BENCH_MERGEKIT_PYTHON", ""),
        help="interpreter that has mergekit, if not this one (or BENCH_MERGEKIT_PYTHON)",
    )
    parser.add_argument("--only", default="", help="regular expression that picks among the cases")
    parser.add_argument("--directory", type=Path, help="where bench_merge keeps its checkpoints")
    read = parser.parse_args(given)
    if read.only and read.output == RESULTS:
        parser.error(f"--only would overwrite the results of all cases in {RESULTS}: give --output")
    if read.threads:
        torch.set_num_threads(read.threads)
    scale = QUICK if read.quick else FULL
    if read.rounds:
        scale = dataclasses.replace(scale, rounds=read.rounds)
    return Options(
        quick=read.quick,
        device=torch.device(read.device),
        scale=scale,
        output=read.output,
        mergekit_python=read.mergekit_python,
        directory=read.directory,
        only=read.only,
    )
