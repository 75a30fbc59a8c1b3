"""How the CUDA kernels of the loss cut a row, and read words at any address; as plain C++."""

from __future__ import annotations

import ctypes
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compiled import CXX, HAS_COMPILER, ROOT

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")

HOPPER = 232448 - 1024  # bytes of shared memory that a block may ask for, and what is not for rows
BLACKWELL_DESKTOP = 101376 - 1024

SHIM = """
#include "rows.cuh"
using namespace warp_fast;

extern "C" void slices(int64_t width, int bytes, int64_t shared, int most, int64_t* found) {
    const Slices cut = slices_of(width, bytes, shared, most);
    found[0] = cut.parts, found[1] = cut.vectors, found[2] = cut.resident;
}

extern "C" void bytes_at(const char* place, int skip, const char* end, char* found) {
    const Word word = window(place, skip, end);
    for (int i = 0; i < 16; ++i) found[i] = reinterpret_cast<const char*>(&word)[i];
}
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp("rows")
    (folder / "shim.cpp").write_text(SHIM)
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}"]
    command = [CXX, *flags, str(folder / "shim.cpp"), "-o", str(folder / "shim.so")]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "shim.so"))
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    library.slices.argtypes = [whole, ctypes.c_int, whole, ctypes.c_int, pointer]
    library.bytes_at.argtypes = [pointer, ctypes.c_int, pointer, pointer]
    return library


def cut(
    rows: Any, width: int, size: int, shared: int = HOPPER, most: int = 8
) -> tuple[int, int, int]:
    numbers = torch.empty(3, dtype=torch.int64)
    rows.slices(width, size, shared, most, numbers.data_ptr())
    parts, vectors, resident = numbers.tolist()
    return parts, vectors, resident


@pytest.mark.parametrize("most", [8, 16])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_slices_cover_the_row_and_fit(rows: ctypes.CDLL, size: int, most: int) -> None:
    widths = {2**k + d for k in range(25) for d in (-1, 0, 1) if 2**k + d > 0}
    widths |= {50257, 128256, 256000, 256128, 262208, *random.Random(0).sample(range(1, 2**20), 99)}
    for width in widths:
        for shared in (0, BLACKWELL_DESKTOP, HOPPER):
            parts, vectors, resident = cut(rows, width, size, shared, most)
            assert parts in (1, 2, 4, 8, most)
            assert (parts - 1) * vectors * 8 < width <= parts * vectors * 8
            assert 0 <= resident <= vectors and resident * 8 * size <= shared
            # nothing is left out that would have fit
            assert resident == vectors or (resident + 1) * 8 * size > shared


def test_slices_of_gemma(rows: ctypes.CDLL) -> None:
    """bf16 policy and anchor, 4 bytes, stay on chip, three blocks to a processor of a Hopper."""
    for width in (256128, 262144, 262208):
        parts, vectors, resident = cut(rows, width, 4, most=16)
        assert parts == 16 and resident == vectors and 3 * (vectors * 8 * 4 + 1536) < HOPPER
        assert cut(rows, width, 4)[0] == 8
    for width, parts in ((7, 1), (32768, 1), (50257, 2), (128256, 4), (2**20, 8)):
        assert cut(rows, width, 2)[0] == parts
    _, vectors, resident = cut(rows, 2**20, 8, most=16)
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
