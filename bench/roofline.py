"""The roofline of a machine: what each op reaches below what its memory and its products allow."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

_MARKERS = {"ema": "o", "slerp": "s", "loss": "^", "logits": "v"}
_OURS, _PEERS = "tab:red", "tab:gray"


@dataclass(frozen=True)
class Point:
    """One provider of one case.

    Attributes:
        intensity: flops per byte, of those that the op cannot do without.
        share: flops per second over what the roofs of the same run allow at that intensity.
    """

    op: str
    ours: bool
    intensity: float
    share: float


@dataclass(frozen=True)
class Roofline:
    """What a machine did.

    Attributes:
        machine: its name.
        bandwidth: bytes per second of the update stream; the median over all runs.
        peak: flops per second of the matrix product, the median; inf where none was measured.
        points: the providers that were timed.
    """

    machine: str
    bandwidth: float
    peak: float
    points: list[Point]

    def roof(self, intensity: float) -> float:
        """Flops per second that memory and products allow."""
        return min(self.peak, intensity * self.bandwidth)


def read(records: Sequence[Path]) -> Roofline:
    """From the JSON of benchmarks of one machine, named OP-MACHINE.json."""
    runs: list[Roofline] = []
    for record in records:
        content = json.loads(record.read_text(encoding="utf-8"))
        op, machine = record.name.partition("-")[0], content["environment"]["machine"]
        for _, rows in itertools.groupby(content["points"], key=lambda row: row["case"]):
            runs.append(_run(op, machine, list(rows)))
    peaks = [run.peak for run in runs if run.peak < math.inf]
    return Roofline(
        runs[0].machine,
        median(run.bandwidth for run in runs),
        median(peaks) if peaks else math.inf,
        [point for run in runs for point in run.points],
    )


def _run(op: str, machine: str, rows: list[dict[str, Any]]) -> Roofline:
    """One case: its own roofs, as what else the machine did fell on its probes too."""
    found = {row["provider"]: row for row in rows}
    stream, product = found["probe: update"], found.get("probe: matmul")
    peak = product["flops"] / product["seconds"] if product else math.inf
    run = Roofline(machine, stream["bytes"] / stream["seconds"], peak, [])
    for row in rows:
        if row["flops"] and row is not product:
            intensity = row["flops"] / row["bytes"]
            share = row["flops"] / row["seconds"] / run.roof(intensity)
            run.points.append(Point(op, row["ours"], intensity, share))
    return run


def draw(roofline: Roofline, output: Path) -> None:
    """Write a PNG: flops per second over flops per byte, under the two roofs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    _draw_roofs(axis, roofline)
    for op, marker in _MARKERS.items():
        for ours, color in ((False, _PEERS), (True, _OURS)):
            found = [p for p in roofline.points if (p.op, p.ours) == (op, ours)]
            if found:
                axis.plot(
                    [p.intensity for p in found],
                    [p.share * roofline.roof(p.intensity) / 1e9 for p in found],
                    marker,
                    color=color,
                    markersize=7 if ours else 5,
                    label=f"{op}, {'warp_fast' if ours else 'peers'}",
                )
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("flops per byte that the op cannot do without")
    axis.set_ylabel("GFLOP/s, to scale with the roof of the same run")
    axis.set_title(roofline.machine)
    axis.grid(True, which="major", linewidth=0.4)
    axis.legend(fontsize=8, loc="lower right")
    figure.savefig(output, dpi=130)


def _draw_roofs(axis: Any, roofline: Roofline) -> None:
    intensities = [p.intensity for p in roofline.points]
    ends = [min(intensities) / 2, max(intensities) * 2]
    name = f"update stream, {roofline.bandwidth / 1e9:.0f} GB/s"
    if roofline.peak < math.inf:
        ends = [*ends, roofline.peak / roofline.bandwidth]
        name = f"{name}; matrix product, {roofline.peak / 1e9:.0f} GFLOP/s"
    ends.sort()
    heights = [roofline.roof(x) / 1e9 for x in ends]
    axis.plot(ends, heights, color="black", linewidth=1, label=name)
