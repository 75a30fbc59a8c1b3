"""What is refused for the values of tensors: NaN, overflow, integers that differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from warp_fast.merge import CheckpointError, merge, merge_checkpoints

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["init", "policy 2"])
def test_non_finite_values_are_named(
    checkpoints: Any, family: Any, value: float, which: str
) -> None:
    init, policies = family(3, [torch.bfloat16])
    (init if which == "init" else policies[1])["model.layers.2.mlp.weight"][23, 7] = value
    start = checkpoints.save("init", init)
    ends = [checkpoints.save(f"p{m}", p) for m, p in enumerate(policies)]
    for method in ("slerp", "lerp"):
        with pytest.raises(CheckpointError, match=rf"^{which} .*: model.layers.2.mlp.weight holds"):
            output = start.parent / "out" / "deeper" / "merged"
            merge_checkpoints(start, ends, output, method=method, progress=False)
    assert not [p for p in start.parent.iterdir() if "out" in p.name]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("method", ["slerp", "lerp"])
@pytest.mark.parametrize(
    ("stored", "start", "end", "eta", "dtype", "match"),
    [
        (F32, 1e5, 2e5, 1.0, "float16", "overflows float16.*; choose bfloat16 or float32"),
        (F16, 6e4, 6.3e4, 2.0, None, "overflows float16, which ends at 6.55e"),
        (BF16, 3e38, 3.3e38, 2.0, None, "overflows bfloat16, .*smaller eta"),
        (F32, 3e38, 3.3e38, 2.0, None, "overflows float32, .*smaller eta"),
        (F32, 3.4028e38, 3.4028e38, 1.0, "bfloat16", "overflows bfloat16"),
        (F64, 1e38, 9e38, 1.0, "float32", "overflows float32, .*keep float64"),
        (F64, 1e60, 1e60, 1.0, "bfloat16", "overflows bfloat16, .*keep float64"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*zero, parallel:UserWarning")
def test_overflow_is_refused(
    checkpoints: Any, stored: torch.dtype, start: float, end: float, eta: float, dtype: str | None,
    match: str, method: str, sign: int,
) -> None:  # fmt: skip
    paths = []
    for name, value in (("init", start), ("one", end), ("two", end)):
        big = torch.full((3,), sign * value, dtype=F64)
        paths.append(checkpoints.save(name, {"a": torch.ones(70), "big": big.to(stored)}))
    output = paths[0].parent / "out"
    with pytest.raises(ValueError, match=f"^big {match}"):
        merge_checkpoints(
            paths[0], paths[1:], output, method=method, eta=eta, dtype=dtype, progress=False
        )
    assert not [p for p in output.parent.iterdir() if "out" in p.name]


@pytest.mark.parametrize("stored", [F16, BF16, F32, F64])
def test_the_largest_numbers_are_merged(checkpoints: Any, stored: torch.dtype) -> None:
    """Steps that rounding takes away are no overflow."""
    largest = torch.finfo(stored).max
    init = {"w": torch.tensor([largest, -largest, 0.0, 0.0], dtype=stored)}
    ends = [{"w": init["w"] + torch.eye(4, dtype=stored)[2 + m]} for m in range(2)]
    paths = [checkpoints.save(str(m), w) for m, w in enumerate((init, *ends))]
    merge_checkpoints(paths[0], paths[1:], paths[0].parent / "out", eta=2.0, progress=False)
    merged = checkpoints.load(paths[0].parent / "out")["w"]
    assert torch.equal(merged[:2], init["w"][:2])


@pytest.mark.parametrize("change", ["value", "dtype"])
def test_integers_that_differ_are_not_taken_from_init(
    checkpoints: Any, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Quantised weights whose config says so elsewhere; the last element is in the third part."""
    monkeypatch.setattr(merge, "_COMPARED", 4)
    init = {"qweight": torch.arange(9, dtype=torch.int32), "scales": torch.ones(2)}
    policy = {**init, "qweight": init["qweight"].clone()}
    if change == "dtype":
        policy["qweight"] = policy["qweight"].long()
    else:
        policy["qweight"][8] += 1
    paths = [checkpoints.save(n, w) for n, w in (("init", init), ("policy", policy))]
    match = "^policy 1 .*: qweight .* differs from that of init .*full-precision"
    with pytest.raises(CheckpointError, match=match):
        merge_checkpoints(paths[0], paths[1:], paths[0].parent / "out", progress=False)
    assert not [p for p in paths[0].parent.iterdir() if "out" in p.name]
