"""The EMA kernels of Triton and CUDA against the reference, bit for bit.

On CUDA tensors where there is a GPU, else on CPU tensors under the interpreter of Triton and as
tests/cuda_on_cpu.py runs csrc/ema.cu.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda_on_cpu import ABSENT
from tests.tolerances import assert_same_bits
from warp_fast import _table
from warp_fast.native.ema import ema_update_cuda_
from warp_fast.reference.ema import ema_update_reference_, split_float32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it once, at the import below
pytest.importorskip("triton", reason="the package triton is not installed")
kernels: Any = importlib.import_module("warp_fast.kernels.ema")
if DEVICE == "cpu" and type(kernels._ema_kernel).__name__ != "InterpretedFunction":
    raise RuntimeError("something imported triton before this file set TRITON_INTERPRET=1")

UPDATES = [kernels.ema_update_triton_]
if ABSENT is None:
    UPDATES.append(ema_update_cuda_)

pytestmark = pytest.mark.usefixtures("cuda_kernels")

# one element; a run below, at and above one vector; one block; several; empty in the middle
SIZES = [1, 7, 8, 0, 4096, 9001]
# first index: the high word of the element index changes inside the list, and inside a vector
FAR = 2**32 - 4003
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


def lists(
    storage: str, dtypes: list[torch.dtype], sizes: list[int], offset: int = 0, scale: float = 0.02
) -> Lists:
    """(ema, params, residual) on the device; every tensor starts `offset` elements into memory."""
    generator = torch.Generator().manual_seed(0)
    ema, params, residual = [], [], []
    for i, size in enumerate(sizes):
        exact = torch.randn(size + offset, generator=generator) * scale
        moved = exact + torch.randn(exact.shape, generator=generator) * 1e-3
        params.append(moved.to(dtypes[i % len(dtypes)]).to(DEVICE)[offset:])
        high, low = (x.to(DEVICE)[offset:] for x in split_float32(exact))
        if storage == "split":
            residual.append(low)
        average = {"split": high, "stochastic": exact.to(BF16), "fp64": exact.double()}
        ema.append(average.get(storage, exact).to(DEVICE)[0 if storage == "split" else offset :])
    return ema, params, residual


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def check(
    given: Lists,
    rate: float = 0.01,
    device_rate: Tensor | None = None,
    stochastic: bool = False,
    seed: int = 3,
    step: int = 7,
    first: int = FAR,
) -> None:
    """Update with the reference and every kernel, and compare every bit."""
    ema, params, residual = given
    first_index = [first]
    for average in ema[:-1]:
        first_index.append(first_index[-1] + average.numel())
    written = [*ema, *residual]
    before, expected, remainders = copies(written), copies(ema), copies(residual)
    rest = (rate, device_rate, stochastic, seed, step, first_index)
    ema_update_reference_(expected, params, remainders, *rest)
    for update in UPDATES:
        for tensor, value in zip(written, before, strict=True):
            tensor.copy_(value)
        update(ema, params, residual, *rest)
        assert_same_bits(written, [*expected, *remainders])


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("storage", ["fp32", "split", "stochastic"])
def test_every_bit_is_that_of_the_reference(storage: str, dtype: torch.dtype) -> None:
    check(lists(storage, [dtype], SIZES), stochastic=storage == "stochastic")


# each side of the branch at 0.5, and the two rates that must be exact
@pytest.mark.parametrize("rate", [0.0, 0.499999, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("storage", ["split", "stochastic"])
def test_every_rate(storage: str, rate: float) -> None:
    given = lists(storage, [FP32], [300])
    check(given, rate=rate, stochastic=storage == "stochastic")
    if rate == 1.0 and storage == "split":
        assert_same_bits(list(given[0]), [split_float32(given[1][0])[0]])


def test_fp64_average_takes_the_rate_in_fp64() -> None:
    check(lists("fp64", [FP64, BF16], [300, 9]), rate=0.01)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=["fp32", "bf16", "fp64"])
def test_rate_is_read_on_the_device_at_each_call(dtype: torch.dtype) -> None:
    given = lists("split", [BF16], SIZES)
    rate = torch.tensor(0.25, dtype=dtype, device=DEVICE)
    check(given, rate=0.0, device_rate=rate)
    rate.fill_(0.75)
    check(given, rate=0.0, device_rate=rate)


def test_mixed_dtypes_and_alignments_in_one_list() -> None:
    odd = lists("split", [BF16, FP32, FP16], SIZES, offset=1)
    even = lists("split", [BF16, FP32, FP16], SIZES)
    assert any(tensor.data_ptr() % 16 for tensor in odd[0])
    check((odd[0] + even[0], odd[1] + even[1], odd[2] + even[2]))


def test_strided_tensors() -> None:
    ema, params, residual = lists("stochastic", [FP32], [12 * 40])
    check(([ema[0].view(12, 40).T], [params[0].view(40, 12)], residual), stochastic=True)
    ema, params, residual = lists("split", [FP32], [12 * 40])
    shaped = [x[0].view(12, 40)[:, ::2] for x in (ema, params, residual)]
    check(([shaped[0]], [shaped[1]], [shaped[2]]))


def test_many_tensors() -> None:
    check(lists("split", [BF16, FP32], [1 + i % 5 for i in range(150)]))


@pytest.mark.parametrize("storage", ["split", "stochastic"])
def test_huge_and_tiny_values(storage: str) -> None:
    value = torch.tensor([3.38e38, -3.38e38, 3.389e38, 1e-38, 1e-40, -1e-45, 0.0, -0.0])
    high, low = (x.to(DEVICE) for x in split_float32(value))
    ema = [high if storage == "split" else value.to(BF16).to(DEVICE)]
    residual = [low] if storage == "split" else []
    half, infinite = (value * 0.5).to(DEVICE), torch.full_like(value, float("inf")).to(DEVICE)
    # with infinite params no rate between: above one half the update is inf - inf
    for rate, params in ((0.0, half), (0.01, half), (1.0, half), (0.01, infinite), (1.0, infinite)):
        check((ema, [params], residual), rate=rate, stochastic=storage == "stochastic")
    assert ema[0].isinf().all()


@pytest.mark.parametrize("storage", ["split", "stochastic"])
def test_nan_is_seen_in_the_bf16_half_and_stays(storage: str) -> None:
    # payloads that rounding would carry into -0.0 and into inf, were they taken for numbers
    value = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(FP32)
    ema = [torch.zeros(3, dtype=BF16, device=DEVICE)]
    residual = [torch.zeros(3, dtype=torch.int16, device=DEVICE)] if storage == "split" else []
    rest = (0.3, None, storage == "stochastic", 0, 0, [0])
    for params in (value.to(DEVICE), torch.zeros(3, device=DEVICE)):
        for update in UPDATES:
            update(ema, [params], residual, *rest)
            assert ema[0].isnan().all()


# keys on both sides of 2^31, and indices with high words up to the largest int64
@pytest.mark.parametrize("first", [0, 2**31 - 4, 2**40 + 12345, 2**63 - 400])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 0), (0, 1), (2**31, 10**9), (-5, 3)])
def test_random_bits_of_far_elements(first: int, seed: int, step: int) -> None:
    check(lists("stochastic", [BF16], [300]), 0.3, None, True, seed, step, first)


@pytest.mark.parametrize("shift", [2**31, 2**33])
def test_elements_past_2_to_the_31(monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    """The table is rewritten so that the blocks lie `shift` elements after their base address."""
    original: Any = _table.launches_of

    def launches_of(columns: list[list[Tensor]], *rest: Any) -> Any:
        launches = original(columns, *rest)
        for launch in launches:
            sizes = torch.tensor([column[0].element_size() for column in columns])
            launch.table[:, 0] += shift
            launch.table[:, 1] -= shift // kernels._BLOCK
            launch.table[:, 2] -= shift
            launch.table[:, 3:] -= shift * sizes.to(DEVICE)
        return launches

    monkeypatch.setattr(_table, "launches_of", launches_of)
    check(lists("split", [BF16], SIZES))
    check(lists("stochastic", [BF16], SIZES), stochastic=True)


# --- the pointer table ---------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """A function that says how many tables every kernel has built since."""
    built = []
    original: Any = _table.launches_of

    def counting(*arguments: object) -> object:
        built.append(1)
        return original(*arguments)

    monkeypatch.setattr(_table, "launches_of", counting)
    return lambda: len(built) / len(UPDATES)


def test_table_is_built_once_for_unmoved_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    given = lists("split", [BF16], SIZES)
    built = counted(monkeypatch)
    for _ in range(3):
        check(given)
    assert built() == 1


def test_moved_resized_and_retyped_tensors_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    ema, params, _ = lists("fp32", [BF16], [64, 32])
    built = counted(monkeypatch)
    check((ema, params, []))
    ema[1].data = ema[1].clone()
    check((ema, params, []))
    assert built() == 2
    params[0].data = params[0].float()
    check((ema, params, []))
    assert built() == 3
    # smaller, at the same address
    check(([ema[0][:16], ema[1]], [params[0][:16], params[1]], []))
    assert built() == 4
    # the element index of the random bits is in the table too
    check((ema, params, []), first=0)
    assert built() == 5


def test_freed_tensors_at_reused_addresses() -> None:
    """Whatever the allocator hands out again, the update is right."""
    for round_ in range(6):
        sizes = [512, 64] if round_ % 2 else [64, 512]
        check(lists("split", [FP32 if round_ % 3 else BF16], sizes))


def test_tables_of_all_calls_of_a_step_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_tables", _table.TableCache())
    given = [lists("fp32", [BF16], [8]) for _ in range(40)]
    for _ in range(2):
        for one in given:
            check(one)
        assert len(kernels._tables) == 40


def test_memory_of_kept_tables_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_tables", _table.TableCache())
    kept = [lists("fp32", [BF16], [8]) for _ in range(40)]
    check(kept[0])
    monkeypatch.setattr(_table, "_KEPT", 16 * kernels._tables._bytes)
    for given in kept:
        check(given)
    assert len(kernels._tables) == 16 and kernels._tables._bytes == _table._KEPT
    check(kept[0])


def test_sizes_that_differ_are_refused_before_any_write() -> None:
    ema, params, _ = lists("fp32", [BF16], [64, 32])
    before = copies(ema)
    with pytest.raises(ValueError, match=r"tensor 1 must have one size; got \[32, 31\]"):
        kernels.ema_update_triton_(
            ema, [params[0], params[1][:31]], [], 0.5, None, False, 0, 0, [0, 64]
        )
    assert_same_bits(ema, before)


def test_a_list_of_empty_tensors_launches_nothing() -> None:
    check(lists("split", [BF16], [0, 0]))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: graphs are captured there")
@pytest.mark.parametrize("update", UPDATES)
def test_captured_update_reads_the_rate_of_the_replay(update: Any) -> None:
    given = lists("split", [BF16], SIZES)
    rate = torch.tensor(0.25, device=DEVICE)
    rest = (0.0, rate, False, 0, 0, [0] * len(SIZES))
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(graph):
        update(*given, *rest)
    update(*given, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(*given, *rest)
    expected, remainders = copies(given[0]), copies(given[2])
    for value in (0.5, 0.125):
        rate.fill_(value)
        ema_update_reference_(expected, given[1], remainders, *rest)
        graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(given[0] + given[2], expected + remainders)


PUBLIC = """
import sys, torch, warp_fast
from warp_fast import _ops
assert "triton" not in sys.modules, "import warp_fast must not import triton"
device = sys.argv[1]
pair = [[torch.full((9,), 2.0, device=device)] for _ in range(2)]
params = [torch.ones(9, dtype=torch.bfloat16, device=device)]
for ema, backend in zip(pair, ("triton", "reference")):
    assert warp_fast.ema_update_(ema, params, 0.25, backend=backend) is ema
assert torch.equal(pair[0][0], pair[1][0])
arguments = (pair[0], params, [], 0.25, None, False, 0, 0, [0])
torch.library.opcheck(_ops.EMA_UPDATE["triton"], arguments)
update = lambda ema: warp_fast.ema_update_(ema, params, 0.25, backend="triton")
torch.compile(update, fullgraph=True, backend="aot_eager")(pair[0])
update(pair[1])
assert torch.equal(pair[0][0], pair[1][0])
"""


def test_public_function_and_op() -> None:
    """In a process of its own: whether CPU tensors are served is decided when warp_fast loads."""
    subprocess.run([sys.executable, "-c", PUBLIC, DEVICE], check=True)
