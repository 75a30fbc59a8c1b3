"""The output as a whole: atomic, loadable, complete, reported, in bounded memory."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from warp_fast.merge import CheckpointError, MergeReport, mapped, merge_checkpoints, steps, write

pytestmark = pytest.mark.filterwarnings("ignore:.*zero, parallel:UserWarning")


def _saved(checkpoints: Any, family: Any, runs: int = 2) -> tuple[Path, list[Path]]:
    init, policies = family(runs, [torch.float32, torch.bfloat16])
    return checkpoints.save("init", init, config={"dtype": "float32"}), [
        checkpoints.save(f"policy-{m}", policy) for m, policy in enumerate(policies)
    ]


def _names(root: Path) -> set[str]:
    return {p.name for p in root.iterdir()}


_KILLED = """
import os, signal, sys
from warp_fast.merge import merge_checkpoints, steps, stream
steps.TILE_BYTES = 500
apply, calls = stream.Merger._apply, []
def killed(self, *arguments):
    apply(self, *arguments)
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
stream.Merger._apply = killed
merge_checkpoints(sys.argv[1], sys.argv[2:4], sys.argv[4], eta=[0.5, 1.0], progress=False)
"""


def test_a_tilde_is_the_home(
    checkpoints: Any, family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves one alone that comes after an equals sign."""
    start, ends = _saved(checkpoints, family)
    root = checkpoints.root
    monkeypatch.setenv("HOME", str(root))
    init, *policies = ("~" / path.relative_to(root) for path in (start, *ends))
    merge_checkpoints(init, [str(policy) for policy in policies], "~/merged", progress=False)
    assert (root / "merged" / "model.safetensors").exists()


def test_killed_merge_leaves_nothing_that_looks_complete(checkpoints: Any, family: Any) -> None:
    start, ends = _saved(checkpoints, family)
    output = checkpoints.root / "out"
    words = [sys.executable, "-c", _KILLED, *map(str, (start, *ends, output))]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    left = _names(checkpoints.root) - {"init", "policy-0", "policy-1"}
    assert left == {".out.partial"}
    report = merge_checkpoints(start, ends, output, eta=[0.5, 1.0], progress=False)
    assert _names(checkpoints.root) == {"init", "policy-0", "policy-1", "out"}
    assert _names(output) == {"eta-0.5", "eta-1"}
    assert all((path / "model.safetensors").is_file() for path in report.outputs)


def test_full_disk_leaves_nothing(
    checkpoints: Any, family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, ends = _saved(checkpoints, family)
    before = _names(checkpoints.root)
    pwrite, calls = os.pwrite, []

    def full(handle: int, content: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(handle, content, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"No space left on device: .*model\.safetensors"):
        merge_checkpoints(start, ends, checkpoints.root / "out", progress=False)
    assert _names(checkpoints.root) == before


@pytest.mark.parametrize("at_the_end", [False, True])
def test_failure_of_a_sync_in_the_background_is_told(
    at_the_end: bool, checkpoints: Any, family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells it to one call only; a sync at the end would find nothing wrong."""
    start, ends = _saved(checkpoints, family)
    merge_checkpoints(start, ends, checkpoints.root / "good", progress=False)
    content = (checkpoints.root / "good" / "model.safetensors").read_bytes()
    weights = len(content) - 8 - int.from_bytes(content[:8], "little")
    before = _names(checkpoints.root)
    monkeypatch.setattr(steps, "TILE_BYTES", 500)
    monkeypatch.setattr(write, "_BEHIND", weights if at_the_end else 1)
    fsync, calls = os.fsync, []

    def broken(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=r"Input/output error: .*model\.safetensors"):
        merge_checkpoints(start, ends, checkpoints.root / "out", progress=False)
    assert _names(checkpoints.root) == before


def test_a_warning_that_is_an_error_leaves_nothing(checkpoints: Any, family: Any) -> None:
    start, ends = _saved(checkpoints, family)
    before = _names(checkpoints.root)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="merged linearly"):
        warnings.simplefilter("error")
        merge_checkpoints(start, ends[:1] * 2, checkpoints.root / "new" / "out", progress=False)
    assert _names(checkpoints.root) == before


def test_file_size_limit_is_met_before_any_work(checkpoints: Any, family: Any) -> None:
    start, ends = _saved(checkpoints, family)
    before = _names(checkpoints.root)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*model\.safetensors"):
            merge_checkpoints(start, ends, checkpoints.root / "out", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _names(checkpoints.root) == before


def test_short_writes_are_continued(
    checkpoints: Any, family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, ends = _saved(checkpoints, family)
    merge_checkpoints(start, ends, checkpoints.root / "whole", progress=False)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, content, at: pwrite(handle, content[:7], at))
    merge_checkpoints(start, ends, checkpoints.root / "parts", progress=False)
    contents = [
        (checkpoints.root / n / "model.safetensors").read_bytes() for n in ("whole", "parts")
    ]
    assert contents[0] == contents[1]


def test_inputs_are_not_changed(checkpoints: Any, family: Any) -> None:
    """A merge into init would make every later eta a no-op."""
    start, ends = _saved(checkpoints, family)
    files = [path / "model.safetensors" for path in (start, *ends)]
    before = [file.read_bytes() for file in files]
    merge_checkpoints(start, ends, checkpoints.root / "out", eta=0.3, progress=False)
    assert [file.read_bytes() for file in files] == before


def test_dry_run_writes_nothing(
    checkpoints: Any, family: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    start, ends = _saved(checkpoints, family)
    before = _names(checkpoints.root)
    report = merge_checkpoints(start, ends, checkpoints.root / "out", eta=[0.3, 1], dry_run=True)
    assert _names(checkpoints.root) == before
    text = capsys.readouterr().out
    for part in ("slerp of 2 policies per block, eta 0.3, 1", "13 tensors in 7 segments", "writes",
                 "out/eta-0.3/model.safetensors", "policy 2 ("):  # fmt: skip
        assert part in text, part
    assert len(report.segments) == 7
    assert report.angles.isnan().all()
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("tied", [True, False])
def test_dry_run_says_that_a_head_is_tied_where_it_is(
    checkpoints: Any, family: Any, capsys: pytest.CaptureFixture[str], tied: bool
) -> None:
    init, (policy,) = family(1, [torch.float32])
    start = checkpoints.save("init", init, config={"tie_word_embeddings": tied})
    end = checkpoints.save("policy", policy)
    merge_checkpoints(start, [end], checkpoints.root / "out", dry_run=True)
    line = "tied to the embedding, not written: lm_head.weight"
    assert (line in capsys.readouterr().out) == tied


def test_integer_buffers_come_from_init(checkpoints: Any) -> None:
    paths = []
    for i in range(3):
        weights = {"w": torch.randn(5), "ids": torch.arange(3), "mask": torch.tensor([True])}
        weights["none"] = torch.zeros(0, dtype=torch.int32)
        paths.append(checkpoints.save(str(i), weights))
    report = merge_checkpoints(paths[0], paths[1:], checkpoints.root / "out", progress=False)
    assert sorted(report.copied) == report.to_dict()["copied"] == ["ids", "mask", "none"]
    merged = checkpoints.load(checkpoints.root / "out")
    assert torch.equal(merged["ids"], torch.arange(3))
    assert merged["mask"].tolist() == [True]


@pytest.mark.parametrize("stored_in", [(0,), (1,), (0, 1, 2)], ids=["init", "policy", "all"])
def test_tied_head_is_never_written(checkpoints: Any, stored_in: tuple[int, ...]) -> None:
    paths = []
    for i in range(3):
        weights = {
            "model.embed_tokens.weight": torch.randn(5, 4),
            "model.norm.weight": torch.ones(3),
        }
        if i in stored_in:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        config = {"model_type": "gemma2", "tie_word_embeddings": True}
        paths.append(checkpoints.save(str(i), weights, config=config))
    merge_checkpoints(paths[0], paths[1:], checkpoints.root / "out", progress=False)
    merged = checkpoints.load(checkpoints.root / "out")
    assert sorted(merged) == ["model.embed_tokens.weight", "model.norm.weight"]


def test_untied_head_is_merged(checkpoints: Any) -> None:
    paths = []
    for i in range(3):
        weights = {n: torch.randn(5, 4) for n in ("model.embed_tokens.weight", "lm_head.weight")}
        paths.append(checkpoints.save(str(i), weights, config={"tie_word_embeddings": False}))
    report = merge_checkpoints(paths[0], paths[1:], checkpoints.root / "out", progress=False)
    assert report.segments == ["lm_head.weight", "model.embed_tokens.weight"]
    assert "lm_head.weight" in checkpoints.load(checkpoints.root / "out")


def test_other_files_are_carried_over(checkpoints: Any, family: Any) -> None:
    start, ends = _saved(checkpoints, family)
    nested = {"torch_dtype": "float32", "text_config": {"dtype": "float32", "vocab_size": 97}}
    (start / "config.json").write_text(json.dumps(nested))
    carried = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt",
               "tokenizer.model", "special_tokens_map.json", "chat_template.jinja",
               "cl100k.tiktoken", "tekken.json", "spm.vocab", "video_preprocessor_config.json",
               "modeling_ours.py"]  # fmt: skip
    (start / "additional_chat_templates").mkdir()
    (start / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    for name in [*carried, "optimizer.pt", "notes.txt"]:
        (start / name).write_text(name)
    output = checkpoints.root / "out"
    merge_checkpoints(start, ends, output, dtype="bfloat16", progress=False)
    made = {
        "model.safetensors",
        "config.json",
        "README.md",
        "merge_report.json",
        "merge_angles.png",
    }
    assert _names(output) == {*carried, "additional_chat_templates", *made}
    assert (output / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    config = json.loads((output / "config.json").read_text())
    assert config["torch_dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert config["text_config"]["vocab_size"] == 97


def test_a_directory_that_two_patterns_name_is_carried_once(checkpoints: Any, family: Any) -> None:
    start, ends = _saved(checkpoints, family)
    (start / "tokenizer.model").mkdir()
    (start / "tokenizer.model" / "pieces").write_text("x")
    merge_checkpoints(start, ends, checkpoints.root / "out", progress=False)
    assert (checkpoints.root / "out" / "tokenizer.model" / "pieces").read_text() == "x"


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates/tool.jinja"])
def test_broken_link_is_found_before_data_is_read(
    checkpoints: Any, family: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    start, ends = _saved(checkpoints, family)
    link = start / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to("gone")
    monkeypatch.setattr(mapped.MappedFiles, "__init__", lambda *_: pytest.fail("data was mapped"))
    with pytest.raises(CheckpointError, match=f"init .*: {name} must be readable.*broken link"):
        merge_checkpoints(start, ends, checkpoints.root / "out", progress=False)


def test_dry_run_says_what_is_carried_over(
    checkpoints: Any, family: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    start, ends = _saved(checkpoints, family)
    (start / "tekken.json").write_text("{}")
    merge_checkpoints(start, ends, checkpoints.root / "out", dry_run=True)
    shown = capsys.readouterr().out
    assert "carried over from init: config.json, tekken.json\n" in shown
    assert "no config.json" not in shown
    (start / "config.json").rename(ends[1] / "config.json")
    merge_checkpoints(start, ends, checkpoints.root / "out", dry_run=True)
    shown = capsys.readouterr().out
    assert "carried over from init: tekken.json\n" in shown
    assert "no config.json in init, so none in the output; copy that of policy 2 (" in shown


def test_a_merge_where_tensors_are_made_elsewhere(checkpoints: Any, family: Any) -> None:
    start, ends = _saved(checkpoints, family)
    outputs = [checkpoints.root / name for name in ("here", "elsewhere")]
    merge_checkpoints(start, ends, outputs[0], progress=False)
    with torch.device("meta"):
        merge_checkpoints(start, ends, outputs[1], progress=False)
    merged = [(path / "model.safetensors").read_bytes() for path in outputs]
    assert merged[0] == merged[1]


@pytest.mark.parametrize("runs", [1, 3])
def test_report(checkpoints: Any, family: Any, runs: int) -> None:
    start, ends = _saved(checkpoints, family, runs)
    output = checkpoints.root / "out"
    report = merge_checkpoints(start, ends, output, eta=0.5, progress=False)
    assert isinstance(report, MergeReport)
    written = json.loads((output / "merge_report.json").read_text())
    assert written == report.to_dict()
    assert [s["name"] for s in written["segments"]] == report.segments
    assert report.segments[1:4] == ["model.layers.0", "model.layers.2", "model.layers.10"]
    for segment in written["segments"]:
        assert len(segment["angles"]) == runs * (runs - 1) // 2
        assert len(segment["norms"]) == len(segment["coefficients"]) == runs
        assert segment["norm_ratios"][0] == 1.0
    assert (output / "merge_angles.png").read_bytes()[:4] == b"\x89PNG"
    card = (output / "README.md").read_text()
    assert "--eta 0.5" in card
    assert f"policy {runs}: `{ends[-1]}`" in card
    assert "| model.layers.10 |" in card


def test_a_dollar_in_a_name_is_no_formula(checkpoints: Any) -> None:
    names = [r"a$\frac$.x", r"a$\frac$.$\frac$"]
    paths = [checkpoints.save(str(m), {n: torch.randn(4) for n in names}) for m in range(3)]
    report = merge_checkpoints(paths[0], paths[1:], checkpoints.root / "out", progress=False)
    assert sorted(report.segments) == sorted(names)


def test_undefined_angles_are_left_out_of_the_report(checkpoints: Any) -> None:
    init = checkpoints.save("init", {"w": torch.ones(4)})
    moved = checkpoints.save("moved", {"w": torch.ones(4) + torch.tensor([1.0, 0, 0, 0])})
    other = checkpoints.save("other", {"w": torch.ones(4) + torch.tensor([0, 1.0, 0, 0])})
    report = merge_checkpoints(init, [init, moved, other], checkpoints.root / "out", progress=False)
    segment = report.to_dict()["segments"][0]
    assert segment["pairs"] == [[2, 3]]
    assert segment["angles"] == pytest.approx([90.0])
    assert segment["norm_ratios"] == [None, None, None]


def test_orthogonal_policies_have_the_coefficients_of_the_recursion(checkpoints: Any) -> None:
    paths = [checkpoints.save("init", {"w": torch.zeros(5)})]
    paths += [checkpoints.save(str(m), {"w": torch.eye(5)[m]}) for m in range(5)]
    for runs, expected in ((2, [0.7071, 0.7071]), (3, [0.6124, 0.6124, 0.5]),
                           (5, [0.5381, 0.5381, 0.4393, 0.364, 0.309])):  # fmt: skip
        output = checkpoints.root / f"out-{runs}"
        report = merge_checkpoints(paths[0], paths[1 : 1 + runs], output, progress=False)
        assert report.coefficients[0].tolist() == pytest.approx(expected, abs=1e-4)
        assert float(report.merged_norms[0]) == pytest.approx(1.0)


def test_progress_goes_to_standard_error(
    checkpoints: Any, family: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    start, ends = _saved(checkpoints, family)
    merge_checkpoints(start, ends, checkpoints.root / "shown")
    shown = capsys.readouterr()
    assert "merging" in shown.err
    assert shown.out == ""
    merge_checkpoints(start, ends, checkpoints.root / "silent", progress=False)
    assert capsys.readouterr() == ("", "")


_MEMORY = """
import resource, sys
import matplotlib.figure
from warp_fast.merge import merge_checkpoints, steps
from warp_fast.reference import slerp
steps.TILE_BYTES = 4 << 20
merge_checkpoints(*sys.argv[1:2], sys.argv[2:4], sys.argv[4], progress=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_checkpoints(sys.argv[5], sys.argv[6:8], sys.argv[8], granularity="model", progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_bounded(checkpoints: Any) -> None:
    """144 MB in tensors of 24 MB, after a small merge that loads all code."""
    words = [sys.executable, "-c", _MEMORY]
    for size in (1 << 16, 12_000_000):
        for m in range(3):
            # bit patterns of small positive bf16 numbers
            bits = torch.randint(15000, 16000, (size,), dtype=torch.int16)
            weights = {"a": bits.view(torch.bfloat16), "b": (bits + 1).view(torch.bfloat16)}
            words.append(str(checkpoints.save(f"{size}-{m}", weights)))
        words.append(str(checkpoints.root / f"out-{size}"))
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    grown = int(done.stdout) << 10
    assert grown < 48 << 20, f"{grown >> 20} MiB"
