"""The benchmarks: no number on red, all in turn, results on disk; quick paths on tiny sizes."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import (
    bench_ema,
    bench_logits,
    bench_loss,
    bench_merge,
    bench_slerp,
    peers,
    peers_loss,
    roofline,
)
from bench.checkpoints import Model
from bench.harness import (
    Absent,
    Clock,
    Provider,
    Scale,
    backends,
    gate,
    measure,
    parse,
    relative_error,
)
from bench.loss_accuracy import accuracy
from bench.report import Group, environment, floor_seconds, publish, rows, show, stem, write
from warp_fast import cli, slerp

_TINY = Scale(rounds=2, probe_bytes=1 << 12, budget=1.0)
_CPU = torch.device("cpu")


def _provider(name: str, calls: list[str], error: float = 0.0) -> Provider:
    return Provider(name, lambda: calls.append(name), lambda: error, 1e-3, 10, 1000)


def _raises() -> float:
    raise TypeError("end must be float\nand more")


def _asserts() -> float:
    raise AssertionError


def test_a_wrong_provider_gets_no_time() -> None:
    calls: list[str] = []
    right, wrong = _provider("right", calls), _provider("wrong", calls, error=0.5)
    nan, raising = _provider("nan", calls, error=float("nan")), _provider("raises", calls)
    raising.error = _raises
    silent = _provider("asserts", calls)
    silent.error = _asserts
    everyone = [right, wrong, nan, raising, silent]
    results = {r.provider.name: r for r in measure(everyone, _CPU, _TINY)}
    assert set(calls) == {"right"}
    assert len(results["right"].seconds) == _TINY.rounds
    for name in ("wrong", "nan", "raises", "asserts"):
        assert results[name].seconds == []
        assert results[name].refused
    assert results["raises"].refused == "TypeError: end must be float"


def test_providers_take_turns() -> None:
    calls: list[str] = []
    providers = [_provider(name, calls) for name in "abc"]
    measure(providers, _CPU, Scale(rounds=6, probe_bytes=1 << 12))
    timed = calls[6:]  # each ran twice before: to warm up, and for its memory
    assert [sorted(timed[i : i + 3]) for i in range(0, 18, 3)] == [["a", "b", "c"]] * 6
    assert {timed[i] for i in range(0, 18, 3)} == {"a", "b", "c"}, "the first one changes"


def test_a_slow_provider_sits_out_after_three_rounds() -> None:
    calls: list[str] = []
    results = measure([_provider("slow", calls)], _CPU, Scale(9, 1 << 12, budget=0.0))
    assert len(results[-1].seconds) == 3


def test_a_provider_without_memory_is_refused_and_the_others_go_on() -> None:
    def starve() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    calls: list[str] = []
    starved = _provider("starved", calls)
    starved.run = starve
    *_, first, second = measure([starved, _provider("fed", calls)], _CPU, _TINY)
    assert first.refused == "out of memory" and not first.seconds
    assert len(second.seconds) == _TINY.rounds


def test_prepare_runs_before_every_run() -> None:
    calls: list[str] = []
    provider = _provider("run", calls)
    provider.prepare = lambda: calls.append("prepare")
    measure([provider], _CPU, _TINY)
    assert calls == ["prepare", "run"] * (len(calls) // 2)


def test_results_are_written(tmp_path: Path) -> None:
    results = measure([_provider("ours", []), _provider("wrong", [], 1.0)], _CPU, _TINY)
    group = Group("a case", results, [Absent("peer", "pip install peer")], "probe: copy", "ours")
    stamp = environment(_CPU)
    table, record = write([group], stamp, "op", tmp_path)
    lines = [line for line in table.read_text().splitlines() if not line.startswith("#")]
    found = {line["provider"]: line for line in csv.DictReader(lines)}
    assert found["ours"]["times base"] == "1.00"
    assert float(found["ours"]["GB/s"]) > 0
    assert found["wrong"]["ns/elem"] == ""
    assert found["wrong"]["ms"].startswith("wrong: error 1")
    assert found["peer"]["ms"] == "absent: pip install peer"
    content = json.loads(record.read_text())
    assert content["environment"] == stamp
    assert len(content["seconds"]["a case"]["ours"]) == _TINY.rounds
    assert {"machine", "torch", "commit", "date"} <= stamp.keys()


def test_refusals_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    results = measure([_provider("wrong", [], 1.0)], _CPU, _TINY)
    show(Group("a case", results, [Absent("peer", "pip install peer")], "", ""), Console(width=150))
    printed = capsys.readouterr().out
    assert "wrong: wrong: error 1, allowed 0.001" in printed
    assert "peer: absent: pip install peer" in printed
    assert "probe: update" in printed


def test_a_table_is_printed_once_it_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def groups() -> Iterator[Group]:
        yield Group("the first case", measure([_provider("ours", [])], _CPU, _TINY), [], "", "")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish("op", groups(), {}, parse("", ["--output", str(tmp_path)]))
    assert "the first case" in capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "half of the results looks like all of them"


def test_the_command_prints_and_draws_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["bench", "--device", "cpu", "--output", str(tmp_path)]
    assert cli.main(asked) == 1
    assert "name what to run" in capsys.readouterr().err
    group = bench_slerp.compare(2, torch.float32, [(64, 48)], _CPU, _TINY)
    write([group], environment(_CPU), stem("slerp", _CPU, quick=False), tmp_path)
    assert cli.main(asked) == 0
    printed = capsys.readouterr().out
    assert group.title in printed and bench_slerp.IN_PLACE in printed
    picture = (tmp_path / stem("roofline", _CPU, quick=False)).with_suffix(".png")
    assert picture.read_bytes()[:4] == b"\x89PNG" and str(picture) in printed
    assert cli.main(["bench", "emma"]) == 2
    assert "'emma' is none of ema, slerp, merge, loss" in capsys.readouterr().err


def test_a_point_of_the_roofline_is_held_to_the_roofs_of_its_own_run(tmp_path: Path) -> None:
    def case(name: str, slower: float) -> list[dict[str, object]]:
        work = {"probe: update": (0, 10.0), "probe: matmul": (90.0, 1.0), "warp_fast": (8.0, 4.0)}
        common = {"case": name, "seconds": 2.0 * slower}
        return [
            {**common, "provider": n, "ours": n == "warp_fast", "flops": f, "bytes": b}
            for n, (f, b) in work.items()
        ]

    record = tmp_path / "loss-some-machine.json"
    points = case("quiet", 1) + case("busy", 3)
    record.write_text(json.dumps({"environment": {"machine": "M"}, "points": points}))
    found = roofline.read([record])
    assert (found.machine, found.bandwidth, found.peak) == ("M", 10 / 3, 30.0)
    assert [(p.op, p.ours, p.intensity) for p in found.points] == [("loss", True, 2.0)] * 2
    # 4 flops per second where memory allows 2 flops per byte * 5 bytes per second
    assert [p.share for p in found.points] == pytest.approx([0.4, 0.4])


def test_quick_results_are_told_apart() -> None:
    assert stem("ema", _CPU, quick=True) == stem("ema", _CPU, quick=False) + "-quick"


def _complete(group: Group, ours: int) -> None:
    """Our providers passed their gates; the torch peers too."""
    refused = [(r.provider.name, r.refused) for r in group.results if r.refused]
    assert not refused
    assert sum(result.provider.ours for result in group.results) == ours
    assert group.find(group.stream) and group.find(group.base)
    assert all(line.keys() == rows(group)[0].keys() for line in rows(group))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ema_quick_path(dtype: torch.dtype) -> None:
    group = bench_ema.compare(dtype, bench_ema.GATE, _CPU, _TINY, steps=20)
    _complete(group, 3 if dtype == torch.bfloat16 else 2)


def test_a_bf16_average_stalls_and_ours_does_not() -> None:
    able, _ = bench_ema.takers(torch.bfloat16)
    shares = bench_ema.captured(able, torch.bfloat16, steps=1000, weights=2048)
    assert shares["warp_fast split, float32"] == pytest.approx(1.0, abs=1e-3)
    assert shares["warp_fast stochastic, bfloat16"] == pytest.approx(1.0, abs=0.1)
    assert shares["torch _foreach_lerp_, bfloat16"] < 0.2


def test_a_wrong_rate_fails_the_gate_of_the_ema() -> None:
    peer = peers.AveragePeer(
        "wrong", torch.bfloat16, (torch.bfloat16,), lambda p, r: bench_ema.OURS[2].make(p, 1 - r)
    )
    params = [torch.zeros(8, dtype=torch.bfloat16)]
    assert gate(bench_ema.provider(peer, params)).refused


@pytest.mark.parametrize(("runs", "dtype"), bench_slerp.CASES)
def test_slerp_quick_path(runs: int, dtype: torch.dtype) -> None:
    _complete(bench_slerp.compare(runs, dtype, [(64, 48), (7,)], _CPU, _TINY), 3)


def test_raw_slerp_is_off_warp() -> None:
    small = bench_slerp.family(bench_slerp.GATE, 2, torch.float32, _CPU)
    raw = bench_slerp.merge_all(
        peers.MergePeer("raw", peers.raw_target, peers.raw_target, 2), *small
    )
    assert bench_slerp.task_error(raw, *small) == pytest.approx(0.29, abs=0.02)


def test_the_peer_in_torch_is_the_reference() -> None:
    init, policies = bench_slerp.family([(33, 5)], 4, torch.float64, _CPU)
    recursion = peers.warp_slerp(init[0], [policy[0] for policy in policies])
    ours = slerp(init, policies, backend="reference")
    assert relative_error(ours, [recursion]) < 1e-14


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers of torch alone, none of them compiled."""
    monkeypatch.setattr(peers_loss, "missing", lambda package: f"pip install {package}")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("masked", [0.0, 0.5])
def test_loss_quick_path(no_packages: None, masked: float) -> None:
    group = bench_loss.compare(bench_loss.Case(64, 16, 300, masked), _CPU, _TINY)
    # every backend but the reference with low_memory as well
    _complete(group, 2 * len(backends("linear_loss", _CPU)) - 1)
    packages = {absent.install.rpartition(" ")[2] for absent in group.absent}
    assert packages >= {"trl", "verl", "liger-kernel", "cut-cross-entropy"}
    lines = {line["provider"]: line for line in rows(group)}
    assert lines["probe: matmul"]["of floor"] == "1.00"
    for result in group.results:
        if result.provider.returned:
            line = lines[result.provider.name]
            assert float(line["work MiB"]) <= float(line["peak MiB"]) and line["of floor"]


@pytest.mark.parametrize("kl", bench_logits.KLS)
def test_logits_quick_path(no_packages: None, monkeypatch: pytest.MonkeyPatch, kl: str) -> None:
    monkeypatch.setattr(bench_logits, "missing", lambda package: f"pip install {package}")
    group = bench_logits.compare(bench_logits.Case(kl, 64, 300), _CPU, _TINY)
    _complete(group, 2 * len(backends("loss", _CPU)))
    assert [absent.install for absent in group.absent] == ["pip install trl"]


@pytest.mark.parametrize("changed", ["advantages", "anchor", "token_ids"])
@pytest.mark.parametrize("kl", bench_logits.KLS)
def test_another_loss_fails_the_gate_of_the_logits(kl: str, changed: str) -> None:
    def wrong(logits: torch.Tensor, batch: bench_logits.Batch) -> torch.Tensor:
        other: dict[str, Any] = {"advantages": -batch.advantages, "anchor": batch.start}
        other["token_ids"] = batch.token_ids.roll(1)
        return bench_logits.warp(logits, dataclasses.replace(batch, **{changed: other[changed]}))

    case = bench_logits.Case(kl, *bench_logits.GATE)
    batch = bench_logits.batch_of(*case, _CPU)
    refused = [
        gate(bench_logits.provider("a loss", loss, case, batch)).refused
        for loss in (wrong, bench_logits.warp)
    ]
    assert refused[0] and not refused[1]


def test_the_floor_of_two_passes_is_that_of_the_probes() -> None:
    results = measure([_provider("passes", [])], _CPU, _TINY)
    passes = results[-1].provider
    passes.bytes, passes.read_bytes = 300, 100
    group = Group("a case", results, [], "probe: update", "passes")
    read, copy = group.find("probe: read"), group.find("probe: copy")
    assert read and copy
    expected = 100 / read.bandwidth + 200 / copy.bandwidth
    assert floor_seconds(group, passes) == pytest.approx(expected)
    assert rows(group)[-1]["of floor"]


def test_the_floor_counts_the_rows_inside_the_mask() -> None:
    case = bench_loss.Case(64, 16, 300, 0.5)
    batch = bench_loss.batch_of(case, _CPU, torch.float32)
    assert bench_loss.loss_flops(case, batch) == 8 * int(batch.mask.sum()) * 16 * 300


@pytest.mark.parametrize("changed", ["advantages", "anchor_hidden", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_loss_fails_the_gate_of_the_loss(changed: str, dtype: torch.dtype) -> None:
    def wrong(batch: peers_loss.Batch) -> torch.Tensor:
        other = {"advantages": -batch.advantages, "mask": torch.ones_like(batch.mask)}
        other["anchor_hidden"] = batch.hidden.detach()
        return bench_loss.warp(dataclasses.replace(batch, **{changed: other[changed]}))

    batch = bench_loss.batch_of(bench_loss.GATE, _CPU, dtype)
    refused = [
        gate(bench_loss.provider("a loss", loss, bench_loss.GATE, batch)).refused
        for loss in (wrong, bench_loss.warp)
    ]
    assert refused[0] and not refused[1]


def test_bf16_logits_are_noise_near_the_anchor(
    no_packages: None, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = list(accuracy(_CPU, backends("linear_loss", _CPU)))
    for group in groups:
        assert not any(result.refused for result in group.results)
        for result in group.results:
            off = float(result.provider.shown["k2 slope off, %"])
            assert off < 1 if result.provider.ours else off > 20 or "fp32" in result.provider.name
    show(groups[0], Console(width=200))
    assert "torch eager, bf16" in capsys.readouterr().out


def test_merge_quick_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_merge.Bench, "our_command", lambda bench: bench.copy(sync=False))
    monkeypatch.setattr(bench_merge, "mergekit_version", lambda python: None)
    with bench_merge.benched(Model(1, 16, 32, 2, 8, 64), tmp_path) as bench:
        group = bench_merge.compare(bench, "python", Scale(1, 1 << 12))
    _complete(group, 1)
    assert [absent.name for absent in group.absent] == list(bench_merge.MERGEKIT.values())


def test_options() -> None:
    options = parse("", ["--quick", "--rounds", "2", "--device", "cpu"])
    assert options.quick and options.scale.rounds == 2 and options.device == _CPU


def test_a_gpu_is_kept_at_work_until_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that a GPU is not needed for: passes over the cold memory take 1 ms."""
    done: list[str] = []

    class Cold:
        def max(self) -> None:
            done.append("cold")

    clock = Clock(_CPU)
    clock.cuda, clock.cold, clock.pass_seconds = True, Cold(), 1e-3  # type: ignore[assignment]
    monkeypatch.setattr(clock, "_elapsed", lambda run: run() or 0.5)
    assert clock.seconds(lambda: done.append("run"), host_seconds=1.2e-3) == 0.5
    assert done == ["cold"] * 3 + ["run"]
    done.clear()
    clock.chill()
    assert done == ["cold"]


def test_what_the_host_takes_is_a_column_of_its_own() -> None:
    """Where there is a GPU; the time on the device is without it."""
    (*_, result) = measure([_provider("ours", [])], _CPU, _TINY)
    group = Group("a case", [result], [], "", "")
    assert "host ms" not in rows(group)[0]
    result.host_seconds = 2.5e-3
    assert rows(group)[0]["host ms"] == "2.50"


def test_some_cases_do_not_overwrite_the_results_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse("", ["--only", "bfloat16"])
    assert "--only would overwrite the results of all" in capsys.readouterr().err
    assert parse("", ["--only", "bfloat16", "--output", str(tmp_path)]).only == "bfloat16"
