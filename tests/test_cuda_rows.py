"""The arithmetic of the CUDA loss kernels, compiled as plain C++: slices, merges, gradient, cuts.

csrc/rows.cuh is all that the kernels compute; what is left to a GPU is who computes it and when.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tolerances import assert_close, largest
from warp_fast.reference import loss as reference

CSRC = Path(__file__).resolve().parents[1] / "csrc"
CXX = os.environ.get("CXX", "c++")
pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason="needs a C++ compiler")

FP32, FP64 = torch.float32, torch.float64
INF = float("inf")
HOPPER = 232448  # bytes of shared memory that a block may ask for
BLACKWELL_DESKTOP = 101376

SHIM = """
#include <vector>

#include "rows.cuh"
using namespace warp_fast;

// statistics, state and gradient of a row of which each of `threads` takes every so many vectors;
// tree: the sums are merged two by two, not all at once
template <class ASKED>
void run(const float* z, const float* w, int64_t width, int64_t token, int threads, bool tree,
         Head head, const float* upstream, double* stats, float* dz) {
    const float picked = score(z[token], head), anchor_picked = w ? score(w[token], head) : 0;
    const float shift = ASKED::exact ? shift_of(picked, anchor_picked) : 0;
    const auto load = [&](const float* row, int64_t at, float (&u)[kVector]) {
        for (int i = 0; i < kVector; ++i) u[i] = row && at + i < width ? row[at + i] : 0;
        to_scores(u, head);
    };
    std::vector<Sums<double>> parts;
    for (int t = 0; t < threads; ++t) {
        Sums<float> sums;
        for (int64_t at = t * kVector; at < width; at += threads * kVector) {
            float u[kVector], v[kVector];
            load(z, at, u), load(w, at, v);
            for (int i = 0; i < kVector; ++i) {
                if (at + i >= width || at + i == token) u[i] = v[i] = -INFINITY;
            }
            add<ASKED>(sums, u, v, shift);
        }
        parts.push_back({sums.top, sums.total, sums.weighted, sums.anchor_top, sums.anchor_total,
                         sums.apart});
    }
    while (parts.size() > 1) {
        const size_t taken = tree ? 2 : parts.size();
        double top = -INFINITY, anchor_top = -INFINITY;
        for (size_t k = 0; k < taken; ++k) {
            top = larger(top, parts[k].top);
            anchor_top = larger(anchor_top, parts[k].anchor_top);
        }
        Sums<double> all = {top, 0, 0, anchor_top, 0, 0};
        for (size_t k = 0; k < taken; ++k) {
            const Sums<double> part = lifted<ASKED>(parts[k], top, anchor_top);
            all.total += part.total, all.weighted += part.weighted;
            all.anchor_total += part.anchor_total, all.apart += part.apart;
        }
        parts.erase(parts.begin(), parts.begin() + taken);
        parts.push_back(all);
    }
    const Row row = finished<ASKED>(parts[0], picked, anchor_picked);
    const double found[] = {row.logprob, row.entropy, row.anchor_logprob, row.kl};
    for (int i = 0; i < 4; ++i) stats[i] = found[i];
    const Coefficients c = coefficients_of(upstream, row.state);
    for (int64_t at = 0; at < width; at += kVector) {
        float u[kVector], v[kVector], du[kVector];
        load(z, at, u), load(w, at, v);
        gradient<ASKED::exact>(c, u, v, at <= token && token < at + kVector ? token - at : -1, du);
        for (int i = 0; i < kVector; ++i) u[i] = at + i < width ? z[at + i] : 0;
        through_head(u, head, du);
        for (int i = 0; i < kVector && at + i < width; ++i) dz[at + i] = du[i];
    }
}

extern "C" void row(const float* z, const float* w, int64_t width, int64_t token, int threads,
                    bool tree, double softcap, double temperature, int exact, const float* upstream,
                    double* stats, float* dz) {
    const auto chosen = exact == kReverse   ? run<Asked<true, true, kReverse>>
                        : exact == kForward ? run<Asked<true, true, kForward>>
                        : w                 ? run<Asked<true, true, kNoKl>>
                                            : run<Asked<true, false, kNoKl>>;
    const Head head = head_of(softcap, temperature);
    chosen(z, w, width, token, threads, tree, head, upstream, stats, dz);
}

extern "C" void slices(int64_t width, int bytes, int64_t shared, int64_t* found) {
    const Slices cut = slices_of(width, bytes, shared);
    found[0] = cut.parts, found[1] = cut.vectors, found[2] = cut.resident;
}

extern "C" void bytes_at(const char* place, int skip, const char* end, char* found) {
    const Word word = window(place, skip, end);
    for (int i = 0; i < 16; ++i) found[i] = reinterpret_cast<const char*>(&word)[i];
}
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "shim.cpp").write_text(SHIM)
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", f"-I{CSRC}"]
    subprocess.run(
        [CXX, *flags, str(folder / "shim.cpp"), "-o", str(folder / "shim.so")],
        check=True,
    )
    library = ctypes.CDLL(str(folder / "shim.so"))
    pointer, whole, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    library.row.argtypes = [
        pointer, pointer, whole, whole, ctypes.c_int, ctypes.c_bool, real, real, ctypes.c_int,
        pointer, pointer, pointer,
    ]  # fmt: skip
    library.slices.argtypes = [whole, ctypes.c_int, whole, pointer]
    library.bytes_at.argtypes = [pointer, ctypes.c_int, pointer, pointer]
    return library


Found = tuple[Tensor, Tensor]


def found(
    rows: Any,
    logits: Tensor,
    anchor: Tensor | None,
    token: int,
    upstream: Tensor,
    head: tuple[float, float | None] = (1.0, None),
    kl: str = "",
    threads: int = 5,
    tree: bool = False,
) -> Found:
    stats, gradient = torch.empty(4, dtype=FP64), torch.empty_like(logits)
    exact = {"": 0, "reverse": 1, "forward": 2}[kl]
    rows.row(
        logits.data_ptr(), None if anchor is None else anchor.data_ptr(), len(logits), token,
        threads, tree, head[1] or 0.0, head[0], exact, upstream.data_ptr(), stats.data_ptr(),
        gradient.data_ptr(),
    )  # fmt: skip
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
    rows: Any,
    logits: Tensor,
    anchor: Tensor | None,
    token: int,
    head: tuple[float, float | None] = (1.0, None),
    kl: str = "",
    **options: Any,
) -> None:
    upstream = torch.randn(3) * torch.tensor([1, 1, bool(kl)])
    ours = found(rows, logits, anchor, token, upstream, head, kl, **options)
    gold = plain(logits, anchor, token, upstream, head, kl, FP64)
    eager = plain(logits, anchor, token, upstream, head, kl, FP32)
    assert ours[0][0] <= 0 and ours[0][2] <= 0 and ours[0][1] >= 0 and ours[0][3] >= 0
    scale = 1 + max(largest(x[x.isfinite()]) for x in (gold[0], logits))
    assert_close("statistics", ours[0].float(), gold[0], eager[0], scale)
    assert_close("gradient", ours[1], gold[1], eager[1])


@pytest.mark.parametrize("head", [(1.0, None), (0.7, 5.0)], ids=["plain", "capped"])
@pytest.mark.parametrize("kl", [None, "", "reverse", "forward"])
@pytest.mark.parametrize("size", [1, 7, 8, 2003])
def test_a_row(
    rows: ctypes.CDLL, size: int, kl: str | None, head: tuple[float, float | None]
) -> None:
    logits = torch.randn(size) * 3
    anchor = None if kl is None else logits + 0.1 * torch.randn(size)
    for token in {0, size // 2, size - 1}:
        check(rows, logits, anchor, token, head, kl or "")


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 31, 300])
@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_merging_slices(rows: ctypes.CDLL, kl: str, threads: int, tree: bool) -> None:
    """Also of slices with nothing in them, and of one that is far above or below the others."""
    for far in (-100.0, 0.0, 100.0):
        logits = torch.randn(2003) * 3
        logits[:8] += far
        anchor = logits + 0.1 * torch.randn(2003)
        check(rows, logits, anchor, 1000, kl=kl, threads=threads, tree=tree)


@pytest.mark.parametrize("threads", [1, 3])
def test_tokens_at_minus_infinity(rows: ctypes.CDLL, threads: int) -> None:
    for kept in (1, 2, 20):
        logits, anchor = torch.randn(40), torch.randn(40)
        logits[kept:] = anchor[kept:] = -INF
        check(rows, logits, anchor, kept - 1, kl="forward", threads=threads)
    stats, gradient = found(rows, logits[20:], None, 3, torch.ones(3))
    assert stats[0].isnan() and gradient.isnan().any()


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_an_infinite_kl_that_nobody_asks_the_gradient_of(rows: ctypes.CDLL, kl: str) -> None:
    logits, anchor = torch.randn(40), torch.randn(40)
    (anchor if kl == "reverse" else logits)[7] = -INF
    upstream = torch.tensor([1.0, 0.0, 0.0])
    stats, gradient = found(rows, logits, anchor, 3, upstream, kl=kl)
    assert stats[3] == INF
    assert torch.equal(gradient, found(rows, logits, anchor, 3, upstream)[1])


@pytest.mark.parametrize("kl", ["", "reverse"])
def test_logits_of_1e4(rows: ctypes.CDLL, kl: str) -> None:
    for signs, token in (([1, -1, -1], 0), ([1, 1, -1], 1), ([-1, 1, 1], 0), ([1, 1, 1], 2)):
        logits = torch.tensor(signs) * 1e4
        check(rows, logits, logits.roll(1), token, kl=kl, threads=2)


def test_the_largest_numbers(rows: ctypes.CDLL) -> None:
    top = torch.finfo(FP32).max
    stats, _ = found(rows, torch.tensor([top, -top] * 20), None, 0, torch.ones(3), threads=3)
    assert stats[:2].isfinite().all()
    assert stats[0] == pytest.approx(-torch.log(torch.tensor(20.0)))


@pytest.mark.parametrize("depth", [88.0, 104.0, 300.0])
def test_logprobs_whose_probability_underflows(rows: ctypes.CDLL, depth: float) -> None:
    logits = torch.randn(50)
    logits[3] -= depth
    check(rows, logits, None, 3)


def test_nan_reaches_every_statistic_it_is_part_of(rows: ctypes.CDLL) -> None:
    for at in (0, 20, 39):
        logits, anchor = torch.randn(40), torch.randn(40)
        logits[at] = float("nan")
        for kl in ("reverse", "forward"):
            stats, _ = found(rows, logits, anchor, 20, torch.ones(3), kl=kl)
            assert stats.isnan().tolist() == [True, True, False, True]
            stats, _ = found(rows, anchor, logits, 20, torch.ones(3), kl=kl)
            assert stats.isnan().tolist() == [False, False, True, True]


def test_equal_rows_have_no_kl(rows: ctypes.CDLL) -> None:
    logits = torch.randn(1000) * 5
    for kl in ("reverse", "forward"):
        stats, _ = found(rows, logits, logits, 3, torch.ones(3), (0.7, 5.0), kl, threads=40)
        assert stats[0] == stats[2] and stats[3] == 0


def cut(rows: Any, width: int, size: int, shared: int) -> tuple[int, int, int]:
    numbers = torch.empty(3, dtype=torch.int64)
    rows.slices(width, size, shared, numbers.data_ptr())
    parts, vectors, resident = numbers.tolist()
    return parts, vectors, resident


def test_slices_cover_the_row_and_fit(rows: ctypes.CDLL) -> None:
    widths = {2**k + d for k in range(25) for d in (-1, 0, 1) if 2**k + d > 0}
    widths |= {50257, 128256, 256000, 256128, 262208, *random.Random(0).sample(range(1, 2**20), 99)}
    for width in widths:
        for size in (2, 4):
            for shared in (0, BLACKWELL_DESKTOP, HOPPER):
                parts, vectors, resident = cut(rows, width, size, shared)
                assert parts in (1, 2, 4, 8)
                assert (parts - 1) * vectors * 8 < width <= parts * vectors * 8
                assert 0 <= resident <= vectors and resident * 8 * size <= max(shared - 1024, 0)
                # nothing is left out that would have fit
                assert resident == vectors or (resident + 1) * 8 * size > shared - 1024


def test_slices_of_gemma(rows: ctypes.CDLL) -> None:
    """8 blocks, and the whole bf16 or fp32 row stays on chip; not so a row of a million."""
    for width in (256128, 262144, 262208):
        for size in (2, 4):
            parts, vectors, resident = cut(rows, width, size, HOPPER)
            assert parts == 8 and resident == vectors
    for width, parts in ((7, 1), (32768, 1), (50257, 2), (128256, 4), (2**20, 8)):
        assert cut(rows, width, 2, HOPPER)[0] == parts
    _, vectors, resident = cut(rows, 2**20, 4, HOPPER)
    assert 0 < resident < vectors


def test_words_at_any_address(rows: ctypes.CDLL) -> None:
    numbers = torch.randint(0, 256, (64,), dtype=torch.uint8)
    offset = -numbers.data_ptr() % 16
    place = numbers.data_ptr() + offset
    word = torch.empty(16, dtype=torch.uint8)
    for skip in range(0, 16, 2):
        for length in range(2, 18, 2):
            rows.bytes_at(place, skip, place + skip + length, word.data_ptr())
            seen = min(length, 16)
            assert torch.equal(word[:seen], numbers[offset + skip :][:seen])
