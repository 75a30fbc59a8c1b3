"""More shards than a process may have open by default."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

_LIMITED = """
import resource, sys
from warp_fast.merge import layout, merge_checkpoints
layout.MAX_FILE_BYTES = 8
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[1])))
merge_checkpoints(sys.argv[2], sys.argv[3:5], sys.argv[5], eta=[0.5, 1.0], progress=False)
"""


@pytest.fixture
def many(checkpoints: Any) -> list[Path]:
    """theta_init and two policies of 30 shards each."""
    return [
        checkpoints.save(str(m), {str(i): torch.randn(2) for i in range(30)}, shards=30)
        for m in range(3)
    ]


def _merge(limit: int, inputs: list[Path]) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", _LIMITED, str(limit), *map(str, inputs)]
    words.append(str(inputs[0].parent / "out"))
    return subprocess.run(words, check=False, capture_output=True, text=True)


def test_the_limit_is_raised_to_what_a_merge_needs(many: list[Path], checkpoints: Any) -> None:
    done = _merge(400, many)
    assert done.returncode == 0, done.stderr
    for eta in ("0.5", "1"):
        assert len(checkpoints.load(many[0].parent / "out" / f"eta-{eta}")) == 30


def test_more_files_than_can_be_allowed_are_refused_before_the_merge(many: list[Path]) -> None:
    done = _merge(200, many)
    assert "90 files to read and 60 to write, and needs a limit of 2" in done.stderr
    assert "it is 200 at most. Raise it" in done.stderr
    assert {path.name for path in many[0].parent.iterdir()} == {"0", "1", "2"}
