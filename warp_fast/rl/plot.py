"""The two pictures of a WARP run: the KL-reward front and the angles between task vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from warp_fast.rl.evaluate import FrontPoint
from warp_fast.rl.files import replaced

Curve = Sequence[Mapping[str, float]]

_KL_TICKS = (0, 0.5, *(2**i for i in range(12)))
_COMPARED_COLORS = ("tab:red", "tab:orange", "tab:brown")
_COMPARED_MARKERS = ("s", "^", "D")


def plot_front(
    path: Path,
    points: Sequence[FrontPoint],
    compared: Mapping[str, Curve] | None = None,
    best: Curve = (),
) -> None:
    """Draw reward (and the held-out reward, if any) against KL to SFT, one line per policy.

    Args:
        path: of the .png.
        points: of the fronts.
        compared: further policies by label, drawn as single points; keys of an Evaluation.
        best: the policies of most reward at their KL, drawn as a line.
    """
    import matplotlib
    from matplotlib.figure import Figure

    held_out = any(p.has_held_out for p in points)
    panels = [("reward", "reward (trained on)")] + [("held_out", "held-out reward")] * held_out
    figure = Figure(figsize=(6.4 * len(panels), 4.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    names = list(dict.fromkeys(p.policy for p in points))
    colors = matplotlib.colormaps["viridis"]
    for axis, (key, label) in zip(axes[0], panels, strict=True):
        for i, name in enumerate(names):
            row = [vars(p) for p in points if p.policy == name]
            shade = colors(0.15 + 0.7 * i / max(1, len(names) - 1))
            _draw(axis, row, key, name, color=shade, marker="o")
            if name == names[-1]:
                _name_etas(axis, row, key)
        for i, (name, curve) in enumerate((compared or {}).items()):
            style = {"color": _COMPARED_COLORS[i % 3], "marker": _COMPARED_MARKERS[i % 3]}
            _draw(axis, curve, key, name, linestyle="none", **style)
        if best:
            line = [[p[name] for p in best] for name in ("kl", key)]
            axis.plot(*line, color="black", linestyle=":", label="best reward possible")
        # the square root keeps both the small KLs and the far ends readable
        axis.set_xscale("function", functions=(_root, _square))
        furthest = axis.get_xlim()[1]
        axis.set_xlim(0, furthest)
        axis.set_xticks([tick for tick in _KL_TICKS if tick <= furthest], minor=False)
        axis.set_xlabel("KL(policy || SFT) per completion, nats (square-root scale)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0][0].legend(loc="lower right")
    figure.suptitle("KL-reward front (bars: 95 % intervals)")
    with replaced(path) as aside:
        figure.savefig(aside, dpi=150, format="png")


def _root(values: Any) -> Any:
    return values.clip(min=0) ** 0.5


def _square(values: Any) -> Any:
    return values**2


def _draw(axis: Any, row: Curve, key: str, label: str, **style: Any) -> None:
    row = sorted(row, key=lambda point: point["kl"])
    axis.errorbar(
        [p["kl"] for p in row],
        [p[key] for p in row],
        xerr=[p["kl_ci"] for p in row],
        yerr=[p[f"{key}_ci"] for p in row],
        label=label,
        capsize=2,
        markersize=5,
        elinewidth=0.8,
        **style,
    )


def _name_etas(axis: Any, row: Curve, key: str) -> None:
    for point in row:
        axis.annotate(
            rf"$\eta$={point['eta']:g}",
            (point["kl"], point[key]),
            xytext=(4, -12),
            textcoords="offset points",
            fontsize=8,
        )


def plot_angles(path: Path, reports: Sequence[Mapping[str, Any]]) -> None:
    """Draw the histogram of angles between task vectors, per iteration (paper, Figure 11).

    Args:
        path: of the .png.
        reports: merge report of each iteration, with `segments` holding "angles" in degrees.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    bins = list(range(0, 181, 5))
    for i, report in enumerate(reports, 1):
        angles = [a for segment in report["segments"] for a in segment["angles"]]
        axis.hist(angles, bins=bins, alpha=0.6, label=f"iteration {i}")
    axis.axvline(90, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlabel("angle between the task vectors of two runs, degrees (dotted: orthogonal)")
    axis.set_ylabel("pairs of runs, over all segments")
    axis.set_xlim(0, 180)
    axis.legend()
    figure.suptitle("Angles between runs")
    with replaced(path) as aside:
        figure.savefig(aside, dpi=150, format="png")
