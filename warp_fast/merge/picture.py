"""The picture of a merge: angle and norm ratio of the task vectors, per segment."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from warp_fast.merge.report import MergeReport

_MAX_LABELS = 24  # on the axis of segments; more are thinned out


def draw_angles(report: MergeReport) -> bytes:
    """Draw a PNG: above the angles in degrees, below the norms relative to policy 1."""
    from matplotlib.figure import Figure

    width = min(max(7.0, 0.28 * len(report.segments)), 16.0)
    figure = Figure(figsize=(width, 6.0), layout="constrained")
    angles, ratios = figure.subplots(2, 1, sharex=True)
    _draw_angles(angles, report)
    _draw_ratios(ratios, report)
    _label_segments(ratios, report.segments)
    figure.suptitle(
        f"Task vectors of {len(report.policies)} policies per {report.granularity}, "
        f"merged by {report.method.upper()}"
    )
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    return stream.getvalue()


def _draw_angles(axis: Any, report: MergeReport) -> None:
    places = range(len(report.segments))
    for i, j in report.pairs:
        axis.plot(
            places,
            report.angles[:, i, j].tolist(),
            "o-",
            markersize=4,
            linewidth=0.8,
            label=f"policies {i + 1} and {j + 1}",
        )
    axis.axhline(90, color="black", linewidth=0.8, linestyle=":")
    axis.set_ylim(0, 180)
    axis.set_yticks(range(0, 181, 30))
    axis.set_ylabel("angle, degrees\n(dotted: orthogonal)")
    if report.pairs:
        _legend(axis)
    else:
        axis.text(0.5, 0.4, "one policy: no angle", transform=axis.transAxes, ha="center")


def _draw_ratios(axis: Any, report: MergeReport) -> None:
    places = range(len(report.segments))
    ratios = report.norm_ratios
    for m in range(1, len(report.policies)):
        axis.plot(
            places,
            ratios[:, m].tolist(),
            "s-",
            markersize=4,
            linewidth=0.8,
            label=f"policy {m + 1}",
        )
    merged = report.merged_norms / report.norms[:, 0]
    axis.plot(
        places,
        merged.tolist(),
        "x--",
        color="gray",
        markersize=4,
        linewidth=0.8,
        label="merged, eta = 1",
    )
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_ylabel("norm relative to policy 1")
    axis.set_ylim(bottom=0)
    _legend(axis)


def _legend(axis: Any) -> None:
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _label_segments(axis: Any, segments: list[str]) -> None:
    prefix = _common_prefix([s for s in segments if "." in s])
    labels = [re.sub(r"\.weight$", "", s.removeprefix(prefix)) for s in segments]
    step = -(-len(labels) // _MAX_LABELS)
    places = range(0, len(labels), step)
    # a name may hold $, which is no formula
    axis.set_xticks(places, labels[::step], rotation=90, fontsize=8, parse_math=False)
    axis.margins(x=0.02)
    axis.set_xlabel(f"segment of {prefix[:-1]}" if prefix else "segment", parse_math=False)


def _common_prefix(names: list[str]) -> str:
    """The dotted parts that all names start with; never a whole name."""
    prefix = ""
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        prefix += parts[0] + "."
    return prefix
