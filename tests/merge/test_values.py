"""Merged values against a float64 oracle on whole dicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import warp_fast
from warp_fast import merge_checkpoints
from warp_fast.merge import layout, picture, steps

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
Weights = dict[str, Tensor]
# tensors of one element have parallel task vectors; so have their oracles
pytestmark = pytest.mark.filterwarnings("ignore:.*zero, parallel:UserWarning")

GROUPS = {
    "model.embed_tokens.weight": ["model.embed_tokens.weight"],
    "model.norm.weight": ["model.norm.weight"],
    "model.scale": ["model.scale"],
    "model.one": ["model.one"],
    "model.layers.0": [f"model.layers.0.{n}" for n in ("empty", "mlp.weight", "norm.weight")]
    + ["model.layers.0.self_attn.weight"],
    "model.layers.2": [f"model.layers.2.{n}.weight" for n in ("mlp", "norm", "self_attn")],
    "model.layers.10": [f"model.layers.10.{n}.weight" for n in ("mlp", "norm", "self_attn")],
}


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than a small merge; test_output.py draws."""
    monkeypatch.setattr(picture, "draw_angles", lambda report: b"")


def _groups(granularity: str) -> Any:
    names = [name for group in GROUPS.values() for name in group]
    if granularity == "block":
        return GROUPS
    return {"model": names} if granularity == "model" else {name: [name] for name in names}


def _oracle(
    init: Weights, policies: Sequence[Weights], method: str, granularity: str, eta: float
) -> Weights:
    exact = [{name: tensor.double() for name, tensor in w.items()} for w in (init, *policies)]
    function = warp_fast.slerp if method == "slerp" else warp_fast.lerp
    merged: Weights = function(
        exact[0], exact[1:], segments=_groups(granularity), eta=eta, backend="reference"
    )
    return merged


def _check(found: Weights, expected: Weights, dtypes: dict[str, torch.dtype]) -> None:
    """Within the rounding of the output dtype, and 2^-22 of values near 4 for fp32 arithmetic."""
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        assert found[name].dtype == dtypes[name], name
        assert found[name].shape == exact.shape, name
        bound = 0.5 * torch.finfo(dtypes[name]).eps * exact.abs() + 1e-6
        assert ((found[name].double() - exact).abs() <= bound).all(), name


def _saved(checkpoints: Any, init: Weights, policies: list[Weights]) -> tuple[Path, list[Path]]:
    paths = [checkpoints.save(f"policy-{m}", p, shards=1 + m) for m, p in enumerate(policies)]
    return checkpoints.save("init", init, shards=2), paths


@pytest.mark.parametrize("tile", [300, 3000, 1 << 25], ids=["tile300", "tile3K", "tile32M"])
@pytest.mark.parametrize("granularity", ["tensor", "block", "model"])
@pytest.mark.parametrize("runs", [1, 2, 3, 4])
def test_slerp(
    checkpoints: Any,
    family: Any,
    monkeypatch: pytest.MonkeyPatch,
    runs: int,
    granularity: str,
    tile: int,
) -> None:
    monkeypatch.setattr(steps, "TILE_BYTES", tile)
    init, policies = family(runs, [F32])
    start, ends = _saved(checkpoints, init, policies)
    output = checkpoints.root / "out"
    report = merge_checkpoints(start, ends, output, granularity=granularity, progress=False)
    expected = _oracle(init, policies, "slerp", granularity, 1.0)
    _check(checkpoints.load(output), expected, dict.fromkeys(init, F32))
    assert report.outputs == [output]
    empty = {"model.layers.0.empty"} if granularity == "tensor" else set()
    assert sorted(report.segments) == sorted(_groups(granularity).keys() - empty)


def test_tile_of_one_element(checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "TILE_BYTES", 1)
    weights = [{"a": torch.randn(3), "b": torch.randn(2, 2).bfloat16()} for _ in range(3)]
    paths = [checkpoints.save(str(m), w) for m, w in enumerate(weights)]
    merge_checkpoints(paths[0], paths[1:], checkpoints.root / "out", progress=False)
    exact = [{name: tensor.double() for name, tensor in w.items()} for w in weights]
    expected = warp_fast.slerp(exact[0], exact[1:])
    _check(checkpoints.load(checkpoints.root / "out"), expected, {"a": F32, "b": BF16})


@pytest.mark.parametrize("method", ["slerp", "lerp"])
@pytest.mark.parametrize(
    "dtypes",
    [[BF16], [F16], [F64], [F32, BF16, F16], [BF16, F64]],
    ids=["bf16", "fp16", "fp64", "mixed", "bf16-fp64"],
)
def test_dtypes(checkpoints: Any, family: Any, method: str, dtypes: list[torch.dtype]) -> None:
    init, policies = family(3, dtypes)
    start, ends = _saved(checkpoints, init, policies)
    merge_checkpoints(start, ends, checkpoints.root / "out", method=method, progress=False)
    expected = _oracle(init, policies, method, "block", 1.0)
    _check(
        checkpoints.load(checkpoints.root / "out"), expected, {n: t.dtype for n, t in init.items()}
    )


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_output_dtype(checkpoints: Any, family: Any, name: str) -> None:
    init, policies = family(2, [F32, BF16])
    start, ends = _saved(checkpoints, init, policies)
    merge_checkpoints(start, ends, checkpoints.root / "out", dtype=name, progress=False)
    expected = _oracle(init, policies, "slerp", "block", 1.0)
    dtypes = dict.fromkeys(init, getattr(torch, name))
    _check(checkpoints.load(checkpoints.root / "out"), expected, dtypes)


@pytest.mark.parametrize("method", ["slerp", "lerp"])
def test_several_eta_are_single_eta(
    checkpoints: Any, family: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    init, policies = family(2, [F32, BF16])
    start, ends = _saved(checkpoints, init, policies)
    root = checkpoints.root
    etas = [0.0, 0.3, 1.0, 1.5]
    monkeypatch.setattr(steps, "TILE_BYTES", 400)
    report = merge_checkpoints(start, ends, root / "all", method=method, eta=etas, progress=False)
    assert report.outputs == [root / "all" / f"eta-{e:g}" for e in etas]
    for eta, path in zip(etas, report.outputs, strict=True):
        alone = root / f"alone-{eta}"
        merge_checkpoints(start, ends, alone, method=method, eta=[eta], progress=False)
        expected = _oracle(init, policies, method, "block", eta)
        _check(checkpoints.load(path), expected, {n: t.dtype for n, t in init.items()})
        for name, tensor in checkpoints.load(alone).items():
            torch.testing.assert_close(checkpoints.load(path)[name], tensor, rtol=1e-2, atol=1e-6)


def test_result_does_not_depend_on_files(
    checkpoints: Any, family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "TILE_BYTES", 300)
    init, policies = family(3, [BF16, F32])
    results = []
    for shards, order in ((1, 1), (3, 1), (4, -1)):
        root = f"{shards}{order}"
        paths = [
            checkpoints.save(f"{root}/{m}", w, shards=shards, order=order)
            for m, w in enumerate((init, *policies))
        ]
        output = checkpoints.root / root / "out"
        report = merge_checkpoints(paths[0], paths[1:], output, granularity="model", progress=False)
        results.append({"gram": report.gram, **checkpoints.load(output)})
    for other in results[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in results[0].items())


def test_unaligned_data_is_read(checkpoints: Any) -> None:
    """Headers need not end at a multiple of the element size."""
    weights = [{"a": torch.randn(5)} for _ in range(2)]
    paths = [checkpoints.save(str(m), w) for m, w in enumerate(weights)]
    file = paths[1] / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" "
    file.write_bytes((length + 1).to_bytes(8, "little") + header + content[8 + length :])
    merge_checkpoints(paths[0], paths[1:], checkpoints.root / "out", progress=False)
    torch.testing.assert_close(checkpoints.load(checkpoints.root / "out"), weights[1])


def test_angles_are_of_task_vectors(checkpoints: Any) -> None:
    """Orthogonal task vectors of length 3 and 4 on large weights; two layers, two angles."""
    init = {f"model.layers.{i}.w": torch.full((4,), 100.0) for i in (0, 1)}
    a, b = torch.tensor([3.0, 0, 0, 0]), torch.tensor([0, 4.0, 0, 0])
    first = {name: tensor + a for name, tensor in init.items()}
    second = {"model.layers.0.w": 100 + b, "model.layers.1.w": 100 + (a + b)}
    paths = [checkpoints.save(n, w) for n, w in (("i", init), ("a", first), ("b", second))]
    report = merge_checkpoints(paths[0], paths[1:], checkpoints.root / "out", progress=False)
    assert report.segments == ["model.layers.0", "model.layers.1"]
    torch.testing.assert_close(
        report.angles[:, 0, 1], torch.tensor([90.0, math.degrees(math.acos(0.6))], dtype=F64)
    )
    torch.testing.assert_close(report.norms, torch.tensor([[3.0, 4.0], [3.0, 5.0]], dtype=F64))
    half = math.sqrt(0.5)
    torch.testing.assert_close(report.coefficients[0], torch.tensor([half, half], dtype=F64))
    assert float(report.merged_norms[0]) == pytest.approx(5 * half)
    merged = checkpoints.load(checkpoints.root / "out")
    torch.testing.assert_close(merged["model.layers.0.w"], 100 + half * (a + b))


def test_degenerate_segments_are_merged_linearly_with_one_warning(checkpoints: Any) -> None:
    init = {f"model.layers.{i}.w": torch.randn(8) for i in range(20)}
    same = {name: tensor.clone() for name, tensor in init.items()}
    moved = {name: tensor + 1 for name, tensor in init.items()}
    opposite = {name: tensor - 1 for name, tensor in init.items()}
    paths = {
        n: checkpoints.save(n, w)
        for n, w in (("init", init), ("same", same), ("moved", moved), ("opposite", opposite))
    }
    for other, factor in (("same", 0.5), ("moved", 1.0), ("opposite", 0.0)):
        output = checkpoints.root / f"out-{other}"
        with pytest.warns(UserWarning, match="20 of 20 segments") as caught:
            report = merge_checkpoints(
                paths["init"], [paths["moved"], paths[other]], output, progress=False
            )
        assert len(caught) == 1
        assert len(report.degenerate) == 20
        for name, tensor in checkpoints.load(output).items():
            torch.testing.assert_close(tensor, init[name] + factor)


def test_output_is_sharded_when_large(
    checkpoints: Any, family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "MAX_FILE_BYTES", 2000)
    init, policies = family(2, [BF16, F32])
    start, ends = _saved(checkpoints, init, policies)
    output = checkpoints.root / "out"
    merge_checkpoints(start, ends, output, progress=False)
    assert len(list(output.glob("model-*-of-*.safetensors"))) > 1
    expected = _oracle(init, policies, "slerp", "block", 1.0)
    _check(checkpoints.load(output), expected, {n: t.dtype for n, t in init.items()})
    again = merge_checkpoints(output, [output], checkpoints.root / "again", progress=False)
    assert again.bytes_written > 0
