"""The roofline of a machine: what each op reaches below what its memory and its products allow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

_MARKERS = {"ema": "o", "slerp": "s", "loss": "^"}
_OURS, _PEERS = "tab:red", "tab:gray"


@dataclass(frozen=True)
class Point:
    """One provider of one case: flops and bytes that the op cannot do without, and its seconds."""

    op: str
    ours: bool
    flops: float
    bytes: float
    seconds: float

    @property
    def intensity(self) -> float:
        """Flops per byte."""
        return self.flops / self.bytes

    @property
    def rate(self) -> float:
        """Flops per second."""
        return self.flops / self.seconds


@dataclass(frozen=True)
class Roofline:
    """What a machine did.

    Attributes:
        machine: its name.
        bandwidth: bytes per second of the update stream; the median over all runs.
        peak: flops per second of the fastest matrix product; 0 where none was measured.
        points: the providers that were timed.
    """

    machine: str
    bandwidth: float
    peak: float
    points: list[Point]


def read(records: Sequence[Path]) -> Roofline:
    """From the JSON of benchmarks of one machine, named OP-MACHINE.json."""
    streams: list[float] = []
    peaks: list[float] = [0.0]
    points: list[Point] = []
    machine = ""
    for record in records:
        content = json.loads(record.read_text(encoding="utf-8"))
        machine = content["environment"]["machine"]
        for row in content["points"]:
            if row["provider"] == "probe: update":
                streams.append(row["bytes"] / row["seconds"])
            elif row["provider"] == "probe: matmul":
                peaks.append(row["flops"] / row["seconds"])
            elif row["flops"]:
                work = row["flops"], row["bytes"], row["seconds"]
                points.append(Point(record.name.partition("-")[0], row["ours"], *work))
    return Roofline(machine, median(streams), max(peaks), points)


def draw(roofline: Roofline, output: Path) -> None:
    """Write a PNG: flops per second over flops per byte, under the two roofs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set(xscale="log", yscale="log")
    _draw_roofs(axis, roofline)
    for op, marker in _MARKERS.items():
        for ours, color in ((False, _PEERS), (True, _OURS)):
            found = [p for p in roofline.points if (p.op, p.ours) == (op, ours)]
            if found:
                axis.plot(
                    [p.intensity for p in found],
                    [p.rate / 1e9 for p in found],
                    marker,
                    color=color,
                    markersize=7 if ours else 5,
                    label=f"{op}, {'warp_fast' if ours else 'peers'}",
                )
    axis.set_xlabel("flops per byte that the op cannot do without")
    axis.set_ylabel("GFLOP/s")
    axis.set_title(roofline.machine)
    axis.grid(True, which="major", linewidth=0.4)
    axis.legend(fontsize=8, loc="upper left")
    figure.savefig(output, dpi=130)


def _draw_roofs(axis: Any, roofline: Roofline) -> None:
    intensities = [p.intensity for p in roofline.points]
    left, right = min(intensities) / 2, max(intensities) * 2
    memory = f"update stream, {roofline.bandwidth / 1e9:.0f} GB/s"
    if roofline.peak:
        ridge = roofline.peak / roofline.bandwidth
        right = max(right, 4 * ridge)
        axis.plot([ridge, right], [roofline.peak / 1e9] * 2, color="black", linewidth=1)
        text = f"matrix product, {roofline.peak / 1e9:.0f} GFLOP/s"
        axis.annotate(text, (right, roofline.peak / 1e9), (0, 4), ha="right", fontsize=8,
                      textcoords="offset points")  # fmt: skip
    end = ridge if roofline.peak else right
    heights = [x * roofline.bandwidth / 1e9 for x in (left, end)]
    axis.plot([left, end], heights, color="black", linewidth=1, label=memory)
