"""Algorithm 1 of arXiv 2406.16768: train M runs, merge, interpolate, iterate, sweep eta."""

from __future__ import annotations

import contextlib
import fcntl
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from warp_fast.merge import merge_checkpoints
from warp_fast.rl.config import FREE, WarpConfig
from warp_fast.rl.evaluate import Evaluator, FrontPoint, read_front, sweep, write_front
from warp_fast.rl.files import remove, write_text
from warp_fast.rl.plot import plot_angles, plot_front
from warp_fast.rl.policy import Policy, load_policy
from warp_fast.rl.progress import Display
from warp_fast.rl.report import write_report
from warp_fast.rl.run import Metrics, Run
from warp_fast.rl.task import Task, prepare


def warp(config: WarpConfig, *, progress: bool = True) -> Path:
    """Run WARP from an SFT policy to a KL-reward front; go on where a killed run stopped.

        theta_init <- theta_sft
        for each of I iterations:
            M runs of T steps from theta_init, each toward reward - beta KL(policy || its EMA)
            theta_slerp <- slerp(theta_init, runs)
            theta_init <- (1-eta) theta_init + eta theta_slerp
        return { (1-eta) theta_sft + eta theta_slerp : eta in sweep }

    Args:
        config: every hyperparameter.
        progress: show live progress on the terminal.

    Returns: config.output, which holds front.csv, front.png, angles.png, metrics.jsonl, report.md,
        policy/ (the final policy as a Hugging Face directory, in the dtype of the SFT policy) and a
        directory per iteration.

    Raises:
        ValueError: something in the config cannot be used, or output belongs to another config.
        RewardError: the reward failed; its batch is saved. OSError: output could not be written.
    """
    output = Path(config.output)
    policy = load_policy(config)
    task, evaluator = prepare(config, policy)
    with _locked(output), Display(config, enabled=progress) as display:
        _claim(output, config)
        sft = output / "sft"
        if not sft.exists():
            policy.save(sft)
        points: list[FrontPoint] = []
        start = sft
        stages = _Stages(config, policy, task, evaluator, display)
        for i in range(1, config.iterations + 1):
            for m in range(1, config.runs + 1):
                stages.train(start, i, m)
            target, start = stages.merge(start, i)
            points += stages.front(target, i)
        _finish(config, policy, points, target)
        display.finished(points, f"front, pictures, report and policy are in {output}")
    return output


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold the directory for this process; the system lets go of it however the process ends."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"output {output} is being written by another process") from error
        yield


def _claim(output: Path, config: WarpConfig) -> None:
    """Write config.yaml, or check that what lies there has the same config but for what is free."""
    path = output / "config.yaml"
    if not path.exists():
        foreign = sorted(p.name for p in output.iterdir() if not p.name.startswith("."))
        if foreign:
            raise ValueError(
                f"output {output} must be empty or of an earlier start of this command; it holds "
                f"{', '.join(foreign[:5])}"
            )
        write_text(path, yaml.safe_dump(config.to_dict(), sort_keys=False))
        return
    ours = config.to_dict()
    try:
        theirs = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        theirs = None
    if not isinstance(theirs, dict):
        raise ValueError(
            f"{path} must hold the options of a run; it does not: choose another output"
        )
    changed = [
        f"{key}: {theirs.get(key)} there, {ours.get(key)} now"
        for key in sorted(theirs.keys() | ours.keys())
        if key not in FREE and theirs.get(key) != ours.get(key)
    ]
    if changed:
        raise ValueError(
            f"output {output} was started with another config ({'; '.join(changed)}); "
            "choose another output to start anew"
        )


@dataclass
class _Stages:
    """The stages of an iteration; one whose result is on the disk is not done again."""

    config: WarpConfig
    policy: Policy
    task: Task
    evaluator: Evaluator
    display: Display

    def directory(self, iteration: int) -> Path:
        return Path(self.config.output) / f"iteration-{iteration}"

    def train(self, start: Path, iteration: int, number: int) -> None:
        """One of the M runs, from the policy in `start`."""
        directory = self.directory(iteration) / f"run-{number}"
        if not (directory / "policy").exists():
            self.policy.load_weights(start)
            run = Run(self.config, self.policy, self.task, directory, iteration, number)
            with self.display.run(run) as on_step:
                run.train(on_step, self._evaluate)
        remove(directory / "state.pt")
        _gather_metrics(Path(self.config.output))

    def _evaluate(self) -> Metrics:
        return {f"eval_{k}": v for k, v in vars(self.evaluator()).items()}

    def merge(self, start: Path, iteration: int) -> tuple[Path, Path]:
        """theta_slerp of an iteration and the start of the next, both in fp32 on disk."""
        config, directory = self.config, self.directory(iteration)
        merged = directory / "merged"
        etas = sorted({config.eta, 1.0})
        if not merged.exists():
            runs = [directory / f"run-{m}" / "policy" for m in range(1, config.runs + 1)]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                merge_checkpoints(
                    start,
                    runs,
                    merged,
                    method=config.merge,
                    granularity=config.granularity,
                    eta=etas,
                    progress=False,
                )
            self.display.merged(iteration, [str(w.message) for w in caught])
        if len(etas) == 1:
            return merged, merged
        return merged / "eta-1", merged / f"eta-{config.eta:g}"

    def front(self, target: Path, iteration: int) -> list[FrontPoint]:
        """The sweep of eta from SFT to the merge of an iteration."""
        path = self.directory(iteration) / "front.csv"
        if not path.exists():
            self.policy.load_weights(target)
            name = f"WARP iteration {iteration}"
            write_front(path, sweep(self.evaluator, self.config.sweep, name, self.display.point))
        return read_front(path)


def _gather_metrics(output: Path) -> None:
    """metrics.jsonl of all runs so far, in order."""
    parts = sorted(output.glob("iteration-*/run-*/metrics.jsonl"), key=_numbers)
    write_text(output / "metrics.jsonl", "".join(p.read_text(encoding="utf-8") for p in parts))


def _numbers(path: Path) -> tuple[int, int]:
    return int(path.parts[-3].split("-")[1]), int(path.parts[-2].split("-")[1])


def _finish(config: WarpConfig, policy: Policy, points: list[FrontPoint], target: Path) -> None:
    output = Path(config.output)
    write_front(output / "front.csv", points)
    plot_front(output / "front.png", points)
    reports = _merge_reports(config)
    plot_angles(output / "angles.png", reports)
    final = output / "policy"
    if not final.exists():
        merge_checkpoints(
            output / "sft",
            [target],
            final,
            method="lerp",
            eta=config.final_eta,
            dtype=_dtype_name(policy.saved_dtype),
            progress=False,
        )
    write_report(config, points, reports)


def _merge_reports(config: WarpConfig) -> list[dict[str, Any]]:
    found = []
    for i in range(1, config.iterations + 1):
        merged = Path(config.output) / f"iteration-{i}" / "merged"
        path = min(merged.rglob("merge_report.json"))  # the same in the directory of each eta
        found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


def _dtype_name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
