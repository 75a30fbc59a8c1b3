"""The embedded default, `make demo`: WARP beside plain REINFORCE, and beside the best possible.

Fits the small SFT policy, then trains WARP here while a second process trains REINFORCE with an SFT
anchor, one processor core each; started again, it goes on where it stopped. Each REINFORCE run
samples as many completions as WARP does in all.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers.utils import logging as transformers_logging

from warp_fast.demo import sft
from warp_fast.demo.optimum import best_curve
from warp_fast.rl import WarpConfig, warp
from warp_fast.rl.evaluate import read_front
from warp_fast.rl.files import read_json_lines, replaced
from warp_fast.rl.plot import Curve, plot_front

DIRECTORY = Path("runs/demo")
CONFIG = Path(__file__).with_name("warp.yaml")
SFT_STEPS = 250
REINFORCE_BETAS = (0.4, 0.2)  # REINFORCE needs a run for each place on the front
BUDGETS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # KL to SFT, nats per completion


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
    with console.status("finding the best front of the task"):
        best = best_front(settings)
    with console.status("waiting for REINFORCE, which samples as much in each of its runs"):
        if baseline.wait() != 0:
            sys.exit(f"REINFORCE failed; see {DIRECTORY / 'reinforce.log'}")
    points = read_front(DIRECTORY / "warp" / "front.csv")
    curves = {f"REINFORCE b={beta:g}": trajectory(beta) for beta in REINFORCE_BETAS}
    plot_front(DIRECTORY / "front.png", points, curves, best)
    Console().print(budget_table({"WARP": [vars(p) for p in points], **curves}, best))
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
        "eval_every": steps // 16,
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


def best_front(settings: dict[str, Any]) -> list[dict[str, float]]:
    """The best curve, found once."""
    path = DIRECTORY / "best.json"
    if not path.exists():
        with replaced(path) as aside:
            aside.write_text(json.dumps(best_curve(WarpConfig(**settings))), encoding="utf-8")
    found: list[dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def trajectory(beta: float) -> list[dict[str, float]]:
    """The evaluations made along a REINFORCE run."""
    rows = read_json_lines(DIRECTORY / f"reinforce-{beta:g}" / "metrics.jsonl")
    prefix = "eval_"
    return [
        {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}
        for row in rows
        if f"{prefix}kl" in row
    ]


def budget_table(curves: Mapping[str, Curve], best: Curve) -> Table:
    """The best reward of each method within each KL budget, and the true score of that policy."""
    title = "best reward within a KL budget, 95 % interval (its true score)"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("KL", *curves, "possible"):
        table.add_column(name, justify="right", no_wrap=True)
    for budget in BUDGETS:
        cells = [_cell(_most_reward(curve, budget)) for curve in curves.values()]
        # the last point of the best curve is where its estimate ends, not a limit
        known = budget <= best[-1]["kl"]
        possible = f"{_most_reward(best, budget)['reward']:.2f}" if known else ""
        table.add_row(f"<= {budget:g}", *cells, possible)
    return table


def _most_reward(curve: Curve, budget: float) -> Any:
    within = [point for point in curve if point["kl"] <= budget]
    return max(within, key=lambda point: point["reward"], default=None)


def _cell(point: Mapping[str, Any] | None) -> str:
    if point is None:
        return "-"
    return f"{point['reward']:.2f}+-{point['reward_ci']:.2f} ({point['held_out']:.2f})"


if __name__ == "__main__":
    main()
