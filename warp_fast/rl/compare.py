"""Evaluate finished checkpoints against the SFT policy they came from."""

from __future__ import annotations

from pathlib import Path

from warp_fast.rl.config import WarpConfig
from warp_fast.rl.evaluate import FrontPoint, sweep, write_front
from warp_fast.rl.plot import plot_front
from warp_fast.rl.policy import load_policy
from warp_fast.rl.progress import Display
from warp_fast.rl.task import prepare


def evaluate_checkpoints(
    config: WarpConfig, policies: list[Path], *, progress: bool = True
) -> list[FrontPoint]:
    """Sweep eta from config.policy (SFT) to each checkpoint; write front.csv and front.png.

    front.csv grows with each checkpoint.

    Raises:
        ValueError: no checkpoint is given, one is missing or not of the architecture of SFT, or the
            output is a training run. OSError: the output cannot be a directory.
    """
    if not policies:
        raise ValueError("give at least one policy, a checkpoint directory")
    if missing := [str(checkpoint) for checkpoint in policies if not checkpoint.is_dir()]:
        raise ValueError(f"policy must be checkpoint directories; there is none at {missing}")
    output = Path(config.output)
    if (output / "config.yaml").is_file() and (output / "sft").is_dir():
        raise ValueError(
            f"output must not be a training run, whose front.csv would be lost; got {output}"
        )
    output.mkdir(parents=True, exist_ok=True)
    policy = load_policy(config)
    for checkpoint in policies:
        policy.check_same_model(checkpoint)
    _, evaluator = prepare(config, policy)
    points: list[FrontPoint] = []
    with Display(config, enabled=progress) as display:
        for checkpoint in policies:
            policy.load_weights(checkpoint)
            points += sweep(evaluator, config.sweep, str(checkpoint), display.point)
            write_front(output / "front.csv", points)
        plot_front(output / "front.png", points)
        display.finished(points, f"front.csv and front.png are in {output}")
    return points
