"""The CUDA loss kernels, run on the CPU: clusters, slices, shared memory, and what they compute.

What is left to a GPU is its own arithmetic (exp, division), and its speed.
"""

from __future__ import annotations

import ctypes
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda_on_cpu import build, has_compiler
from tests.tolerances import assert_close, largest
from warp_fast.reference import loss as reference

pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CODES = {BF16: 0, FP16: 1, FP32: 2}
EXACT = {"": 0, "reverse": 1, "forward": 2}
INF = float("inf")
HOPPER = 232448  # bytes of shared memory that a block may ask for
BLACKWELL_DESKTOP = 101376
PLAIN, CAPPED = (1.0, None), (0.7, 5.0)

SHIM = """
using namespace warp_fast;

struct Call {
    void *logits, *anchor;
    int code, anchor_code;
    int64_t token, width;
    double softcap, temperature;
    int exact;
    float* upstream;
    float* stats;
    double* state;
    void* gradient;
};

LossRows rows_of(const Call& row) {
    return {{row.logits, row.width, 1, 0, row.code}, {row.anchor, row.width, 1, 0, row.anchor_code},
            &row.token, 1, row.width, row.softcap, row.temperature,
            static_cast<ExactKl>(row.exact)};
}

LossStats stats_of(const Call& row) {
    return {row.stats, row.stats + 1, row.stats + 2, row.stats + 3, row.state};
}

const uint8_t kept = 1;

extern "C" void separate(const Call* row) {
    loss_stats_cuda(rows_of(*row), &kept, true, stats_of(*row), nullptr);
    loss_gradient_cuda(rows_of(*row), row->upstream, row->state,
                       {row->gradient, row->width, 1, 0, row->code}, nullptr);
}

// the gradient over the logits
extern "C" void fused(const Call* row, int shared, int cluster) {
    on_cpu::shared_of_a_block = shared, on_cpu::largest_cluster = cluster;
    loss_fused_cuda(rows_of(*row), &kept, row->upstream, stats_of(*row),
                    {row->logits, row->width, 1, 0, row->code}, nullptr);
}

extern "C" void slices(int64_t width, int bytes, int64_t shared, int most, int64_t* found) {
    const Slices cut = slices_of(width, bytes, shared, most);
    found[0] = cut.parts, found[1] = cut.vectors, found[2] = cut.resident;
}

extern "C" void bytes_at(const char* place, int skip, const char* end, char* found) {
    const Word word = window(place, skip, end);
    for (int i = 0; i < 16; ++i) found[i] = reinterpret_cast<const char*>(&word)[i];
}
"""


class Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "anchor")),
        *((name, ctypes.c_int) for name in ("code", "anchor_code")),
        *((name, ctypes.c_int64) for name in ("token", "width")),
        *((name, ctypes.c_double) for name in ("softcap", "temperature")),
        ("exact", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("upstream", "stats", "state", "gradient")),
    )


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = build(tmp_path_factory.mktemp("kernels"), "loss.cu", SHIM)
    pointer, whole, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.fused.argtypes = [pointer, number, number]
    library.slices.argtypes = [whole, number, whole, number, pointer]
    library.bytes_at.argtypes = [pointer, number, pointer, pointer]
    return library


Found = tuple[Tensor, Tensor]


def placed(values: Tensor, skip: int) -> Tensor:
    """A row that begins `skip` elements into an aligned word, among NaN."""
    around = torch.full((len(values) + 64,), float("nan"), dtype=values.dtype)
    at = (-around.data_ptr() % 16) // values.element_size() + 16 + skip
    around[at : at + len(values)] = values
    return around[at : at + len(values)]


def found(
    kernels: Any,
    logits: Tensor,
    anchor: Tensor | None,
    token: int,
    upstream: Tensor,
    head: tuple[float, float | None] = PLAIN,
    kl: str = "",
    skip: int = 0,
    fused: bool = False,
    shared: int = HOPPER,
    cluster: int = 16,
) -> Found:
    stats, state = torch.empty(4), torch.empty(8, dtype=FP64)
    row, gradient = placed(logits, skip), placed(torch.zeros_like(logits), skip)
    other = None if anchor is None else placed(anchor, skip)
    around = row._base
    assert around is not None
    before = around.clone()
    asked = Call(
        row.data_ptr(), None if other is None else other.data_ptr(), CODES[logits.dtype],
        CODES[FP32 if anchor is None else anchor.dtype], token, len(logits), head[1] or 0.0,
        head[0], EXACT[kl], upstream.data_ptr(), stats.data_ptr(), state.data_ptr(),
        gradient.data_ptr(),
    )  # fmt: skip
    if fused:
        kernels.fused(ctypes.byref(asked), shared, cluster)
        gradient = row.clone()
        row.copy_(logits)
    else:
        kernels.separate(ctypes.byref(asked))
    bits = torch.int32 if around.element_size() == 4 else torch.int16
    assert torch.equal(around.view(bits), before.view(bits)), "written beside the row"
    return stats, gradient


def plain(
    logits: Tensor,
    anchor: Tensor | None,
    token: int,
    upstream: Tensor,
    head: tuple[float, float | None],
    kl: str,
    dtype: torch.dtype,
) -> Found:
    """The reference in `dtype`."""
    row, other = logits[None].to(dtype), None if anchor is None else anchor[None].to(dtype)
    ids, mask = torch.tensor([token]), torch.tensor([True])
    stats = reference.token_stats_reference(row, ids, mask, other, *head, kl, True)
    up = upstream[None].to(dtype)
    gradient = reference.token_stats_backward_reference(up, row, ids, other, *head, kl)
    return torch.cat(stats), gradient[0]


def check(
    kernels: Any,
    logits: Tensor,
    anchor: Tensor | None,
    token: int,
    head: tuple[float, float | None] = PLAIN,
    kl: str = "",
    **options: Any,
) -> None:
    """Both ways to the gradient, against float64."""
    upstream = torch.randn(3) * torch.tensor([1, 1, bool(kl)])
    gold = plain(logits, anchor, token, upstream, head, kl, FP64)
    eager = plain(logits, anchor, token, upstream, head, kl, FP32)
    scale = 1 + max(largest(x[x.isfinite()]) for x in (gold[0], logits))
    for fused in (False, True):
        ours = found(kernels, logits, anchor, token, upstream, head, kl, fused=fused, **options)
        assert ours[0][0] <= 0 and ours[0][2] <= 0 and ours[0][1] >= 0 and ours[0][3] >= 0
        assert_close(f"statistics, {fused=}", ours[0], gold[0], eager[0], scale)
        rounded = eager[1].to(logits.dtype)
        assert_close(f"gradient, {fused=}", ours[1], gold[1], rounded)


@pytest.mark.parametrize("head", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("kl", [None, "", "reverse", "forward"])
@pytest.mark.parametrize("size", [1, 7, 8, 2003])
def test_a_row(
    kernels: ctypes.CDLL, size: int, kl: str | None, head: tuple[float, float | None]
) -> None:
    """With a likely token, whose sums are relative to it, and with others."""
    logits = torch.randn(size) * 3
    anchor = None if kl is None else logits + 0.1 * torch.randn(size)
    for token in {int(logits.argmax()), 0, size - 1}:
        check(kernels, logits, anchor, token, head, kl or "")


@pytest.mark.parametrize("kl", [None, "", "reverse", "forward"])
@pytest.mark.parametrize("shared", [HOPPER, 9000], ids=["kept", "partly kept"])
@pytest.mark.parametrize("cluster", [8, 16])
def test_a_row_of_many_blocks(
    kernels: ctypes.CDLL, kl: str | None, shared: int, cluster: int
) -> None:
    logits = torch.randn(300_001) * 3
    anchor = None if kl is None else logits + 0.1 * torch.randn(300_001)
    for token in (int(logits.argmax()), 150_000):
        logits[token] += 10 * (token != 150_000)
        check(kernels, logits, anchor, token, kl=kl or "", shared=shared, cluster=cluster)


@pytest.mark.parametrize("kl", ["", "reverse", "forward"])
@pytest.mark.parametrize("skip", [0, 1, 6])
@pytest.mark.parametrize(
    "dtypes", [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, BF16), (FP32, FP32)]
)
def test_dtypes_at_any_alignment(
    kernels: ctypes.CDLL, dtypes: tuple[torch.dtype, torch.dtype], skip: int, kl: str
) -> None:
    logits = torch.randn(2003) * 3
    anchor = (logits + 0.1 * torch.randn(2003)).to(dtypes[1])
    logits = logits.to(dtypes[0])
    for token in (int(logits.argmax()), 2002):
        check(kernels, logits, anchor, token, kl=kl, skip=skip)


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_merging_slices(kernels: ctypes.CDLL, kl: str) -> None:
    """Also of one that is far above or below the others."""
    for far in (-100.0, 0.0, 100.0):
        logits = torch.randn(2003) * 3
        logits[:8] += far
        anchor = logits + 0.1 * torch.randn(2003)
        check(kernels, logits, anchor, 1000, kl=kl)


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_policy_and_anchor_a_constant_apart(kernels: ctypes.CDLL, kl: str) -> None:
    for constant in (-10.0, 100.0):
        logits = torch.randn(2003) * 3
        anchor = logits + 0.1 * torch.randn(2003) + constant
        check(kernels, logits, anchor, int(logits.argmax()), kl=kl)


@pytest.mark.parametrize("fused", [False, True])
def test_tokens_at_minus_infinity(kernels: ctypes.CDLL, fused: bool) -> None:
    for kept in (1, 2, 20):
        logits, anchor = torch.randn(40), torch.randn(40)
        logits[kept:] = anchor[kept:] = -INF
        for kl in ("", "reverse", "forward"):
            check(kernels, logits, anchor, kept - 1, kl=kl)
    stats, gradient = found(kernels, logits[20:], None, 3, torch.ones(3), fused=fused)
    assert stats[0].isnan() and gradient.isnan().any()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_an_infinite_kl_that_nobody_asks_the_gradient_of(
    kernels: ctypes.CDLL, kl: str, fused: bool
) -> None:
    logits, anchor = torch.randn(40), torch.randn(40)
    (anchor if kl == "reverse" else logits)[7] = -INF
    upstream = torch.tensor([1.0, 0.0, 0.0])
    stats, gradient = found(kernels, logits, anchor, 3, upstream, kl=kl, fused=fused)
    assert stats[3] == INF
    alone = plain(logits, anchor, 3, upstream, PLAIN, "", FP64)[1]
    assert (gradient - alone).abs().max() < 1e-6


@pytest.mark.parametrize("kl", ["", "reverse"])
def test_logits_of_1e4(kernels: ctypes.CDLL, kl: str) -> None:
    for signs, token in (([1, -1, -1], 0), ([1, 1, -1], 1), ([-1, 1, 1], 0), ([1, 1, 1], 2)):
        logits = torch.tensor(signs) * 1e4
        check(kernels, logits, logits.roll(1), token, kl=kl)


@pytest.mark.parametrize("fused", [False, True])
def test_the_largest_numbers(kernels: ctypes.CDLL, fused: bool) -> None:
    top = torch.finfo(FP32).max
    logits = torch.tensor([top, -top] * 20)
    stats, _ = found(kernels, logits, None, 0, torch.ones(3), fused=fused)
    assert stats[:2].isfinite().all()
    assert stats[0] == pytest.approx(-torch.log(torch.tensor(20.0)))


def test_logits_that_are_all_large_and_near_each_other(kernels: ctypes.CDLL) -> None:
    """What counts nothing has a score that cannot be told from the others at this size."""
    logits = 1e10 + torch.arange(40) * 4096.0
    check(kernels, logits, logits.flip(0), 39, kl="reverse")
    check(kernels, torch.full((40,), 1e10), None, 3)


@pytest.mark.parametrize("depth", [88.0, 104.0, 300.0])
def test_logprobs_whose_probability_underflows(kernels: ctypes.CDLL, depth: float) -> None:
    logits = torch.randn(50)
    logits[3] -= depth
    check(kernels, logits, None, 3)


@pytest.mark.parametrize("fused", [False, True])
def test_nan_reaches_every_statistic_it_is_part_of(kernels: ctypes.CDLL, fused: bool) -> None:
    for at in (0, 20, 39):
        logits, anchor = torch.randn(40), torch.randn(40)
        logits[at] = float("nan")
        for kl in ("reverse", "forward"):
            stats, _ = found(kernels, logits, anchor, 20, torch.ones(3), kl=kl, fused=fused)
            assert stats.isnan().tolist() == [True, True, False, True]
            stats, _ = found(kernels, anchor, logits, 20, torch.ones(3), kl=kl, fused=fused)
            assert stats.isnan().tolist() == [False, False, True, True]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("token", [-1, 40, 2**40])
def test_a_token_outside_the_vocabulary(kernels: ctypes.CDLL, token: int, fused: bool) -> None:
    stats, _ = found(kernels, torch.randn(40), torch.randn(40), token, torch.ones(3), fused=fused)
    assert stats[0].isnan() and stats[2].isnan()


@pytest.mark.parametrize("fused", [False, True])
def test_equal_rows_have_no_kl(kernels: ctypes.CDLL, fused: bool) -> None:
    logits = torch.randn(1000) * 5
    for token in (3, int(logits.argmax())):
        for kl in ("reverse", "forward"):
            stats, _ = found(kernels, logits, logits, token, torch.ones(3), CAPPED, kl, fused=fused)
            assert stats[0] == stats[2] and stats[3] == 0


@pytest.mark.parametrize("fused", [False, True])
def test_no_gradient_is_zeros(kernels: ctypes.CDLL, fused: bool) -> None:
    logits = torch.randn(1003)
    logits[5] = float("nan")
    _, gradient = found(kernels, logits, None, 3, torch.zeros(3), fused=fused)
    assert not gradient.any()


def cut(
    kernels: Any, width: int, size: int, shared: int = HOPPER, most: int = 8
) -> tuple[int, int, int]:
    numbers = torch.empty(3, dtype=torch.int64)
    kernels.slices(width, size, shared, most, numbers.data_ptr())
    parts, vectors, resident = numbers.tolist()
    return parts, vectors, resident


@pytest.mark.parametrize("most", [8, 16])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_slices_cover_the_row_and_fit(kernels: ctypes.CDLL, size: int, most: int) -> None:
    widths = {2**k + d for k in range(25) for d in (-1, 0, 1) if 2**k + d > 0}
    widths |= {50257, 128256, 256000, 256128, 262208, *random.Random(0).sample(range(1, 2**20), 99)}
    for width in widths:
        for shared in (0, BLACKWELL_DESKTOP, HOPPER):
            parts, vectors, resident = cut(kernels, width, size, shared, most)
            assert parts in (1, 2, 4, 8, most)
            assert (parts - 1) * vectors * 8 < width <= parts * vectors * 8
            assert 0 <= resident <= vectors and resident * 8 * size <= shared
            # nothing is left out that would have fit
            assert resident == vectors or (resident + 1) * 8 * size > shared


def test_slices_of_gemma(kernels: ctypes.CDLL) -> None:
    """bf16 policy and anchor, 4 bytes, stay on chip, three blocks to a processor of a Hopper."""
    for width in (256128, 262144, 262208):
        parts, vectors, resident = cut(kernels, width, 4, most=16)
        assert parts == 16 and resident == vectors and 3 * (vectors * 8 * 4 + 1536) < HOPPER
        assert cut(kernels, width, 4)[0] == 8
    for width, parts in ((7, 1), (32768, 1), (50257, 2), (128256, 4), (2**20, 8)):
        assert cut(kernels, width, 2)[0] == parts
    _, vectors, resident = cut(kernels, 2**20, 8, most=16)
    assert 0 < resident < vectors


def test_words_at_any_address(kernels: ctypes.CDLL) -> None:
    numbers = torch.randint(0, 256, (64,), dtype=torch.uint8)
    offset = -numbers.data_ptr() % 16
    place = numbers.data_ptr() + offset
    word = torch.empty(16, dtype=torch.uint8)
    for skip in range(0, 16, 2):
        for length in range(2, 18, 2):
            kernels.bytes_at(place, skip, place + skip + length, word.data_ptr())
            seen = min(length, 16)
            assert torch.equal(word[:seen], numbers[offset + skip :][:seen])
