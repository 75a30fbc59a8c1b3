"""Build warp_fast._C with ninja: C++ always, CUDA where nvcc is; what cannot be built is left out.

WARP_FAST_CUDA_ARCHS names the CUDA targets ("90a", "none"); by default those of the GPUs, else all.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
OPS = "ema gram loss slerp"
OBJECTS = {"cpu": f"bindings coefficients {OPS}", "avx2": OPS, "cuda": f"bindings {OPS}"}


def cuda_archs() -> str:
    asked = os.environ.get("WARP_FAST_CUDA_ARCHS", "")
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if not asked and shutil.which(query[0]):
        found = subprocess.run(query, capture_output=True, text=True).stdout.replace(".", "")
        asked = " ".join(sorted(set(found.split()))).replace("90", "90a")
    return (asked or "80 86 89 90a 100 120") if asked != "none" and shutil.which("nvcc") else ""


def ninja_file(archs: str) -> str:
    x86 = platform.machine() == "x86_64"
    parts = ["cpu"] + ["avx2"] * x86 + ["cuda"] * bool(archs)
    objects = " ".join(f"{name}.{part}.o" for part in parts for name in OBJECTS[part].split())
    return f"""src = ../../csrc
cxx = {os.environ.get("CXX", "c++")}
defines = {"-DWARP_FAST_HAS_AVX2" * x86}
cuda = {"-DWARP_FAST_HAS_CUDA" * bool(archs)}
headers = -isystem "{sysconfig.get_path("include")}" -isystem "{pybind11.get_include()}"
gencode = {" ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs.split())}
{chr(10).join(f"include $src/{part}.ninja" for part in parts)}
build _C.so: {"link_cuda" if archs else "link"} {objects}
"""


class Ninja(build_ext):
    def build_extension(self, ext: Extension) -> None:
        (scratch := ROOT / "build/ninja").mkdir(parents=True, exist_ok=True)
        for archs in dict.fromkeys([cuda_archs(), ""]):
            (scratch / "build.ninja").write_text(ninja_file(archs))
            if subprocess.run([sys.executable, "-m", "ninja", "-C", scratch]).returncode == 0:
                self.mkpath(os.path.dirname(target := self.get_ext_fullpath(ext.name)))
                return self.copy_file(str(scratch / "_C.so"), target)
        raise CompileError("warp_fast._C was not built; `pip install -v` shows why")


setup(ext_modules=[Extension("warp_fast._C", [], optional=True)], cmdclass={"build_ext": Ninja})
