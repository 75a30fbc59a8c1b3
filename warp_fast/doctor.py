"""What works on this machine and why the rest does not: backends, attention, tools, versions."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from warp_fast._backend import BACKENDS, MISSING, SERVED, able, resolve


class Row(NamedTuple):
    """One line of the report: what, whether it works (None: neither good nor bad), and why."""

    name: str
    works: bool | None
    reason: str


def report() -> dict[str, list[Row]]:
    """Everything that `warp-fast doctor` prints, by section."""
    return {
        "backends": [backend_row(name) for name in BACKENDS],
        "what auto takes": [chosen_row(op, device) for op in SERVED for device in _devices()],
        "attention": attention_rows(),
        "to build the extension": [compiler_row(), nvcc_row()],
        "packages": [package_row(name, extra) for name, extra in _PACKAGES.items()],
    }


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def backend_row(name: str) -> Row:
    """Whether a backend can be used in this process."""
    missing = MISSING[name]
    if missing is not None:
        return Row(name, False, missing)
    if name in ("triton", "cuda") and not torch.cuda.is_available():
        return Row(name, False, "installed, but there is no CUDA device")
    return Row(name, True, _WHAT[name]())


def _extension_says() -> str:
    module = importlib.import_module("warp_fast._C")
    return f"C++ kernels, {module.instructions} instructions"


_WHAT: dict[str, Callable[[], str]] = {
    "reference": lambda: "plain PyTorch, every device and dtype; the definition",
    "cpp": _extension_says,
    "triton": lambda: f"triton {_version('triton')}",
    "cuda": lambda: "CUDA kernels of the extension",
}


def chosen_row(op: str, device: str) -> Row:
    """What `backend="auto"` means for an op, and what else serves it."""
    where = torch.device(device)
    try:
        chosen = resolve(op, "auto", where)
    except ValueError as error:  # of WARP_FAST_BACKEND
        return Row(f"{op} on {device}", False, str(error))
    others = [name for name in able(op, where) if name != chosen]
    also = f" (also {', '.join(others)})" if others else ""
    return Row(f"{op} on {device}", None, chosen + also)


def attention_rows() -> list[Row]:
    """The attention kernels of transformers that could run here, best first."""
    cuda = torch.cuda.is_available()
    rows = []
    for name, module, what in (
        ("flash_attention_2", "flash_attn", "any softcap, head sizes up to 256"),
        ("flash_attention_3", "flash_attn_interface", "Hopper"),
    ):
        found = importlib.util.find_spec(module) is not None
        reason = what if found and cuda else "there is no CUDA device" if found else None
        rows.append(Row(name, found and cuda, reason or f"the package {module} is not installed"))
    rows.append(Row("flex_attention", True, "torch's own, any softcap; compiles for each shape"))
    rows.append(Row("sdpa", True, "torch's own, no softcap: not for Gemma 2"))
    rows.append(Row("eager", True, "any model; the definition"))
    return rows


def compiler_row() -> Row:
    """Whether the extension could be compiled."""
    words = shlex.split(os.environ.get("CXX", "c++")) or [""]  # such as "ccache g++"
    found = shutil.which(words[0])
    return Row("C++ compiler", found is not None, found or "not on the PATH (nor named by CXX)")


def nvcc_row() -> Row:
    """Whether CUDA kernels could be compiled, and for what."""
    asked = os.environ.get("WARP_FAST_CUDA_ARCHS")
    targets = f"; WARP_FAST_CUDA_ARCHS={asked}" if asked else ""
    found = shutil.which("nvcc")
    return Row("nvcc", found is not None, (found or "not on the PATH: no CUDA kernels") + targets)


# package -> the extra that installs it
_PACKAGES = {
    "torch": "",
    "triton": "triton",
    "transformers": "rl",
    "safetensors": "rl",
    "jsonargparse": "rl",
    "flash-attn": "flash",
    "xformers": "xformers",
    "ray": "ray",
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_row(name: str, extra: str) -> Row:
    """The version of a package, or how to install it."""
    version = _version(name)
    missing = f"not installed; pip install 'warp_fast[{extra}]'"
    return Row(name, version is not None, version or missing)


def main(arguments: Sequence[str]) -> int:
    """Print the report; the exit status is 0, since a missing part is not a fault."""
    if arguments:
        print(
            "usage: warp-fast doctor\n\nSay what works on this machine, and why the rest does not."
        )
        return 0 if list(arguments) in (["-h"], ["--help"]) else 2
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    print(f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {where}")
    for title, rows in report().items():
        print(f"\n{title}")
        width = max(len(row.name) for row in rows)
        for row in rows:
            mark = {True: "yes", False: "no", None: ""}[row.works]
            print(f"  {row.name:{width}}  {mark:3}  {row.reason}")
    return 0
