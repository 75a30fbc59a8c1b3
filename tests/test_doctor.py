"""`warp-fast doctor` says what works here and why the rest does not."""

from __future__ import annotations

import pytest

from warp_fast import _backend, cli, doctor


def test_every_backend_has_a_line_that_agrees_with_resolve() -> None:
    rows = {row.name: row for row in doctor.report()["backends"]}
    assert list(rows) == list(_backend.BACKENDS)
    assert rows["reference"].works
    for name, reason in _backend.MISSING.items():
        if reason is not None:
            assert not rows[name].works and rows[name].reason == reason


def test_what_auto_takes_is_shown_for_every_op() -> None:
    rows = doctor.report()["what auto takes"]
    assert {row.name.split()[0] for row in rows} == set(_backend.SERVED)


def test_softcap_is_said_where_it_is_lost() -> None:
    reasons = {row.name: row.reason for row in doctor.report()["attention"]}
    assert "no softcap" in reasons["sdpa"]
    assert list(reasons)[-1] == "eager"


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    compiler, nvcc = doctor.report()["to build the extension"]
    assert not compiler.works and "not on the PATH" in compiler.reason
    assert not nvcc.works and "no CUDA kernels" in nvcc.reason


def test_missing_packages_name_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    rows = {row.name: row for row in doctor.report()["packages"]}
    assert rows["flash-attn"].reason == "not installed; pip install 'warp_fast[flash]'"


def test_command_prints_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for title in doctor.report():
        assert f"\n{title}\n" in shown


def test_command_takes_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--what"]) == 2
    assert "usage: warp-fast doctor" in capsys.readouterr().out
