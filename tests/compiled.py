"""C++ sources of the repository as a module of their own, built by ninja into build/."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
CXX = os.environ.get("CXX", "c++")
HAS_COMPILER = shutil.which((CXX.split() or [""])[0]) is not None
OPS = ("ema", "gram", "loss", "slerp")

NINJA = """
rule cxx
  command = {cxx} -std=c++17 -O1 -ffp-contract=off -fPIC -w {flags} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} -shared {flags} $in -o $out
"""


@contextmanager
def folder_of(name: str) -> Iterator[Path]:
    """build/<name>, for one process at a time."""
    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def write(path: Path, text: str) -> Path:
    """What is as it was keeps its date, and is not compiled again."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def compiled(folder: Path, sources: Sequence[Path], flags: str) -> ModuleType:
    """The module _C of these sources; what did not change is not compiled again."""
    import pybind11

    paths = (sysconfig.get_path("include"), pybind11.get_include())
    flags = " ".join([flags, *(f'-I"{path}"' for path in paths)]).replace("$", "$$")
    # relative: the path of the repository may hold what ninja reads otherwise
    places = [(source.stem, os.path.relpath(source, folder)) for source in sources]
    built = [f"build {stem}.o: cxx {place}" for stem, place in places]
    objects = " ".join(f"{source.stem}.o" for source in sources)
    rules = NINJA.format(cxx=CXX, flags=flags)
    write(folder / "build.ninja", "\n".join([rules, *built, f"build _C.so: link {objects}\n"]))
    subprocess.run([sys.executable, "-m", "ninja", "-C", folder, "--quiet"], check=True)
    spec = importlib.util.spec_from_file_location(f"{folder.name}._C", folder / "_C.so")
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
