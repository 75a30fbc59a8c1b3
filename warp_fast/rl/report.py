"""The report of a WARP run, as a Markdown page beside its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from warp_fast.rl.config import WarpConfig
from warp_fast.rl.evaluate import FrontPoint
from warp_fast.rl.files import read_json_lines, write_text

_SHOWN_SAMPLES = 6


def write_report(
    config: WarpConfig, points: Sequence[FrontPoint], merges: Sequence[Mapping[str, Any]]
) -> None:
    """Write report.md into config.output: the front, the angles, samples and the config."""
    output = Path(config.output)
    parts = [
        f"# WARP on {config.policy}\n",
        f"{config.iterations} iterations of {config.runs} runs, "
        f"{_sampled_tokens(output):,} sampled tokens. The final policy (eta = "
        f"{config.final_eta:g}, in `policy/`) loads with transformers.\n",
        "## Front\n\n![KL-reward front](front.png)\n",
        _front_rows(points),
        "KL is to the SFT policy, in nats per completion, exact over the vocabulary at every "
        "sampled prefix; +- are 95 % intervals.\n",
        "## Angles between runs\n\n![angles](angles.png)\n",
        _angle_rows(merges),
        "## Samples of the last run\n",
        _sample_rows(output, config),
        f"## Config\n\n```yaml\n{yaml.safe_dump(config.to_dict(), sort_keys=False)}```\n",
    ]
    write_text(output / "report.md", "\n".join(parts))


def _sampled_tokens(output: Path) -> int:
    return sum(row["tokens"] for row in read_json_lines(output / "metrics.jsonl"))


def _front_rows(points: Sequence[FrontPoint]) -> str:
    lines = [
        "| policy | eta | KL to SFT | reward | held-out | length |",
        "|---|---|---|---|---|---|",
    ]
    for p in points:
        held_out = f"{p.held_out:.3f} +- {p.held_out_ci:.3f}" if p.has_held_out else ""
        lines.append(
            f"| {p.policy} | {p.eta:g} | {p.kl:.3f} +- {p.kl_ci:.3f} | "
            f"{p.reward:.3f} +- {p.reward_ci:.3f} | {held_out} | {p.length:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _angle_rows(merges: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| iteration | smallest angle | median | largest |", "|---|---|---|---|"]
    for i, merge in enumerate(merges, 1):
        angles = [a for segment in merge["segments"] for a in segment["angles"]]
        if angles:
            lines.append(f"| {i} | {min(angles):.1f} | {median(angles):.1f} | {max(angles):.1f} |")
    return "\n".join(lines) + "\n"


def _sample_rows(output: Path, config: WarpConfig) -> str:
    last = output / f"iteration-{config.iterations}" / f"run-{config.runs}" / "samples.jsonl"
    lines = ["| prompt | completion | reward |", "|---|---|---|"]
    for row in read_json_lines(last)[-_SHOWN_SAMPLES:]:
        lines.append(
            f"| {_cell(row['prompt'])} | {_cell(row['completion'])} | {row['reward']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
