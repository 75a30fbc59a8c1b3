"""The embedded default, `make demo`: WARP beside plain REINFORCE on the same number of samples.

Fits the small SFT policy, then trains WARP here while a second process trains REINFORCE with an SFT
anchor, one processor core each; started again, it goes on where it stopped.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers.utils import logging as transformers_logging

from warp_fast.demo import sft
from warp_fast.rl import WarpConfig, warp
from warp_fast.rl.evaluate import FrontPoint, read_front
from warp_fast.rl.files import read_json_lines
from warp_fast.rl.plot import plot_front

DIRECTORY = Path("runs/demo")
CONFIG = Path(__file__).with_name("warp.yaml")
SFT_STEPS = 250
REINFORCE_BETAS = (0.1, 0.02)  # at the paper's beta it saturates; a smaller one goes further
BUDGETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # KL to SFT, nats per completion


def main() -> None:
    """Run everything and print the comparison."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    console = Console(stderr=True)
    fit_sft(console)
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    baseline = start_reinforce(settings)
    console.rule("WARP")
    warp(WarpConfig(**settings))
    with console.status("waiting for REINFORCE, which samples as many tokens per beta"):
        if baseline.wait() != 0:
            sys.exit(f"REINFORCE failed; see {DIRECTORY / 'reinforce.log'}")
    points = read_front(DIRECTORY / "warp" / "front.csv")
    curves = {f"REINFORCE, SFT anchor, beta {b:g}": trajectory(b) for b in REINFORCE_BETAS}
    plot_front(DIRECTORY / "front.png", points, curves)
    Console().print(budget_table(points, [p for curve in curves.values() for p in curve]))
    console.print(f"picture: {DIRECTORY / 'front.png'}   report: {DIRECTORY / 'warp/report.md'}")


def fit_sft(console: Console) -> None:
    """The SFT policy and its prompts, unless they are there."""
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("fitting the SFT policy", total=SFT_STEPS)
        sft.prepare(
            DIRECTORY / "task",
            SFT_STEPS,
            seed=0,
            on_step=lambda step, loss: progress.update(bar, completed=step),
        )


def reinforce_config(settings: dict[str, Any], beta: float) -> WarpConfig:
    """One run against a static SFT anchor with all the steps of WARP's runs together."""
    steps = settings["iterations"] * settings["runs"] * settings["steps"]
    changed = {
        "output": str(DIRECTORY / f"reinforce-{beta:g}"),
        "iterations": 1,
        "runs": 1,
        "steps": steps,
        "beta": beta,
        "ema_rate": 0.0,
        "sweep": [1.0],
        "eval_every": steps // 8,
    }
    return WarpConfig(**{**settings, **changed})


def start_reinforce(settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Train the baselines, one after the other, in a process beside this one."""
    code = (
        "import torch, yaml; torch.set_num_threads(1); from warp_fast.demo import __main__ as demo;"
        f"[demo.warp(demo.reinforce_config({settings!r}, beta), progress=False) "
        "for beta in demo.REINFORCE_BETAS]"
    )
    with open(DIRECTORY / "reinforce.log", "wb") as log:
        return subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)


def trajectory(beta: float) -> list[dict[str, float]]:
    """The evaluations made along a REINFORCE run."""
    rows = read_json_lines(DIRECTORY / f"reinforce-{beta:g}" / "metrics.jsonl")
    prefix = "eval_"
    return [
        {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}
        for row in rows
        if f"{prefix}kl" in row
    ]


def budget_table(points: list[FrontPoint], baseline: list[dict[str, float]]) -> Table:
    """The best reward within each KL budget, WARP beside REINFORCE."""
    table = Table(title="best reward within a KL budget (95 % intervals)")
    for name in ("KL to SFT, nats", "WARP", "its true score", "REINFORCE", "its true score"):
        table.add_column(name, justify="right")
    for budget in BUDGETS:
        cells = []
        for curve in ([vars(p) for p in points], baseline):
            within = [p for p in curve if p["kl"] <= budget]
            best = max(within, key=lambda p: p["reward"], default=None)
            cells += [_cell(best, "reward"), _cell(best, "held_out")]
        table.add_row(f"<= {budget:g}", *cells)
    return table


def _cell(point: Any, key: str) -> str:
    return f"{point[key]:.2f} +- {point[f'{key}_ci']:.2f}" if point else "-"


if __name__ == "__main__":
    main()
