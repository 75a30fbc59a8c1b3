"""Every file in examples/ runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.rl import models
from warp_fast import cli

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_every_example_is_run_here() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert names == {"gemma-2-2b.yaml", "reward.py", "your_own_loop.py"}


def test_your_own_loop_learns() -> None:
    first, last = runpy.run_path(str(EXAMPLES / "your_own_loop.py"))["main"]()
    assert last > first + 0.1


def test_config_trains_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    small = {
        "policy": models.save(tmp_path / "sft", "gemma2"),
        "prompts": models.write_prompts(tmp_path / "prompts.txt"),
        "output": tmp_path / "out",
        "iterations": 1,
        "runs": 1,
        "steps": 2,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_new_tokens": 3,
        "eval_samples": 4,
    }
    options = [f"--{name}={value}" for name, value in small.items()]
    assert cli.main(["train", "--config", "examples/gemma-2-2b.yaml", *options]) == 0
    assert (tmp_path / "out" / "policy" / "model.safetensors").exists()
