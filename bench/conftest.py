"""What `pytest bench --benchmark-only` needs: the gate before the time, and a place for results."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.harness import RESULTS, Clock, Provider, gate

_ROUNDS = 5
_SLOW = 1.0  # seconds of the gate; such a case is timed once


class _DeviceTimer:
    """Seconds on the clock of the GPU since it was first asked, what the host takes among them."""

    def __init__(self) -> None:
        self.last: Any = None
        self.total = 0.0

    def __call__(self) -> float:
        event: Any = torch.cuda.Event
        now = event(enable_timing=True)
        now.record()
        now.synchronize()
        if self.last is not None:
            self.total += self.last.elapsed_time(now) / 1e3
        self.last = now
        return self.total


_TIMER = _DeviceTimer() if torch.cuda.is_available() else time.perf_counter


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=_TIMER))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """pytest-benchmark writes its JSON to bench/results unless told otherwise."""
    if getattr(session.config.option, "benchmark_json", None) is None:
        RESULTS.mkdir(exist_ok=True)
        session.config.option.benchmark_json = (RESULTS / "pytest-quick.json").open("wb")


@pytest.fixture
def timed(benchmark: Any) -> Callable[[str, Callable[[torch.device], Provider]], None]:
    """timed(group, build) judges the provider that build(device) makes, then times it."""

    def run(group: str, build: Callable[[torch.device], Provider]) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        provider = build(device)
        start = time.perf_counter()
        judged = gate(provider)
        slow = time.perf_counter() - start > _SLOW
        if judged.refused is not None:
            (pytest.fail if provider.ours else pytest.skip)(judged.refused)
        benchmark.group = group
        benchmark.extra_info.update(
            error=judged.error, elements=provider.elements, bytes=provider.bytes
        )
        clock = Clock(device)

        def setup() -> None:
            provider.prepare()
            clock.chill()

        benchmark.pedantic(provider.run, setup=setup, rounds=1 if slow else _ROUNDS)

    return run
