"""The forms of weights (tensor, list, dict) and of segments that slerp, lerp and gram take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from warp_fast import FlatParameters, _weights, gram, lerp, slerp
from warp_fast._backend import able

# triton has its own file: on CPU tensors it runs in an interpreter
BACKENDS = [n for n in able("slerp", "cpu") if n != "triton"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"x": FP32, "y": BF16, "z": FP16}


def named(runs: int = 2) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """theta_init and policies of three tensors in three dtypes."""
    torch.manual_seed(0)
    shapes = {"x": (5, 7), "y": (9,), "z": (2, 3)}
    init = {n: torch.randn(s).to(DTYPES[n]) for n, s in shapes.items()}
    policies = [
        {n: (x + 0.1 * torch.randn(x.shape)).to(DTYPES[n]) for n, x in init.items()}
        for _ in range(runs)
    ]
    return init, policies


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# --- forms ---------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("function", [slerp, lerp])
def test_result_has_the_form_and_dtypes_of_init(backend: str, function: Any) -> None:
    init, policies = named()
    as_dict = function(init, policies, backend=backend)
    assert list(as_dict) == list(init)
    assert {n: x.dtype for n, x in as_dict.items()} == DTYPES
    lists = [list(policy.values()) for policy in policies]
    as_list = function(list(init.values()), lists, backend=backend)
    assert isinstance(as_list, list)
    assert_equal(as_list, list(as_dict.values()))
    as_tensor = function(init["x"], [policy["x"] for policy in policies], backend=backend)
    assert_equal([as_tensor], [as_dict["x"]])


@every_backend
def test_dicts_are_matched_by_name_not_by_order(backend: str) -> None:
    init, policies = named()
    turned = [dict(reversed(policy.items())) for policy in policies]
    found = slerp(init, tuple(turned), backend=backend)
    assert_equal(list(found.values()), list(slerp(init, policies, backend=backend).values()))


@every_backend
def test_strided_and_unaligned_tensors(backend: str) -> None:
    base = torch.randn(3, 1 + 30 * 20)[:, 1:].view(3, 30, 20)
    shapes = [base[:, ::2], base.transpose(1, 2), base[:, 3:, 1:]]
    for init, one, two in shapes:
        assert not init.is_contiguous() or init.data_ptr() % 16
        dense = [x.contiguous() for x in (init, one, two)]
        expected = slerp(dense[0], dense[1:], backend=backend)
        assert_equal([slerp(init, [one, two], backend=backend)], [expected])
        out = torch.zeros(init.shape[::-1]).T
        slerp(init, [one, two], out=out, backend=backend)
        assert_equal([out], [expected])


@every_backend
def test_parameters_are_merged_outside_the_graph(backend: str) -> None:
    init, one, two = (nn.Parameter(torch.randn(6)) for _ in range(3))
    merged = slerp(init, [one, two], backend=backend)
    parts = slerp(init, [one, two], segments=[(1, 4)], backend=backend)
    assert not merged.requires_grad and not parts.requires_grad
    slerp(init, [one, two], out=init, backend=backend)
    assert init.is_leaf and torch.equal(init, merged)


def test_new_weights_are_poisoned_in_tests() -> None:
    """What conftest promises: memory that no op writes is NaN."""
    init = torch.zeros(3)
    assert _weights.empty_like(_weights.layout_of(init, [init], None), init).isnan().all()


# --- out -----------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("function", [slerp, lerp])
def test_out_is_written_and_returned(backend: str, function: Any) -> None:
    init, policies = named()
    expected = list(function(init, policies, eta=0.3, backend=backend).values())
    out = {n: torch.full_like(x, torch.nan) for n, x in init.items()}
    assert function(init, policies, eta=0.3, out=out, backend=backend) is out
    assert_equal(list(out.values()), expected)
    assert function(init, policies, eta=0.3, out=init, backend=backend) is init
    assert_equal(list(init.values()), expected)


@every_backend
def test_one_out_per_eta(backend: str) -> None:
    init, policies = named()
    outs = [{n: torch.zeros_like(x) for n, x in init.items()} for _ in range(2)]
    results = slerp(init, policies, eta=(0.3, 1.0), out=outs, backend=backend)
    assert [a is b for a, b in zip(results, outs, strict=True)] == [True, True]
    for eta, out in zip((0.3, 1.0), outs, strict=True):
        expected = slerp(init, policies, eta=eta, backend=backend)
        assert_equal(list(out.values()), list(expected.values()))


@every_backend
def test_out_may_keep_more_bits_than_init(backend: str) -> None:
    init, policies = named()
    out = torch.zeros(9)
    slerp(init["y"], [policy["y"] for policy in policies], out=out, backend=backend)
    expected = slerp(init["y"].float(), [policy["y"] for policy in policies], backend=backend)
    assert_equal([out], [expected])


# --- segments ------------------------------------------------------------------------------------


@every_backend
def test_ranges_of_a_flat_tensor_are_segments(backend: str) -> None:
    init, one, two = torch.randn(3, 20)
    found, report = slerp(
        init, [one, two], segments=[(0, 7), (7, 12), (15, 20)], return_report=True, backend=backend
    )
    assert report.segments == ["[0:7]", "[7:12]", "[15:20]"]
    pieces = [slice(0, 7), slice(7, 12), slice(15, 20)]
    policies = [[x[p] for p in pieces] for x in (one, two)]
    merged = slerp([init[p] for p in pieces], policies, backend=backend)
    assert_equal([found[p] for p in pieces], merged)


@every_backend
@pytest.mark.parametrize("given", [False, True], ids=["new", "out"])
def test_elements_outside_the_segments_keep_the_value_of_init(backend: str, given: bool) -> None:
    init, one, two = torch.randn(3, 20)
    out = torch.zeros(20) if given else None
    found = slerp(init, [one, two], segments=[(2, 7), (9, 15)], out=out, backend=backend)
    gaps = torch.ones(20, dtype=torch.bool)
    gaps[2:7] = gaps[9:15] = False
    assert torch.equal(found == init, gaps)


@every_backend
def test_a_buffer_takes_the_segments_of_its_dtype(backend: str) -> None:
    flats = [FlatParameters({"a": torch.randn(9).bfloat16(), "b": torch.randn(4)}) for _ in "012"]
    for dtype, name in ((torch.bfloat16, "a"), (FP32, "b")):
        init, *policies = (flat.buffers[dtype] for flat in flats)
        found = slerp(init, policies, segments=flats[0].segments, backend=backend)
        start, *ends = (flat.views()[name] for flat in flats)
        expected = slerp(start, ends, backend=backend)
        assert_equal([found[: len(expected)]], [expected])


@pytest.mark.gpu
def test_the_report_of_lerp_is_on_one_device() -> None:
    init = torch.zeros(3, device="cuda")
    _, report = lerp(init, [init + 1], return_report=True)
    assert report.merged_norms.isfinite().all()


@every_backend
def test_flat_parameters_bring_their_segments(backend: str) -> None:
    torch.manual_seed(0)
    modules = [nn.Linear(5, 3) for _ in range(3)]
    flats = [FlatParameters(module) for module in modules]
    buffers = [flat.buffers[FP32] for flat in flats]
    found, report = slerp(
        buffers[0], buffers[1:], segments=flats[0].segments, return_report=True, backend=backend
    )
    assert report.segments == ["weight", "bias"]
    views = [flat.views() for flat in flats]
    expected = slerp(views[0], views[1:], backend=backend)
    for segment in flats[0].segments:
        assert_equal([found[segment.start : segment.stop]], [expected[segment.name].flatten()])


@pytest.mark.parametrize(
    "segments",
    [[["y", "x"], ["z"]], {"first": ["x", "y"], "last": ["z"]}, [{"y", "x"}, {"z"}]],
)
def test_groups_of_names_are_segments(segments: Any) -> None:
    init, policies = named()
    products = gram(init, policies)
    grouped, report = slerp(init, policies, segments=segments, return_report=True)
    torch.testing.assert_close(report.gram, torch.stack([products[0] + products[1], products[2]]))
    names = ["y", "z"]
    if not isinstance(segments, list):
        names = ["first", "last"]
    elif isinstance(segments[0], set):
        names = ["x", "z"]
    assert report.segments == names and list(grouped) == ["x", "y", "z"]


def test_ranges_may_be_rows_of_a_tensor_or_an_array_or_come_one_by_one() -> None:
    rows = torch.tensor([[0, 2], [2, 6]])
    expected = gram(V, [W, 2 * W], segments=[(0, 2), (2, 6)])
    for same in (rows, rows.numpy(), iter(rows.tolist())):
        assert torch.equal(gram(V, [W, 2 * W], segments=same), expected)


# --- refused -------------------------------------------------------------------------------------

V, W, FP8 = torch.zeros(6), torch.ones(6), torch.float8_e4m3fn
FLAT = FlatParameters({"a": W, "b": W[:2]}).segments
META = torch.zeros(6, device="meta")
D = {"a": V, "b": V}
REFUSED: list[tuple[Any, Any, Any, type[Exception], str]] = [
    ([V], [[W]], [(0, 6)], ValueError, "segments must be None for a list"),
    (V.view(2, 3), [W.view(2, 3)], [(0, 6)], ValueError, r"must be flat; got shape \(2, 3\)"),
    (V, [W], [(0, 3), (2, 6)], ValueError, r"of 6 elements; got \(2, 6\) after 3"),
    (V, [W], [(0, 7)], ValueError, r"got \(0, 7\) after 0"),
    (V, [W], [(3, 2)], ValueError, r"got \(3, 2\) after 0"),
    (V.half(), [W.half()], FLAT[:1], ValueError, "segments must be torch.float16 like the flat"),
    (V, [W], [], ValueError, "init must hold at least one tensor"),
    ([V, META], [[W, META]], None, ValueError, r"on one device; got tensors on \['cpu', 'meta'\]"),
    ([V.to(FP8)], [[W.to(FP8)]], None, TypeError, "floating, of 16 bits or more; got .*float8"),
    (D, [D], [["a"]], ValueError, r"every name exactly once; check \['b'\]"),
    (D, [D], [["a", "b"], ["a"]], ValueError, r"exactly once; check \['a'\]"),
    (D, [D], {"k": ["a", "b", "c"]}, ValueError, r"exactly once; check \['c'\]"),
    (D, [D], [["a", "b"], []], ValueError, "must hold at least one name; got an empty one"),
    (V, W, None, ValueError, "policies must be a sequence of at least one policy"),
    (D, D, None, ValueError, "policies must be a sequence"),
    (V, [], None, ValueError, "policies must be a sequence of at least one"),
    (V, iter([W]), None, ValueError, "policies must be a sequence .* got list_iterator"),
    (V, None, None, ValueError, "policies must be a sequence .* got NoneType"),
    (V, [W], [(0, 0.5)], TypeError, r"must be \(start, stop\) pairs of integers, .* \(0, 0.5\)"),
    (D, [D], 5, TypeError, "segments of a dict must be groups of its names; got 5"),
    (D, [D], FLAT, TypeError, "ranges are for a flat tensor"),
    (D, [D], [(0, 3)], ValueError, r"every name exactly once; check \[0, 3, 'a', 'b'\]"),
    (D, [D], ["a", "b"], TypeError, "groups, each a list of its names .*; got 'a'"),
    (D, [D], [["a", "b"], 1], TypeError, "groups, each a list of its names .*; got 1"),
    (nn.ParameterDict(D), [D], None, TypeError, "init must be a tensor, or .* got ParameterDict"),
    (D, [D, nn.ParameterDict(D)], None, TypeError, "policy 1 must be .* got ParameterDict of str"),
    (V.numpy(), [W], None, TypeError, "init must be a tensor, .* got ndarray of float32"),
    ([V], [[W.numpy()]], None, TypeError, "policy 0 must be a tensor, .* got list of ndarray"),
    (D, [{"a": V, "b": 1}], None, TypeError, "policy 0 must be .* dict of tensors; got dict of"),
    ([], [[]], None, ValueError, "init must hold at least one tensor; got none"),
    ({}, [{}], None, ValueError, "init must hold at least one tensor; got none"),
    (V, [W, W[:3]], None, ValueError, r"policy 1 must have shape \(6,\); got \(3,\)"),
    (V, [[W]], None, TypeError, r"policy 0 must have the form of init \(Tensor\); got list"),
    ([V], [D], None, TypeError, r"policy 0 must have the form of init \(list\); got dict"),
    (D, [D, {"a": W, "c": W}], None, ValueError, r"names of init; differing: \['b', 'c'\]"),
    ([V], [[V], [W, W]], None, ValueError, "policy 1 must hold 1 tensors like init; got 2"),
    (D, [{"a": V, "b": W[:2]}], None, ValueError, r"policy 0, b: must be \(6,\) .*got \(2,\)"),
    ([V], [[META]], None, ValueError, r"policy 0, tensor 0: must be .* on cpu .* on meta"),
    (
        V,
        [W.int()],
        None,
        TypeError,
        "policy 0, the tensor: must be floating, of 16 bits or more; got .*int32",
    ),
]


@pytest.mark.parametrize("function", [slerp, lerp, gram])
@pytest.mark.parametrize(("init", "policies", "segments", "error", "message"), REFUSED)
def test_refuses(
    function: Any, init: Any, policies: Any, segments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(init, policies, segments=segments)
