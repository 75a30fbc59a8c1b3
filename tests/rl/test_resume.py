"""kill -9 at any point of a WARP run, start again: it ends with the same bits."""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.rl import killed
from warp_fast.rl import WarpConfig

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.rl.killed"])


@pytest.fixture
def fields(make_config: Callable[..., WarpConfig]) -> dict[str, Any]:
    """Two iterations of two runs in as little work as has every stage."""
    small = {
        "steps": 4,
        "batch_size": 4,
        "max_new_tokens": 3,
        "eval_samples": 4,
        "sweep": [0.5, 1.0],
    }
    return make_config(**small).to_dict()


def run_process(fields: dict[str, Any], point: str | None = None, call: int = 1) -> int | None:
    process = SERVER.Process(target=killed.run, args=(fields, point, call))
    process.start()
    process.join(120)
    return process.exitcode


def results(output: Path) -> dict[str, Any]:
    """What a run leaves behind, less its wall-clock times and its own path."""
    found: dict[str, Any] = {}
    for path in sorted(output.rglob("*")):
        name = str(path.relative_to(output))
        if not path.is_file() or name == ".lock":
            continue
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.open()]
            found[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        elif path.suffix in (".yaml", ".md", ".json"):
            found[name] = path.read_text().replace(str(output), "OUTPUT")
        else:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"output": tmp_path_factory.mktemp("whole") / "out"}


def expected(uninterrupted: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The results of a run that nobody killed, made once."""
    if "results" not in uninterrupted:
        output = uninterrupted["output"]
        assert run_process({**fields, "output": str(output)}) == 0
        uninterrupted["results"] = results(output)
    found: dict[str, Any] = uninterrupted["results"]
    return found


@pytest.mark.parametrize(
    ("point", "call"),
    [
        ("step", 1),
        ("step", 4),  # after a checkpoint, with a step logged beyond it
        ("step", 7),  # in the second run
        ("checkpoint-half-written", 1),
        ("checkpoint-half-written", 3),
        ("checkpoint-before-rename", 4),
        ("policy-half-written", 2),  # the policy of a run is there, its checkpoint too
        ("merge", 1),
        ("merge", 2),
        ("merged", 1),
        ("sweep", 2),
        ("front", 1),
        ("report", 1),
    ],
)
def test_killed_and_started_again(
    fields: dict[str, Any],
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    point: str,
    call: int,
) -> None:
    whole = expected(uninterrupted, fields)
    assert run_process(fields, point, call) == -signal.SIGKILL
    assert run_process(fields) == 0
    again = results(tmp_path / "out")
    assert again.keys() == whole.keys()
    assert [name for name in whole if whole[name] != again[name]] == []


def test_killed_three_times(
    fields: dict[str, Any], uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    whole = expected(uninterrupted, fields)
    for _ in range(3):
        assert run_process(fields, "step", 4) == -signal.SIGKILL
    assert run_process(fields) == 0
    assert results(tmp_path / "out") == whole


def test_finished_run_started_again_changes_nothing(fields: dict[str, Any], tmp_path: Path) -> None:
    assert run_process(fields) == 0
    before = results(tmp_path / "out")
    assert run_process(fields) == 0
    assert results(tmp_path / "out") == before
