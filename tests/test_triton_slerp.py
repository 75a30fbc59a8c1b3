"""SLERP in Triton and CUDA: Grams against fp64, merged weights bit for bit.

On CUDA tensors where there is a GPU, else on CPU tensors under the interpreter of Triton and as
tests/cuda_on_cpu.py runs csrc/*.cu.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda_on_cpu import ABSENT
from tests.tolerances import assert_same_bits
from warp_fast.native import slerp as native
from warp_fast.native._addresses import extension
from warp_fast.reference.slerp import gram_reference, slerp_apply_reference_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it once, at the import below
pytest.importorskip("triton", reason="the package triton is not installed")
gram_pass: Any = importlib.import_module("warp_fast.kernels.gram")
apply_pass: Any = importlib.import_module("warp_fast.kernels.slerp")
tables: Any = importlib.import_module("warp_fast._table")
if DEVICE == "cpu" and type(gram_pass._gram_kernel).__name__ != "InterpretedFunction":
    raise RuntimeError("something imported triton before this file set TRITON_INTERPRET=1")

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
GRAMS, APPLIES = [gram_pass.gram_triton], [apply_pass.slerp_apply_triton_]
if ABSENT is None:
    GRAMS.append(native.gram_cuda)
    APPLIES.append(native.slerp_apply_cuda_)
pytestmark = pytest.mark.usefixtures("cuda_kernels")

# one element; below, at and above one vector; empty; more than one block of the apply pass
SIZES = [1, 7, 0, 2304, 8, 2500]
SEGMENT = [2, 0, 1, 0, 3, 2]  # out of order; segment 1 holds only the empty tensor, 4 none
SEGMENTS = 5
# bf16 deltas are exact in fp32 and their products in fp64: what is left is the fp64 summation
GRAM_TOLERANCE = 1e-13


def weights(
    runs: int,
    init_dtype: torch.dtype = BF16,
    dtypes: tuple[torch.dtype, ...] = (BF16,),
    sizes: list[int] = SIZES,
    offset: int = 0,
) -> tuple[list[Tensor], list[Tensor]]:
    """(init, policies) on the device; every tensor starts `offset` elements into its memory."""
    generator = torch.Generator().manual_seed(0)

    def normal(size: int) -> Tensor:
        return torch.randn(size + offset, generator=generator, dtype=FP64)

    exact = [normal(size) * 0.02 for size in sizes]
    init = [x.to(init_dtype).to(DEVICE)[offset:] for x in exact]
    policies = [
        (x + 1e-3 * normal(size)).to(dtypes[m % len(dtypes)]).to(DEVICE)[offset:]
        for m in range(runs)
        for x, size in zip(exact, sizes, strict=True)
    ]
    return init, policies


def relative(found: Tensor, gold: Tensor) -> float:
    """Largest error of an inner product, in units of the two lengths."""
    length = gold.diagonal(dim1=1, dim2=2).sqrt()
    scale = length[:, :, None] * length[:, None, :]
    assert (found[scale == 0] == 0).all()
    return float(((found - gold).abs() / scale)[scale > 0].max())


def check_gram(init: list[Tensor], policies: list[Tensor], segment: list[int] = SEGMENT) -> None:
    for gram in GRAMS:
        check_one_gram(gram(init, policies, segment, SEGMENTS), init, policies, segment)


def check_one_gram(
    found: Tensor, init: list[Tensor], policies: list[Tensor], segment: list[int]
) -> None:
    gold = gram_reference(
        [x.double() for x in init], [x.double() for x in policies], segment, SEGMENTS
    )
    exact = all(x.dtype in (BF16, FP64) for x in [*init, *policies])
    assert relative(found, gold) < (GRAM_TOLERANCE if exact else 1e-7)
    # the definition itself rounds fp32 task vectors to fp32
    assert relative(found, gram_reference(init, policies, segment, SEGMENTS)) < GRAM_TOLERANCE
    assert torch.equal(found, found.transpose(1, 2))


def check_apply(
    init: list[Tensor],
    policies: list[Tensor],
    rows: int = 1,
    out: list[Tensor] | None = None,
    segment: list[int] = SEGMENT,
) -> None:
    runs = len(policies) // len(init)
    generator = torch.Generator().manual_seed(1)
    coefficients = torch.randn(rows, SEGMENTS, runs, dtype=FP64, generator=generator)
    out = (
        [torch.full_like(x, float("nan")) for _ in range(rows) for x in init]
        if out is None
        else out
    )
    expected = [x.clone() for x in out]
    slerp_apply_reference_(expected, init, policies, coefficients, segment)
    for apply in APPLIES:
        for x in out:
            x.fill_(float("nan"))
        apply(out, init, policies, coefficients, segment)
        assert_same_bits(out, expected)


# a single policy; the usual; the last whole group; a second group of one; the most promised
@pytest.mark.parametrize("runs", [1, 2, 5, 6, 16])
def test_any_number_of_policies(runs: int) -> None:
    sizes = SIZES if runs < 16 else [0, 0, 0, 43, 0, 0]  # the interpreter takes seconds per chunk
    check_gram(*weights(runs, sizes=sizes))
    check_apply(*weights(runs, sizes=sizes))


@pytest.mark.parametrize("runs", [2, 6])
def test_many_chunks_are_summed(runs: int) -> None:
    chunk = gram_pass.tiling(runs).chunk
    init, policies = weights(runs, sizes=[2 * chunk + 13])
    check_gram(init, policies, [3])


@pytest.mark.parametrize(
    ("init_dtype", "dtypes"),
    [
        (FP32, (FP32,)),
        (FP32, (BF16,)),
        (BF16, (FP16, BF16, FP32)),
        (FP64, (FP64,)),
        (FP32, (FP64, BF16)),
    ],
    ids=["fp32", "fp32-bf16", "mixed", "fp64", "fp64-mixed"],
)
def test_dtypes(init_dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> None:
    check_gram(*weights(3, init_dtype, dtypes))
    check_apply(*weights(3, init_dtype, dtypes), rows=2)


def test_mixed_dtypes_and_alignments_across_tensors() -> None:
    odd, even = weights(2, offset=1), weights(2, FP32)
    assert odd[0][3].data_ptr() % 16
    init = [a if t % 2 else b for t, (a, b) in enumerate(zip(odd[0], even[0], strict=True))]
    pairs = enumerate(zip(odd[1], even[1], strict=True))
    policies = [a if i % 2 else b for i, (a, b) in pairs]
    check_gram(init, policies)
    check_apply(init, policies, rows=3)


def test_in_place_and_other_dtypes_of_out() -> None:
    init, policies = weights(2)
    expected = [x.clone() for x in init]
    coefficients = torch.full((1, SEGMENTS, 2), 0.5, dtype=FP64)
    slerp_apply_reference_(expected, init, policies, coefficients, SEGMENT)
    apply_pass.slerp_apply_triton_(init, init, policies, coefficients, SEGMENT)
    assert_same_bits(init, expected)
    out = [torch.empty_like(x, dtype=dtype) for dtype in (FP32, BF16, FP32) for x in init]
    check_apply(init, policies, rows=3, out=out)


def test_strided_tensors() -> None:
    init, policies = weights(2, sizes=[480])
    init = [init[0].view(12, 40)[:, ::2]]
    policies = [policies[0].view(40, 12).T[:, ::2], policies[1].view(12, 40)[:, 1::2]]
    check_gram(init, policies, [0])
    out = torch.zeros(20, 12, dtype=BF16, device=DEVICE).T
    check_apply(init, policies, out=[out], segment=[0])


@pytest.mark.parametrize("gram", GRAMS)
def test_same_bits_at_every_call_and_address(gram: Any) -> None:
    init, policies = weights(3)
    first = gram(init, policies, SEGMENT, SEGMENTS)
    moved = [x.clone() for x in init], [x.clone() for x in policies]
    assert_same_bits([gram(*moved, SEGMENT, SEGMENTS)], [first])


def test_moved_tensors_and_other_segments_are_noticed() -> None:
    init, policies = weights(2)
    check_gram(init, policies)
    policies[1].data = policies[1] * 2
    check_gram(init, policies)
    check_gram(init, policies, [0, 0, 0, 1, 4, 4])
    for tensor in policies:
        tensor.mul_(3)
    check_gram(init, policies)
    check_apply(init, policies)
    check_apply(init, policies, segment=[1, 1, 0, 0, 2, 3])


def test_zero_task_vectors_are_exactly_zero() -> None:
    init, policies = weights(1)
    gram = gram_pass.gram_triton(init, [*policies, *(x.clone() for x in init)], SEGMENT, SEGMENTS)
    assert (gram[:, 1] == 0).all() and (gram[[0, 2, 3], 0, 0] > 0).all()


def test_infinite_weights_show_in_the_gram() -> None:
    init, policies = weights(2)
    policies[3][5] = float("inf")
    gram = gram_pass.gram_triton(init, policies, SEGMENT, SEGMENTS)
    assert (
        not gram[0, 0].isfinite().any() and gram[0, 1, 1].isfinite() and gram[1:].isfinite().all()
    )


@pytest.mark.parametrize("shift", [2**31, 2**33])
@pytest.mark.parametrize("which", range(len(GRAMS)), ids=["triton", "cuda"][: len(GRAMS)])
def test_elements_past_2_to_the_31(monkeypatch: pytest.MonkeyPatch, which: int, shift: int) -> None:
    """The tables are rewritten so that the blocks lie `shift` elements after their base address."""

    def shifted(block: int, counts_blocks: bool) -> None:
        original = tables.launches_of

        def launches_of(columns: Any, *rest: Any) -> Any:
            launches = original(columns, *rest)
            for launch in launches:
                sizes = torch.tensor([column[0].element_size() for column in columns])
                launch.table[:, 0] += shift
                launch.table[:, 1] -= shift // block
                launch.table[:, 2] -= shift // block if counts_blocks else 0
                launch.table[:, 3:] -= shift * sizes.to(DEVICE)
            return launches

        monkeypatch.setattr(tables, "launches_of", launches_of)

    chunk, block = gram_pass.tiling(2).chunk, apply_pass._BLOCK
    if which == 1:
        chunk, block = extension().GRAM_CHUNK, extension().APPLY_BLOCK
    this = sys.modules[__name__]
    init, policies = weights(2)
    with monkeypatch.context() as monkeypatch:
        monkeypatch.setattr(this, "GRAMS", [GRAMS[which]])
        shifted(chunk, True)
        check_gram(init, policies)
    with monkeypatch.context() as monkeypatch:
        monkeypatch.setattr(this, "APPLIES", [APPLIES[which]])
        shifted(block, False)
        check_apply(init, policies)


PUBLIC = """
import sys, pytest, torch, warp_fast
from warp_fast import _ops
device = sys.argv[1]
torch.manual_seed(0)
init = {"a": torch.randn(9, 8).to(device), "b": torch.randn(7).bfloat16().to(device)}
policies = [{k: (v + torch.randn_like(v)).to(v.dtype) for k, v in init.items()} for _ in range(3)]
def merge(backend):
    return warp_fast.slerp(init, policies, eta=[0.3, 1.0], backend=backend, return_report=True)
(ours, report), (theirs, expected) = merge("triton"), merge("reference")
torch.testing.assert_close(report.gram, expected.gram, rtol=1e-12, atol=0)
for a, b in zip(ours, theirs):
    for key in init:
        torch.testing.assert_close(a[key], b[key])
for backend in sys.argv[2:]:
    bad = [{**policies[0], "a": policies[0]["a"] * float("nan")}, policies[1]]
    kept = {k: v.clone() for k, v in init.items()}
    with pytest.raises(ValueError, match=r"in a those of policies .0. \\(or init\\)"):
        warp_fast.slerp(kept, bad, out=kept, backend=backend)
    assert all(torch.equal(kept[k], init[k]) for k in init)
    with pytest.warns(UserWarning, match=r"in 1 of 2 segments \\(b\\)"):
        warp_fast.slerp(init, [policies[0], {**policies[1], "b": init["b"]}], backend=backend)
lists = list(init.values()), [v for policy in policies for v in policy.values()]
torch.library.opcheck(_ops.GRAM["triton"], (*lists, [0, 1], 2))
rows = torch.ones(1, 2, 3, dtype=torch.float64)
out = [torch.empty_like(v) for v in init.values()]
torch.library.opcheck(_ops.SLERP_APPLY["triton"], (out, *lists, rows, [0, 1]))
torch.library.opcheck(
    _ops.SLERP["triton"], (out, *lists, report.gram, [0.3], ["a", "b"], [0, 1])
)
gram = lambda x: warp_fast.gram(x, policies, backend="triton")
torch.testing.assert_close(
    torch.compile(gram, fullgraph=True, backend="aot_eager")(init), gram(init), rtol=0, atol=0
)
"""


def test_public_functions_and_ops() -> None:
    """In a process of its own: whether CPU tensors are served is decided when warp_fast loads."""
    backends = ["reference", "triton"] + ["cuda"] * (DEVICE == "cuda" and ABSENT is None)
    subprocess.run([sys.executable, "-c", PUBLIC, DEVICE, *backends], check=True)


@pytest.mark.parametrize("apply", [slerp_apply_reference_, *APPLIES])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64])
def test_rows_of_nan_write_nothing(apply: Any, dtype: torch.dtype, aligned: bool) -> None:
    """So a solve may refuse after the apply pass was launched."""
    init, policies = weights(3, dtype, (dtype,), offset=0 if aligned else 1)
    out = [torch.full_like(x, 7) for _ in range(2) for x in init]
    coefficients = torch.full((2, SEGMENTS, 3), float("nan"), dtype=FP64)
    coefficients[1] = 0
    apply(out, init, policies, coefficients, SEGMENT)
    assert all((x == 7).all() for x in out[: len(init)])
    assert_same_bits(out[len(init) :], init)
