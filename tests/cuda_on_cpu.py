"""Builds csrc/*.cu for the CPU, with tests/cuda_on_cpu.h in place of CUDA."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
CXX = os.environ.get("CXX", "c++")
HEADERS = "cooperative_groups cuda_bf16 cuda_fp16 cuda_pipeline_primitives cuda_runtime".split()


def has_compiler() -> bool:
    return shutil.which(CXX) is not None


def as_cpp(source: str) -> str:
    """What C++ has no word for: shared variables and launches."""
    source = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", _dynamic, source)
    source = re.sub(
        r"__shared__ (\w+) (\w+)((?:\[[^;]*\])?);", r"auto& \2 = on_cpu::fixed<\1\3>();", source
    )
    return re.sub(r"(\w+)<<<(.*?)>>>\(", r"on_cpu::launched(\1, \2)(", source, flags=re.DOTALL)


def _dynamic(found: re.Match[str]) -> str:
    return f"#define {found[2]} on_cpu::dynamic<{found[1]}>()"


def build(folder: Path, source: str, shim: str) -> ctypes.CDLL:
    """A library of csrc/`source` and of the functions that `shim` adds to it."""
    for name in HEADERS:
        (folder / f"{name}.h").write_text('#include "cuda_on_cpu.h"\n')
    cpp, library = folder / "kernels.cpp", folder / "kernels.so"
    cpp.write_text(as_cpp((CSRC / source).read_text()) + shim)
    include = [f"-I{path}" for path in (folder, Path(__file__).parent, CSRC)]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", *include]
    subprocess.run([CXX, *flags, str(cpp), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
