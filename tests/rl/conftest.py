"""Fixtures of the RL tests: one small checkpoint, its prompts, and a config to run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

from tests.rl import models
from warp_fast.rl import WarpConfig

transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("models") / "gemma2", "gemma2")


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.txt")


@pytest.fixture
def make_config(checkpoint: Path, prompts: Path, tmp_path: Path) -> Callable[..., WarpConfig]:
    """A config of a run of seconds; keyword arguments replace its fields."""

    def make(**changed: Any) -> WarpConfig:
        fields: dict[str, Any] = {
            "policy": str(checkpoint),
            "prompts": str(prompts),
            "reward": "tests.rl.models:early_words",
            "output": str(tmp_path / "out"),
            "iterations": 2,
            "runs": 2,
            "steps": 4,
            "ema_rate": 0.1,
            "eta": 0.5,
            "sweep": [0.0, 0.5, 1.0],
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "batch_size": 8,
            "samples_per_prompt": 2,
            "max_new_tokens": 8,
            "eval_samples": 16,
            "save_every": 2,
        }
        return WarpConfig(**{**fields, **changed})

    return make
