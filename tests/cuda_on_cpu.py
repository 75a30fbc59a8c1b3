"""The kernels of csrc/*.cu as a CPU runs them, with tests/cuda_on_cpu.h in place of CUDA.

A test file that calls the launchers of the CUDA backend asks for the fixture `cuda_kernels`: on a
GPU it does nothing, else the launchers find these kernels in place of those of warp_fast._C.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from warp_fast._backend import MISSING

ROOT = Path(__file__).resolve().parents[1]
CXX = os.environ.get("CXX", "c++")
OPS = ("ema", "gram", "loss", "slerp")
HEADERS = "cooperative_groups cuda_bf16 cuda_fp16 cuda_pipeline_primitives cuda_runtime".split()
HAS_COMPILER = shutil.which(CXX) is not None
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

NINJA = """
rule cxx
  command = {cxx} -std=c++17 -O1 -ffp-contract=off -fPIC -w {include} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} -shared $in -o $out
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


def write(path: Path, text: str) -> Path:
    """What is as it was keeps its date, and is not compiled again."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


@functools.cache
def module() -> ModuleType:
    """The CUDA part of warp_fast._C, compiled for the CPU into build/cuda_on_cpu."""
    import pybind11

    folder = ROOT / "build" / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sources = [write(folder / "module.cpp", MODULE), ROOT / "csrc" / "bindings_cuda.cpp"]
        for op in OPS:
            code = as_cpp((ROOT / "csrc" / f"{op}.cu").read_text())
            sources.append(write(folder / f"{op}.cpp", code))
        for name in HEADERS:
            write(folder / f"{name}.h", '#include "cuda_on_cpu.h"\n')
        paths = (folder, ROOT / "tests", ROOT / "csrc", sysconfig.get_path("include"))
        include = " ".join(f"-I{path}" for path in (*paths, pybind11.get_include()))
        built = [f"build {source.stem}.o: cxx {source}" for source in sources]
        objects = " ".join(f"{source.stem}.o" for source in sources)
        rules = NINJA.format(cxx=CXX, include=include)
        write(folder / "build.ninja", "\n".join([rules, *built, f"build _C.so: link {objects}\n"]))
        subprocess.run([sys.executable, "-m", "ninja", "-C", folder, "--quiet"], check=True)
    spec = importlib.util.spec_from_file_location("cuda_on_cpu._C", folder / "_C.so")
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setitem(sys.modules, "warp_fast._C", module())
        stream = SimpleNamespace(cuda_stream=0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
