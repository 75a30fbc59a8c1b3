"""What is refused, before any data is read or anything is written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from warp_fast import slerp
from warp_fast.merge import CheckpointError, merge_checkpoints, write
from warp_fast.merge.checkpoint import open_checkpoint, read_header

GEMMA = {"model_type": "gemma2"}


@pytest.fixture
def saved(checkpoints: Any, family: Any) -> tuple[Path, Path]:
    """theta_init and one policy, on disk."""
    init, policies = family(1, [torch.float32])
    return checkpoints.save("init", init), checkpoints.save("policy", policies[0])


def _refused(
    init: Path, policy: Path, match: str, error: type[Exception] = CheckpointError
) -> None:
    output = init.parent / "out"
    with pytest.raises(error, match=match):
        merge_checkpoints(init, [policy], output, progress=False)
    assert sorted(p.name for p in init.parent.iterdir() if "out" in p.name) == []


@pytest.mark.parametrize(
    ("argument", "value", "match"),
    [
        ("policies", [], "at least one"),
        ("policies", "policy", "list of at least one"),
        ("policies", 3, "list of at least one directory; got 3"),
        ("eta", float("nan"), r"eta must be in \[0, 2\]"),
        ("eta", -0.1, r"eta must be in \[0, 2\]"),
        ("eta", [0.5, 2.1], r"eta must be in \[0, 2\]"),
        ("eta", [], r"eta must be in \[0, 2\]"),
        ("eta", [0.5, 0.5], "given once"),
        ("eta", [0.0, -0.0], "given once"),
        ("method", "ties", "method must be one of slerp, lerp; got 'ties'"),
        ("granularity", "layer", "granularity must be one of"),
        ("dtype", "int8", "dtype must be one of"),
        ("backend", "none", "backend must be"),
    ],
)
def test_arguments(saved: tuple[Path, Path], argument: str, value: Any, match: str) -> None:
    arguments: dict[str, Any] = {"init": saved[0], "policies": [saved[1]], "progress": False}
    arguments["output"] = saved[0].parent / "out"
    with pytest.raises(ValueError, match=match):
        merge_checkpoints(**arguments | {argument: value})
    assert {p.name for p in saved[0].parent.iterdir()} == {"init", "policy"}


ONE_ETA = [np.float32(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2), [0.5]]
TWO_ETAS = [(0.5, 1), np.array([0.5, 1.0]), torch.tensor([0.5, 1.0]), iter([0.5, 1.0])]


@pytest.mark.parametrize("eta", ONE_ETA + TWO_ETAS, ids=lambda eta: type(eta).__name__)
def test_eta_is_any_real_number_or_several(saved: tuple[Path, Path], eta: Any) -> None:
    expected = [0.5, 1.0] if any(eta is each for each in TWO_ETAS) else [0.5]
    output = saved[0].parent / "out"
    assert merge_checkpoints(saved[0], [saved[1]], output, eta=eta, dry_run=True).etas == expected


@pytest.mark.parametrize("eta", ["0.5", ["0.5"], None, torch.ones(1, 1), np.array(["0.5"])])
def test_eta_that_is_no_number_is_refused(saved: tuple[Path, Path], eta: Any) -> None:
    with pytest.raises(TypeError, match=r"eta must be a number, or a sequence of numbers; got"):
        merge_checkpoints(saved[0], [saved[1]], saved[0].parent / "out", eta=eta)
    weights = torch.ones(2)
    with pytest.raises(TypeError, match=r"eta must be a number, or a sequence of numbers; got"):
        slerp(weights, [weights], eta=eta)


def test_policies_may_be_made_one_by_one(saved: tuple[Path, Path]) -> None:
    policies = (path for path in saved)
    report = merge_checkpoints(saved[0], policies, saved[0].parent / "out", dry_run=True)
    assert report.policies == list(saved)


def _truncate_data(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def _truncate_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def _long_header(path: Path) -> None:
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])


def _bad_json(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"?" + content[9:])


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"1234")


def _edit_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header = change(header) or header
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return edit


def _set(**fields: Any) -> Callable[[Path], None]:
    return _edit_header(lambda header: header["model.norm.weight"].update(fields))


@pytest.mark.parametrize(
    ("corrupt", "match"),
    [
        (_truncate_data, "truncated or corrupt"),
        (_truncate_header, "truncated or corrupt"),
        (_long_header, "truncated or corrupt"),
        (_bad_json, "corrupt header"),
        (_append, "truncated or corrupt"),
        (lambda path: path.write_bytes(b""), "truncated or corrupt: 0 bytes"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com"), "git lfs pull"),
        (_set(dtype=["F32"]), "corrupt header"),
        (_set(shape=[4]), "takes 16 bytes, not 12"),
        (_set(shape=[-3]), "must be counts"),
        (_set(shape=["3"]), "must be counts"),
        (_set(data_offsets=[0, 12]), "corrupt"),
        (_set(data_offsets=[10**9, 10**9 + 12]), "corrupt"),
        (_set(data_offsets=[0]), "corrupt header"),
        (_edit_header(lambda header: [1, 2]), "corrupt header"),
        (_edit_header(lambda header: {"x": 3}), "corrupt header"),
    ],
)
@pytest.mark.parametrize("which", [0, 1], ids=["init", "policy"])
def test_corrupt_file_is_named(
    saved: tuple[Path, Path], which: int, corrupt: Callable[[Path], object], match: str
) -> None:
    corrupt(saved[which] / "model.safetensors")
    _refused(*saved, match=match)
    with pytest.raises(CheckpointError, match=str(saved[which].name)):
        read_header(saved[which] / "model.safetensors")


@pytest.mark.parametrize("code", ["F8_E4M3", "Q4"])
def test_dtype_that_cannot_be_merged_is_not_called_corrupt(
    saved: tuple[Path, Path], code: str
) -> None:
    _set(dtype=code)(saved[1] / "model.safetensors")
    _refused(*saved, match=rf"^(?!.*corrupt).*: model.norm.weight is {code}, which cannot be")


def test_unreadable_directories(saved: tuple[Path, Path], tmp_path: Path) -> None:
    init = saved[0]
    _refused(init, Path("google/gemma-2-2b"), "google/gemma-2-2b is not a directory.*hf download")
    empty = tmp_path / "empty"
    empty.mkdir()
    _refused(init, empty, "policy 1: .*empty holds neither")
    (empty / "pytorch_model.bin").write_bytes(b"")
    _refused(init, empty, "pickled weights only.*save_pretrained")
    (empty / "adapter_model.safetensors").write_bytes(b"")
    _refused(init, empty, "adapter.*merge_and_unload")


def test_index_faults(saved: tuple[Path, Path], checkpoints: Any, family: Any) -> None:
    _, policies = family(1, [torch.float32])
    policy = checkpoints.save("sharded", policies[0], shards=2)
    index = policy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text("{")
    _refused(saved[0], policy, "index.json is not valid JSON")
    index.write_text("{}")
    _refused(saved[0], policy, "no weight_map")
    moved = {**content["weight_map"], "ghost": "model-00001-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": moved}))
    _refused(saved[0], policy, "lacks ghost")
    moved = {k: v for k, v in content["weight_map"].items() if k != "model.norm.weight"}
    index.write_text(json.dumps({"weight_map": moved}))
    _refused(saved[0], policy, "does not list .*model.norm.weight")
    index.write_text(json.dumps(content))
    (policy / "model-00002-of-00002.safetensors").unlink()
    _refused(saved[0], policy, "00002-of-00002.safetensors is missing")


def test_one_file_is_read_before_an_index_as_transformers_does(
    saved: tuple[Path, Path], checkpoints: Any, family: Any
) -> None:
    """A model that is saved again in one file may lie beside the index of its former shards."""
    init, policy = saved
    expected = open_checkpoint(policy, "policy").names
    stale = checkpoints.save("stale", family(1, [torch.float32])[1][0], shards=2)
    shutil.copy(stale / "model.safetensors.index.json", policy)
    assert open_checkpoint(policy, "policy").names == expected
    merge_checkpoints(init, [policy], init.parent / "out", progress=False)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_vocabulary_mismatch_names_both_sizes(checkpoints: Any, name: str) -> None:
    init = checkpoints.save("init", {name: torch.zeros(97, 4)})
    policy = checkpoints.save("policy", {name: torch.zeros(98, 4)})
    _refused(init, policy, f"vocabulary of 98 rows in {name}, but 97 in init")


def test_names_and_shapes(checkpoints: Any) -> None:
    init = checkpoints.save("init", {"a.weight": torch.zeros(2, 3), "b": torch.zeros(2)})
    for name, weights, match in (
        ("lacks", {"a.weight": torch.zeros(2, 3)}, r"lacks 1 tensor \(b\)$"),
        ("more", {**{"a.weight": torch.zeros(2, 3)}, "b": torch.zeros(2), "c": torch.ones(1)},
         r"has unknown 1 tensor \(c\)$"),
        ("prefixed", {"a.weight": torch.zeros(2, 3), "base.b": torch.zeros(2)},
         r"lacks 1 tensor \(b\) and has unknown 1 tensor \(base.b\)"),
        ("shape", {"a.weight": torch.zeros(3, 2), "b": torch.zeros(2)}, r"\[3, 2\], but \[2, 3\]"),
        ("kind", {"a.weight": torch.zeros(2, 3), "b": torch.zeros(2).int()}, "b is torch.int32"),
    ):  # fmt: skip
        _refused(init, checkpoints.save(name, weights), match)
    ints = {"a.weight": torch.zeros(2, 3).int(), "b": torch.zeros(2).int()}
    whole = checkpoints.save("ints", ints)
    _refused(whole, whole, "no floating-point tensors")
    quantised = {"quantization_config": {"bits": 4}}
    weights = {"a.weight": torch.zeros(2, 3), "b": torch.zeros(2)}
    _refused(init, checkpoints.save("q", weights, config=quantised), "quantised")


def test_output_place(saved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    init, policy = saved
    for inside in (init, init / "merged", policy / "a" / "b"):
        with pytest.raises(ValueError, match=r"output .* is inside"):
            merge_checkpoints(init, [policy], inside, progress=False)
    output = init.parent / "out"
    output.mkdir()
    (output / "kept").write_text("x")
    with pytest.raises(FileExistsError, match="not empty; delete it or choose another"):
        merge_checkpoints(init, [policy], output, progress=False)
    assert [p.name for p in output.iterdir()] == ["kept"]
    usage = shutil.disk_usage(init)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"the merge needs .* GB, 0.000 GB are free"):
        merge_checkpoints(init, [policy], init.parent / "new", progress=False)
    assert not (init.parent / "new").exists()


def test_a_mount_point_is_refused_before_the_merge(
    saved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = saved[0].parent / "out"
    output.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == output)
    with pytest.raises(ValueError, match=r"out is a mount point.* such as .*out/merged"):
        merge_checkpoints(saved[0], [saved[1]], output, progress=False)


def test_the_current_directory_is_not_replaced(
    saved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = saved[0].parent / "out"
    output.mkdir()
    monkeypatch.chdir(output)
    for place in (".", output):
        with pytest.raises(ValueError, match=r"is the current directory.* such as .*merged"):
            merge_checkpoints(saved[0], [saved[1]], place, progress=False)
    assert output.samefile(".")


def test_an_input_where_the_output_is_written_aside_is_kept(saved: tuple[Path, Path]) -> None:
    init, policy = saved
    aside = policy.rename(policy.parent / ".out.partial")
    with pytest.raises(ValueError, match=r"policy 1 .* is where .*out is written"):
        merge_checkpoints(init, [aside], init.parent / "out", progress=False)
    assert open_checkpoint(aside, "policy").names


def test_parents_of_an_impossible_output_are_removed(saved: tuple[Path, Path]) -> None:
    """With .partial behind it this name is too long, which shows when its parents are there."""
    output = saved[0].parent / "new1" / "new2" / ("x" * 250)
    with pytest.raises(OSError, match="File name too long"):
        merge_checkpoints(saved[0], [saved[1]], output, progress=False)
    assert not (saved[0].parent / "new1").exists()


def test_a_file_system_without_locks_is_left_as_it_was(
    saved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(lock: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    _refused(*saved, match="No locks available", error=OSError)


def test_the_lock_is_on_the_directory_that_is_there(saved: tuple[Path, Path]) -> None:
    """One that was removed between its opening and its lock is no place to write."""
    output = saved[0].parent / "out"
    real = fcntl.flock
    gone: list[Path] = []

    def flock(lock: int, kind: int) -> None:
        if not gone:
            gone.append(write.aside_of(output))
            gone[0].rmdir()
        real(lock, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        with write.staged(output) as aside:
            (aside / "mine").write_text("x")
    assert [p.name for p in output.iterdir()] == ["mine"]


def test_running_merge_is_not_disturbed(saved: tuple[Path, Path]) -> None:
    output = saved[0].parent / "out"
    with write.staged(output) as aside:
        (aside / "mine").write_text("x")
        with pytest.raises(OSError, match="another merge is writing here"):
            merge_checkpoints(saved[0], [saved[1]], output, progress=False)
        assert (aside / "mine").exists()
    assert [p.name for p in output.iterdir()] == ["mine"]


@pytest.mark.parametrize("config", [GEMMA, {"tie_word_embeddings": True}, {}])
def test_tied_head_that_was_trained_is_not_dropped(checkpoints: Any, config: Any) -> None:
    embedding = {"model.embed_tokens.weight": torch.randn(5, 4)}
    init = checkpoints.save("init", embedding, config=config)
    policy = checkpoints.save("policy", {**embedding, "lm_head.weight": torch.randn(5, 4)})
    _refused(init, policy, "lm_head.weight differs from model.embed_tokens.weight")
