"""WarpConfig as it is made in Python: paths, and what is refused before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from warp_fast.rl import WarpConfig

MakeConfig = Callable[..., WarpConfig]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("merge", "mean", "merge must be one of slerp, lerp; got 'mean'"),
        ("granularity", "layer", "granularity must be one of tensor, block, model; got 'layer'"),
        ("kl", None, "kl must be one of reward, .*, none; got None"),
        ("baseline", "mean", "baseline must be one of"),
        ("compute_dtype", "bf16", "compute_dtype must be one of auto, float32, bfloat16"),
        ("anchor_storage", ["fp32"], "anchor_storage must be one of"),
        ("reward", len, "reward must be a string; got <built-in function len>"),
        ("eta", 0.9999999, "eta must be 1 or differ from it in six digits; got 0.9999999"),
    ],
)
def test_refuses(make_config: MakeConfig, field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**{field: value})


def test_paths_are_taken_as_text(
    make_config: MakeConfig, checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    given = {"policy": checkpoint, "prompts": prompts, "output": tmp_path, "reward": checkpoint}
    assert make_config(**given, eval_prompts=prompts) == make_config(
        **{name: str(path) for name, path in given.items()}, eval_prompts=str(prompts)
    )
