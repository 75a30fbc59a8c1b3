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


def ninja_file(target: str, archs: str) -> str:
    x86 = platform.machine() == "x86_64"
    parts = ["cpu"] + ["avx2"] * x86 + ["cuda"] * bool(archs)
    objects = " ".join(f"{name}.{part}.o" for part in parts for name in OBJECTS[part].split())
    return f"""src = {ROOT}/csrc
cxx = {os.environ.get("CXX", "c++")}
defines = {"-DWARP_FAST_HAS_AVX2" * x86}
cuda = {"-DWARP_FAST_HAS_CUDA" * bool(archs)}
headers = -isystem {sysconfig.get_path("include")} -isystem {pybind11.get_include()}
gencode = {" ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs.split())}
{chr(10).join(f"include $src/{part}.ninja" for part in parts)}
build {target}: {"link_cuda" if archs else "link"} {objects}
"""


class Ninja(build_ext):
    def build_extension(self, ext: Extension) -> None:
        os.makedirs(scratch := ROOT / "build/ninja", exist_ok=True)
        target = os.path.abspath(self.get_ext_fullpath(ext.name))
        for archs in dict.fromkeys([cuda_archs(), ""]):
            (scratch / "build.ninja").write_text(ninja_file(target, archs))
            if subprocess.run([sys.executable, "-m", "ninja", "-C", scratch]).returncode == 0:
                return
        raise CompileError("warp_fast._C was not built; `warp-fast doctor` says what is missing")


setup(ext_modules=[Extension("warp_fast._C", [], optional=True)], cmdclass={"build_ext": Ninja})
