"""What a merge found and wrote: the object, its JSON, its picture and the model card."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from warp_fast._task_vectors import TaskVectors

_MAX_ROWS = 100  # of the table in the model card
FORMULAS = {
    "slerp": "theta_init + eta * slerp_M(theta_1 - theta_init, .., theta_M - theta_init)",
    "lerp": "theta_init + eta * mean_m(theta_m - theta_init)",
}


@dataclass(frozen=True)
class MergeReport(TaskVectors):
    """What a merge found, per segment, and where it was written.

    Attributes:
        segments: S names.
        gram: [S, M, M] fp64, inner products of the task vectors; NaN after a dry run.
        coefficients: [S, M] fp64, on the task vectors, before eta; NaN after a dry run.
        method, granularity, etas, dtype, init, policies: what was asked for.
        copied: tensors that are not floating point, the same in all inputs.
        degenerate: segments that SLERP merged linearly, their task vectors being zero, parallel or
            antiparallel.
        outputs: one checkpoint directory per eta.
        bytes_read, bytes_written: of tensors, each input counted once.
    """

    method: str
    granularity: str
    etas: list[float]
    dtype: str | None
    init: Path
    policies: list[Path]
    copied: list[str]
    degenerate: list[str]
    outputs: list[Path]
    bytes_read: int
    bytes_written: int

    @property
    def norm_ratios(self) -> Tensor:
        """[S, M] lengths relative to that of policy 1; NaN or inf where that is zero."""
        return self.norms / self.norms[:, :1]

    @property
    def angles(self) -> Tensor:
        """[S, M, M] angles between task vectors in degrees; NaN where one of the pair is zero."""
        return self._angles().rad2deg()

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Pairs of policies, from 0."""
        return list(itertools.combinations(range(len(self.policies)), 2))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types; numbers that are undefined are null, or left out of angles."""
        return {
            "method": self.method,
            "formula": FORMULAS[self.method],
            "granularity": self.granularity,
            "eta": self.etas,
            "dtype": self.dtype,
            "init": str(self.init),
            "policies": [str(policy) for policy in self.policies],
            "outputs": [str(output) for output in self.outputs],
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "copied": self.copied,
            "degenerate_segments": self.degenerate,
            "segments": self._segment_dicts(),
        }

    def _segment_dicts(self) -> list[dict[str, Any]]:
        # as lists at once: a look into a tensor takes as long as a whole row of these
        rows = zip(
            self.segments,
            self.angles.tolist(),
            self.norms.tolist(),
            self.norm_ratios.tolist(),
            self.coefficients.tolist(),
            self.merged_norms.tolist(),
            strict=True,
        )
        result = []
        for name, angles, norms, ratios, coefficients, merged in rows:
            defined = [(i, j) for i, j in self.pairs if math.isfinite(angles[i][j])]
            result.append(
                {
                    "name": name,
                    "pairs": [[i + 1, j + 1] for i, j in defined],
                    "angles": [angles[i][j] for i, j in defined],
                    "norms": _finite(norms),
                    "norm_ratios": _finite(ratios),
                    "coefficients": _finite(coefficients),
                    "merged_norm": _finite([merged])[0],
                }
            )
        return result

    def command(self) -> str:
        """The command line that makes this merge again."""
        words = ["warp-fast", "merge", "--init", str(self.init)]
        words += [word for policy in self.policies for word in ("--policy", str(policy))]
        words += ["--method", self.method, "--granularity", self.granularity]
        words += ["--eta", *(repr(eta) for eta in self.etas)]
        words += ["--dtype", self.dtype] if self.dtype else []
        return shlex.join([*words, "--output", "DIR"])


def _finite(values: list[float]) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values]


def write_report(report: MergeReport, directories: Sequence[Path]) -> None:
    """Put merge_report.json, merge_angles.png and README.md into the directory of every eta."""
    from warp_fast.merge.picture import draw_angles

    text = json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"
    picture = draw_angles(report)
    for eta, directory in zip(report.etas, directories, strict=True):
        (directory / "merge_report.json").write_text(text, encoding="utf-8")
        (directory / "merge_angles.png").write_bytes(picture)
        (directory / "README.md").write_text(model_card(report, eta), encoding="utf-8")


def model_card(report: MergeReport, eta: float) -> str:
    """README.md of one output."""
    names = ["init: `" + str(report.init) + "`"]
    names += [f"policy {m}: `{policy}`" for m, policy in enumerate(report.policies, 1)]
    return "\n".join(
        [
            "---",
            "tags: [merge, warp]",
            "---",
            "# Merged policy",
            "",
            f"{report.method.upper()} of {len(report.policies)} policies per "
            f"{report.granularity} (WARP, arXiv 2406.16768), eta = {eta:g}, by warp_fast.",
            "",
            f"    theta = {FORMULAS[report.method]}",
            "",
            *(f"- {name}" for name in names),
            "",
            "```",
            report.command(),
            "```",
            "",
            "## Task vectors",
            "",
            "Angles between the task vectors of two policies, and their lengths, are in "
            "`merge_report.json`.",
            "![angles and norm ratios](merge_angles.png)",
            "",
            *_table(report),
            "",
        ]
    )


def _table(report: MergeReport) -> list[str]:
    runs = len(report.policies)
    head = ["segment", *(f"angle {i + 1}-{j + 1}" for i, j in report.pairs)]
    head += [f"norm {m}" for m in range(1, runs + 1)]
    head += [f"coefficient {m}" for m in range(1, runs + 1)] + ["merged norm"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    angles, norms, merged = report.angles, report.norms, report.merged_norms
    for s, name in enumerate(report.segments[:_MAX_ROWS]):
        cells = [f"{float(angles[s, i, j]):.1f}" for i, j in report.pairs]
        cells += [f"{float(norm):.3g}" for norm in norms[s]]
        cells += [f"{float(c):.3f}" for c in report.coefficients[s]]
        lines.append("| " + " | ".join([name, *cells, f"{float(merged[s]):.3g}"]) + " |")
    if len(report.segments) > _MAX_ROWS:
        lines += ["", f"The first {_MAX_ROWS} of {len(report.segments)} segments."]
    return lines
