"""A WARP run in a process of its own, killed at a chosen point; run by test_resume.py."""

from __future__ import annotations

import functools
import importlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot
import torch
import torch._dynamo
import transformers.models.gemma2.modeling_gemma2
from transformers.utils import logging

import warp_fast.merge.picture
from warp_fast.rl import WarpConfig, warp

# the fork server of test_resume.py imports this module once, and with it what every run needs
PRELOADED = (matplotlib.pyplot, torch._dynamo, transformers.models.gemma2, warp_fast.merge.picture)

# point -> (where the function lives, its name, whether it runs before the kill)
POINTS: dict[str, tuple[str, str, str]] = {
    "step": ("warp_fast.rl.run", "Run.train_step", "instead"),
    "checkpoint-half-written": ("torch", "save", "torn"),
    "checkpoint-before-rename": ("warp_fast.rl.files", "os.replace", "instead"),
    "policy-half-written": ("warp_fast.rl.policy", "Policy.save", "after"),
    "merge": ("warp_fast.rl.warp", "merge_checkpoints", "inside"),
    "merged": ("warp_fast.rl.warp", "merge_checkpoints", "after"),
    "sweep": ("warp_fast.rl.evaluate", "Evaluator.__call__", "instead"),
    "front": ("warp_fast.rl.warp", "write_front", "after"),
    "report": ("warp_fast.rl.warp", "write_report", "instead"),
}


def die(*_: Any, **__: Any) -> None:
    """What the kernel does to a process out of memory: no handler, no cleanup."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str, call: int) -> None:
    """Make the `call`-th call of a point kill this process."""
    place, name, moment = POINTS[point]
    owner: Any = importlib.import_module(place)
    *path, attribute = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original: Callable[..., Any] = getattr(owner, attribute)
    calls = 0

    @functools.wraps(original)
    def armed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < call:
            return original(*args, **kwargs)
        if moment == "torn":
            Path(args[1]).write_bytes(b"PK half of a checkpoint")
        if moment == "inside":
            os.pwrite = die  # type: ignore[assignment]
        if moment in ("after", "inside"):
            original(*args, **kwargs)
        die()

    setattr(owner, attribute, armed)


def run(fields: dict[str, Any], point: str | None, call: int) -> None:
    """Run WARP in this process; with a point, die there."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    if point is not None:
        arm(point, call)
    warp(WarpConfig(**fields), progress=False)
