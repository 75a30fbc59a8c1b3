"""The merge command beside mergekit's on the same checkpoints, and beside copying their bytes.

    python -m bench.bench_merge [--quick] [--mergekit-python PATH] [--directory DIR]

Checkpoints of the shapes of Gemma 3 270M and 1B, two policies 2 % away from init, from the page
cache; mergekit, which needs minutes for the larger, beside the smaller. Commands count from start
to exit, interpreter included. `off WARP` is the error of the merged task vector against WARP's
slerp, per tensor, in float64; bf16 output alone is 8 %.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from bench.bench_slerp import task_error
from bench.checkpoints import GEMMA_3_1B, GEMMA_3_270M, SMALL, Model, make_checkpoints
from bench.harness import Absent, Provider, Scale, measure, parse
from bench.peers import mergekit_command, mergekit_version
from bench.report import Group, environment, publish
from warp_fast import merge_checkpoints

_PIECE = 1 << 24
_ROOT = Path(__file__).parents[1]
# rounding of a bf16 output, relative to a task vector of 2 % (the raw slerp of mergekit has 31 %)
_ALLOWED = 0.1
_RAW_ALLOWED = 0.35
OURS = "warp_fast, in this process"
COMMAND = "warp-fast merge"
COPY, SYNCED = "copy of the bytes", "copy of the bytes, synced"
MERGEKIT = {"nuslerp": "mergekit-yaml nuslerp, base", "slerp": "mergekit-yaml slerp (raw)"}


def merge_bytes(checkpoint: int, runs: int, etas: int = 1) -> int:
    """As `warp_fast.merge_checkpoints` states: M + 1 checkpoints read, one per eta written."""
    return (runs + 1 + etas) * checkpoint


def copy_bytes(paths: Sequence[Path], output: Path, sync: bool) -> None:
    """Read every checkpoint once and write one, in large pieces."""
    output.mkdir(parents=True)
    buffer = bytearray(_PIECE)
    with (output / "model.safetensors").open("wb", buffering=0) as target:
        for path in paths:
            with (path / "model.safetensors").open("rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    if path is paths[0]:
                        target.write(memoryview(buffer)[:count])
        if sync:
            os.fsync(target.fileno())


def _read(path: Path, names: Sequence[str]) -> list[Tensor]:
    files = sorted(path.glob("*.safetensors"))
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            found.update({n: stored.get_tensor(n) for n in names if n in stored.keys()})
    return [found[name] for name in names]


def output_error(output: Path, paths: Sequence[Path]) -> float:
    """Error of the merged task vector, on the tensors of the first layer."""
    with safe_open(paths[0] / "model.safetensors", framework="pt") as stored:
        names = [name for name in stored.keys() if ".layers.0." in name]
    init, *policies = (_read(path, names) for path in paths)
    return task_error(_read(output, names), init, policies)


def mergekit_config(method: str, paths: Sequence[Path]) -> dict[str, Any]:
    """What mergekit is asked: WARP's formula, or its slerp of the weights themselves."""
    init, *policies = map(str, paths)
    if method == "nuslerp":
        models = [{"model": p, "parameters": {"weight": 1.0}} for p in policies]
        return {
            "merge_method": "nuslerp",
            "base_model": init,
            "models": models,
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }
    models = [{"model": p} for p in policies]
    return {
        "merge_method": "slerp",
        "base_model": policies[0],
        "models": models,
        "parameters": {"t": 0.5},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


class Bench:
    """Checkpoints in a directory, and the providers that merge them."""

    def __init__(self, root: Path, model: Model) -> None:
        self.root = root
        self.paths = make_checkpoints(root / "inputs", model)
        self.output = root / "output"
        self.elements = sum(torch.Size(shape).numel() for shape in model.shapes().values())
        self.bytes = merge_bytes(2 * self.elements, len(self.paths) - 1)

    def _clear(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)

    def provider(
        self, name: str, write: Callable[[Path], object], allowed: float = _ALLOWED
    ) -> Provider:
        """`write` makes a new output; what lies there afterwards is judged."""
        shown: dict[str, str] = {}

        def error() -> float:
            self._clear()
            write(self.output)
            found = output_error(self.output, self.paths)
            shown["off WARP %"] = f"{100 * found:.2g}"
            return found

        return Provider(
            name,
            lambda: write(self.output),
            error,
            allowed,
            self.elements,
            self.bytes,
            shown,
            name in (OURS, COMMAND),
            self._clear,
        )

    def command(self, name: str, asked: Sequence[str], allowed: float = _ALLOWED) -> Provider:
        """A command that takes the output as its last argument."""
        call = [*asked, str(self.output)]
        found = self.provider(name, lambda output: _call(call), allowed)
        return dataclasses.replace(found, peak=lambda: _peak(call))

    def ours(self) -> Provider:
        init, *policies = self.paths

        def write(output: Path) -> None:
            merge_checkpoints(init, policies, output, granularity="tensor", progress=False)

        return self.provider(OURS, write)

    def our_command(self) -> Provider:
        init, *policies = map(str, self.paths)
        asked = [sys.executable, "-m", "warp_fast.cli", "merge", "--init", init, "--policy"]
        return self.command(COMMAND, [*asked, *policies, "--granularity", "tensor", "--output"])

    def copy(self, sync: bool) -> Provider:
        """The same bytes without arithmetic: the floor of a merge."""
        found = self.provider(
            SYNCED if sync else COPY, lambda output: copy_bytes(self.paths, output, sync)
        )
        return dataclasses.replace(found, error=lambda: 0.0)

    def mergekit(self, method: str, python: str) -> Provider:
        config = self.root / f"{method}.yaml"
        config.write_text(yaml.safe_dump(mergekit_config(method, self.paths)))
        allowed = _ALLOWED if method == "nuslerp" else _RAW_ALLOWED
        return self.command(MERGEKIT[method], mergekit_command(python, config), allowed)


def _call(command: Sequence[str]) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=_ROOT)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
    return done.stdout


def _peak(command: Sequence[str]) -> float:
    """Largest resident memory of a command, pages of mapped files included."""
    look = (
        "import resource, subprocess, sys; subprocess.check_call(sys.argv[1:], stdout=2); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    return 1024.0 * int(_call([sys.executable, "-c", look, *command]))


@contextmanager
def benched(model: Model, directory: Path | None = None) -> Iterator[Bench]:
    """A Bench in a temporary directory, by default where the system keeps them."""
    with tempfile.TemporaryDirectory(dir=directory) as root:
        yield Bench(Path(root), model)


def compare(bench: Bench, python: str | None, scale: Scale) -> Group:
    """All merges of one set of checkpoints, in one run; without a Python, mergekit is left out."""
    providers = [bench.copy(False), bench.copy(True), bench.ours(), bench.our_command()]
    absent: list[Absent] = []
    if python and mergekit_version(python):
        providers += [bench.mergekit(method, python) for method in MERGEKIT]
    elif python:
        how = "pip install mergekit, here or under --mergekit-python"
        absent = [Absent(name, how) for name in MERGEKIT.values()]
    gigabytes = bench.bytes / 1e9
    title = f"Merge of 2 checkpoints of {bench.elements / 1e6:.0f} M, {gigabytes:.2f} GB in all"
    results = measure(providers, torch.device("cpu"), scale)
    return Group(title, results, absent, COPY, COPY)


@pytest.fixture(scope="module")
def small() -> Iterator[Bench]:
    with benched(SMALL) as bench:
        yield bench


@pytest.mark.parametrize("name", [COPY, OURS, COMMAND, *MERGEKIT])
def test_merge(
    name: str, small: Bench, timed: Callable[[str, Callable[[torch.device], Provider]], None]
) -> None:
    python = os.environ.get("BENCH_MERGEKIT_PYTHON") or sys.executable
    if name in MERGEKIT and not mergekit_version(python):
        pytest.skip("pip install mergekit, or set BENCH_MERGEKIT_PYTHON")
    made = {COPY: lambda: small.copy(False), OURS: small.ours, COMMAND: small.our_command}
    build = made.get(name, lambda: small.mergekit(name, python))
    timed("merge of checkpoints", lambda device: build())


def main(given: Sequence[str] | None = None) -> None:
    options = parse(__doc__ or "", given)
    python = options.mergekit_python or sys.executable
    stamp = environment(torch.device("cpu"))
    stamp["mergekit"] = mergekit_version(python) or "absent"
    models = {SMALL: python} if options.quick else {GEMMA_3_270M: python, GEMMA_3_1B: None}
    chosen = options.chosen(list(models))

    def groups() -> Iterator[Group]:
        for model in chosen:
            with benched(model, options.directory) as bench:
                yield compare(bench, models[model], options.scale)

    publish("merge", groups(), stamp, dataclasses.replace(options, device=torch.device("cpu")))


if __name__ == "__main__":
    main()
