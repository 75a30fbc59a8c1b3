"""The layout of the package, its build, and what an install without the extension does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from warp_fast import _backend

ROOT = Path(__file__).resolve().parents[1]


def test_kernels_is_not_importable_by_that_name() -> None:
    # an importable top-level `kernels` makes transformers take it for the package of that name
    assert not (ROOT / "kernels" / "__init__.py").exists()
    found = importlib.util.find_spec("kernels")
    assert found is None or found.origin is None or ROOT not in Path(found.origin).parents


def test_kernels_link_leads_home() -> None:
    link = ROOT / "warp_fast" / "kernels"
    assert link.is_symlink() and link.resolve() == ROOT / "kernels"
    assert os.readlink(link) == "../kernels"


def test_every_package_is_listed() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML itself")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = settings["tool"]["setuptools"]["packages"]
    found = {"warp_fast", "warp_fast.kernels"}
    for path in (ROOT / "warp_fast").rglob("__init__.py"):
        found.add(".".join(path.parent.relative_to(ROOT).parts))
    assert sorted(found) == listed


def test_an_update_loads_neither_triton_nor_dynamo() -> None:
    # each would take seconds at the first call
    code = (
        "import sys, torch, warp_fast\n"
        "warp_fast.ema_update_(torch.zeros(3), torch.ones(3), 0.5)\n"
        "heavy = ('triton', 'torch._dynamo', 'transformers', 'rich', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_the_extension_is_built_where_a_compiler_is() -> None:
    assert _backend.MISSING["cpp"] is None


def build(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run build_ext as pip does, into `source`."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "out"]
    return subprocess.run(
        command, cwd=source, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_install_without_a_working_compiler_goes_on(tmp_path: Path) -> None:
    # setup.py resolves its own path, so it must be a real copy to leave this tree's build alone
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text())
    done = build(tmp_path, CXX="/bin/false", WARP_FAST_CUDA_ARCHS="none")
    assert done.returncode == 0, done.stderr
    assert "warp_fast._C was not built" in done.stderr + done.stdout
    assert not list(tmp_path.rglob("_C*.so"))


def test_without_the_extension_everything_still_runs(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['warp_fast._C'] = None\n"
        "import torch, warp_fast\n"
        "from warp_fast import doctor\n"
        "ema = torch.zeros(3)\n"
        "warp_fast.ema_update_(ema, torch.ones(3), 0.5)\n"
        "print(ema.tolist(), [row for row in doctor.report()['backends'] if row.name == 'cpp'])\n"
        "try: warp_fast.ema_update_(ema, torch.ones(3), 0.5, backend='cpp')\n"
        "except ValueError as error: print(error)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    values, refusal = shown.stdout.strip().splitlines()
    assert values.startswith("[0.5, 0.5, 0.5] [Row(name='cpp', works=False")
    assert "backend 'cpp' is not available" in refusal and "C++ compiler" in refusal
