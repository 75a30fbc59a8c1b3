"""Live progress of a WARP run on the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from warp_fast.rl.config import WarpConfig

if TYPE_CHECKING:
    from warp_fast.rl.evaluate import FrontPoint
    from warp_fast.rl.run import Metrics, Run


class Display:
    """A bar per run and a line per finished stage, on standard error."""

    def __init__(self, config: WarpConfig, *, enabled: bool) -> None:
        self.config = config
        self.console = Console(stderr=True, quiet=not enabled)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    @contextlib.contextmanager
    def run(self, run: Run) -> Iterator[Callable[[Metrics], None]]:
        """Follow one run; yields what to call with the metrics of every step."""
        name = f"iteration {run.iteration}/{self.config.iterations}, run {run.number}"
        name += f"/{self.config.runs}"
        bar = self.progress.add_task(name, total=run.steps, status="starting")
        last: dict[str, Any] = {}

        def on_step(metrics: Metrics) -> None:
            last.update(metrics)
            self.progress.update(bar, completed=metrics["step"], status=_status(metrics))

        try:
            yield on_step
        finally:
            self.progress.remove_task(bar)
        self.console.print(f"{name}: {_status(last)}" if last else f"{name}: done before")

    def merged(self, iteration: int, warnings: list[str]) -> None:
        """Say that an iteration was merged, and what the merge warned of."""
        config = self.config
        self.console.print(
            f"iteration {iteration}: {config.runs} policies merged by {config.merge} per "
            f"{config.granularity}"
        )
        for warning in warnings:
            self.console.print(f"[yellow]{warning}[/yellow]")

    def point(self, point: FrontPoint) -> None:
        """Say what one eta of the sweep gave."""
        self.console.print(
            f"  eta {point.eta:<4g} KL to SFT {point.kl:8.3f}  reward {point.reward:7.3f} "
            f"+- {point.reward_ci:.3f}{_held_out(point)}"
        )

    def finished(self, points: list[FrontPoint], where: str) -> None:
        """Print the front as a table, and where the results are."""
        self.console.print(front_table(points))
        self.console.print(where, markup=False)


def front_table(points: list[FrontPoint]) -> Table:
    """The front as a rich table."""
    # narrow enough for a terminal of 80 columns
    table = Table(
        title="KL-reward front (95 % intervals)", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for name in ("policy", "eta", "KL to SFT, nats", "reward", "held-out", "length"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = ""
    for p in points:
        table.add_row(
            p.policy if p.policy != shown else "",
            f"{p.eta:g}",
            f"{p.kl:.3f} +- {p.kl_ci:.3f}",
            f"{p.reward:.2f} +- {p.reward_ci:.2f}",
            f"{p.held_out:.2f} +- {p.held_out_ci:.2f}" if p.has_held_out else "-",
            f"{p.length:.1f}",
        )
        shown = p.policy
    return table


def _status(metrics: dict[str, Any]) -> str:
    return (
        f"reward {metrics['reward']:.3f}  KL to anchor {metrics['kl_to_anchor']:.3f}  "
        f"length {metrics['length']:.1f}"
    )


def _held_out(point: FrontPoint) -> str:
    return f"  held-out {point.held_out:.3f}" if point.has_held_out else ""
