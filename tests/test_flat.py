"""FlatParameters: segments, ties and views over one buffer, and modules bound to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from warp_fast import FlatParameters
from warp_fast.flat import ALIGNMENT

BF16, FP32 = torch.bfloat16, torch.float32


class Tied(nn.Module):
    """A tied head, a frozen layer, two dtypes, a buffer, a scalar and an empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.frozen = nn.Linear(5, 5, dtype=BF16).requires_grad_(False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.none = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("seen", torch.ones(1))

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(self.embed(ids)) * self.scale


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in module.named_parameters(remove_duplicate=False)}


def assert_state(module: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = state(module)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_segments_are_named_in_order_and_tied_ones_stored_once() -> None:
    module = Tied()
    flat = FlatParameters(module)
    order = ["scale", "none", "embed.weight", "frozen.weight", "frozen.bias"]
    assert [segment.name for segment in flat.segments] == order
    assert flat.segments[2].names == ("embed.weight", "head.weight")
    assert flat.segments[2].shape == (7, 5) and flat.segments[3].dtype == BF16
    assert flat.buffers.keys() == {FP32, BF16}
    views = flat.views()
    assert views["head.weight"].data_ptr() == views["embed.weight"].data_ptr()
    for name, expected in state(module).items():
        assert torch.equal(views[name], expected)


@pytest.mark.parametrize("dtype", [BF16, FP32, torch.float64, torch.int8])
def test_segments_start_at_16_bytes_over_gaps_of_zero(dtype: torch.dtype) -> None:
    sizes = (3, 1, 0, 17, 8)
    flat = FlatParameters([(str(i), torch.ones(n, dtype=dtype)) for i, n in enumerate(sizes)])
    buffer = flat.buffers[dtype]
    assert buffer.data_ptr() % ALIGNMENT == 0 and buffer.is_contiguous()
    for segment, size in zip(flat.segments, sizes, strict=True):
        assert segment.start * buffer.element_size() % ALIGNMENT == 0
        assert segment.stop - segment.start == size
    assert int(buffer.sum()) == sum(sizes) and buffer.numel() == flat.segments[-1].stop


def test_views_share_memory_with_the_buffer_and_not_with_the_source() -> None:
    source = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    flat = FlatParameters(source)
    flat.buffers[FP32].fill_(7.0)
    assert all((view == 7).all() for view in flat.views().values())
    flat.views()["b"][1, 0] = 5.0
    assert flat.buffers[FP32][flat.segments[1].start + 2] == 5.0
    assert (source["a"] == 1).all() and (source["b"] == 1).all()


def test_strided_sources_and_views_of_one_storage() -> None:
    base = torch.arange(12.0).view(3, 4)
    flat = FlatParameters({"all": base, "turned": base.T, "row": base[0], "again": base[0]})
    assert [s.names for s in flat.segments] == [("all",), ("turned",), ("row", "again")]
    for name, expected in {"all": base, "turned": base.T, "again": base[0]}.items():
        assert torch.equal(flat.views()[name], expected)


def test_rebound_module_keeps_its_values_ties_and_flags() -> None:
    module = Tied()
    before, parameters = state(module), dict(module.named_parameters())
    flat = FlatParameters(module)
    assert flat.rebind_(module) is module
    assert_state(module, before)
    assert all(module.get_parameter(name) is p for name, p in parameters.items())
    assert module.head.weight is module.embed.weight
    assert not module.frozen.weight.requires_grad and module.scale.requires_grad
    assert torch.equal(module.get_buffer("seen"), torch.ones(1))
    flat.buffers[FP32].zero_()
    assert (module.embed.weight == 0).all() and module.scale == 0


def test_rebound_module_trains_through_the_optimizer_it_had() -> None:
    torch.manual_seed(0)
    module, twin = Tied(), Tied()
    twin.load_state_dict(module.state_dict())
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (module, twin)]
    flat = FlatParameters(module)
    for step in range(3):
        if step == 1:
            flat.rebind_(module)
            flat.buffers[FP32].copy_(FlatParameters(twin).buffers[FP32])
        for model, optimizer in zip((module, twin), optimizers, strict=True):
            optimizer.zero_grad()
            model(torch.tensor([1, 2, 3])).square().sum().backward()
            optimizer.step()
    assert_state(module, state(twin))
    assert torch.equal(flat.views()["head.weight"], module.embed.weight)


def test_round_trip_through_another_module() -> None:
    module, other = Tied(), Tied()
    FlatParameters(module).rebind_(other)
    assert_state(other, state(module))
    flat = FlatParameters(other)
    assert flat.segments == FlatParameters(module).segments
    assert torch.equal(flat.buffers[FP32], FlatParameters(module).buffers[FP32])


def test_pairs_and_mappings_are_equal_sources() -> None:
    named = {"a": torch.randn(3), "b": nn.Parameter(torch.randn(2))}
    one, two = FlatParameters(named), FlatParameters(iter(named.items()))
    assert one.segments == two.segments
    assert torch.equal(one.buffers[FP32], two.buffers[FP32])
    assert not one.buffers[FP32].requires_grad


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ({}, ValueError, "at least one tensor; got none"),
        (nn.ReLU(), ValueError, "at least one tensor; got none"),
        ({"a": 1.0}, TypeError, "a must be a tensor; got float"),
        (nn.Linear(2, 2).parameters(), TypeError, "pairs of a name, .* got a Parameter"),
        ([torch.ones(2, 2)], TypeError, "pairs of a name, a string, and a tensor; got a Tensor"),
        ({1: torch.ones(2)}, TypeError, "pairs of a name, a string, .* got a tuple"),
        ([("a", torch.zeros(1)), ("a", torch.ones(1))], ValueError, "unique; one is given twice"),
        (
            {"a": torch.zeros(1), "b": torch.zeros(1, device="meta")},
            ValueError,
            r"one device; got \['cpu', 'meta'\]",
        ),
    ],
)
def test_refuses(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FlatParameters(source)


def test_one_name_of_a_tie_is_enough_to_rebind() -> None:
    """named_parameters() has each parameter under its first name alone."""
    module = Tied()
    expected = state(module)
    FlatParameters(module.named_parameters()).rebind_(module)
    assert_state(module, expected)
    assert module.head.weight is module.embed.weight


def test_rebind_refuses_ties_of_one_side_alone() -> None:
    tied, untied = Tied(), Tied()
    untied.head.weight = nn.Parameter(torch.ones(7, 5))
    for source, target in ((tied, untied), (untied, tied)):
        before = state(target)
        with pytest.raises(ValueError, match=r"tied in both or in neither; see \['embed.weight'"):
            FlatParameters(source).rebind_(target)
        assert_state(target, before)


def test_meta_tensors_are_not_tied() -> None:
    pair = {name: torch.zeros(2, device="meta") for name in "ab"}
    assert [segment.names for segment in FlatParameters(pair).segments] == [("a",), ("b",)]


def test_one_object_of_two_names_is_tied_whatever_it_is() -> None:
    class Named(nn.Parameter):
        pass

    module = nn.Module()
    module.a = module.b = Named(torch.ones(2))
    flat = FlatParameters(module)
    flat.rebind_(module)
    flat.views()["a"].zero_()
    assert [segment.names for segment in flat.segments] == [("a", "b")]
    assert module.a is module.b and module.a.sum() == 0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(3, 2, bias=False), r"exactly the flat names; differing: \['bias'\]"),
        (nn.Linear(3, 3), r"weight must be \(2, 3\) torch.float32; got \(3, 3\)"),
        (nn.Linear(3, 2, dtype=BF16), "weight must be .*float32; got .*bfloat16"),
    ],
)
def test_rebind_refuses_and_changes_nothing(other: nn.Module, message: str) -> None:
    before = state(other)
    with pytest.raises(ValueError, match=message):
        FlatParameters(nn.Linear(3, 2)).rebind_(other)
    assert_state(other, before)
