"""The kernels of csrc/*.cu as a CPU runs them, with tests/cuda_on_cpu.h in place of CUDA.

A test file that calls the launchers of the CUDA backend asks for the fixture `cuda_kernels`: on a
GPU it does nothing, else the launchers find these kernels in place of those of warp_fast._C.
"""

from __future__ import annotations

import functools
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.compiled import HAS_COMPILER, OPS, ROOT, compiled, folder_of, write
from warp_fast._backend import MISSING

HEADERS = "cooperative_groups cuda_bf16 cuda_fp16 cuda_pipeline_primitives cuda_runtime".split()
# why the kernels run neither on a GPU nor here
ABSENT = MISSING["cuda"] if torch.cuda.is_available() else None
if not torch.cuda.is_available() and not (HAS_COMPILER and sys.platform == "linux"):
    ABSENT = "needs a GPU, or Linux and a C++ compiler"

MODULE = """
#include "bindings.h"
#include "cuda_on_cpu.h"

PYBIND11_MODULE(_C, m) {
    warp_fast::bind_cuda(m);
    m.def("set_limits", [](int shared, int cluster) {
        on_cpu::shared_of_a_block = shared, on_cpu::largest_cluster = cluster;
    });
}
"""


def as_cpp(source: str) -> str:
    """What C++ has no word for: shared variables and launches."""
    source = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];", r"#define \2 on_cpu::dynamic<\1>()", source
    )
    source = re.sub(
        r"__shared__ (\w+) (\w+)((?:\[[^;]*\])?);", r"auto& \2 = on_cpu::fixed<\1\3>();", source
    )
    return re.sub(r"(\w+)<<<(.*?)>>>\(", r"on_cpu::launched(\1, \2)(", source, flags=re.DOTALL)


@functools.cache
def module() -> ModuleType:
    """The CUDA part of warp_fast._C, compiled for the CPU."""
    with folder_of("cuda_on_cpu") as folder:
        sources = [write(folder / "module.cpp", MODULE), ROOT / "csrc" / "bindings_cuda.cpp"]
        for op in OPS:
            code = as_cpp((ROOT / "csrc" / f"{op}.cu").read_text())
            sources.append(write(folder / f"{op}.cpp", code))
        for name in HEADERS:
            write(folder / f"{name}.h", '#include "cuda_on_cpu.h"\n')
        paths = (folder, ROOT / "tests", ROOT / "csrc")
        return compiled(folder, sources, " ".join(f'-I"{path}"' for path in paths))


@pytest.fixture
def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setitem(sys.modules, "warp_fast._C", module())
        stream = SimpleNamespace(cuda_stream=0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
