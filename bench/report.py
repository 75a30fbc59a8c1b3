"""Tables of results for people, and the same as CSV and JSON for machines."""

from __future__ import annotations

import contextlib
import csv
import datetime
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.harness import Absent, Options, Provider, Result
from warp_fast import _backend

_PACKAGES = (
    "torch",
    "triton",
    "timm",
    "ema-pytorch",
    "mergekit",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
)


@dataclass
class Group:
    """Results of one case, timed together.

    Attributes:
        title: the case, with its size.
        results: the bandwidth probes among them.
        absent: peers that are not installed.
        stream: name of the probe that the fractions refer to.
        base: name of the provider that the factors refer to.
        matmul: name of the probe whose rate makes floors of flops.
    """

    title: str
    results: list[Result]
    absent: list[Absent]
    stream: str
    base: str
    matmul: str = ""

    def find(self, name: str) -> Result | None:
        return next((r for r in self.results if r.provider.name == name), None)


def environment(device: torch.device) -> dict[str, str]:
    """What to know of a run before reading its numbers."""
    return {
        "machine": machine(device),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **_versions(*_PACKAGES),
        "cuda": torch.version.cuda or "none",
        "backends": ", ".join(n for n in _backend.BACKENDS if _backend.MISSING[n] is None),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "load": f"{os.getloadavg()[0]:.2f} processes wanted to run during the minute before",
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def machine(device: torch.device) -> str:
    """Name of the processor that did the work."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = dict(re.findall(r"^(model name|model)\s*: (.+)$", cpuinfo.read_text(), re.M))
        family = re.search(r"^cpu family\s*: (\d+)$", cpuinfo.read_text(), re.M)
        if "model name" in found and family:
            return f"{found['model name']} family {family[1]} model {found['model']}"
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit, with a + where files differ from it."""
    root = Path(__file__).parent
    asked = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(asked, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def row(group: Group, result: Result) -> dict[str, str]:
    """One line of the table, as text."""
    provider = result.provider
    stream, base = group.find(group.stream), group.find(group.base)
    cells = {"provider": provider.name, **provider.shown}
    cells["gate error"] = "" if math.isnan(result.error) else f"{result.error:.1e}"
    if result.refused is not None:
        return {**cells, "ms": result.refused}
    if not result.seconds:
        return cells
    median = result.quantile(0.5)
    cells["ms"] = f"{median * 1e3:.2f}"
    cells["p20-p80"] = f"{result.quantile(0.2) * 1e3:.2f}-{result.quantile(0.8) * 1e3:.2f}"
    if not math.isnan(result.host_seconds):
        cells["host ms"] = f"{result.host_seconds * 1e3:.2f}"
    cells["ns/elem"] = f"{median / provider.elements * 1e9:.3f}"
    cells["GB/s"] = f"{result.bandwidth / 1e9:.1f}"
    cells["of stream"] = f"{result.bandwidth / stream.bandwidth:.2f}" if stream else ""
    cells["times base"] = f"{median / base.quantile(0.5):.2f}" if base else ""
    cells["peak MiB"] = f"{result.peak_bytes / 2**20:.0f}"
    if provider.returned:
        cells["work MiB"] = f"{(result.peak_bytes - provider.returned) / 2**20:.0f}"
    floor = floor_seconds(group, provider)
    if floor:
        cells["of floor"] = f"{floor / median:.2f}"
    return cells


def floor_seconds(group: Group, provider: Provider) -> float:
    """What the probes would take for the same flops, or for the same passes; 0 where none say."""
    matmul = group.find(group.matmul)
    if provider.flops and matmul:
        return provider.flops / matmul.provider.flops * matmul.quantile(0.5)
    read, copy = group.find("probe: read"), group.find("probe: copy")
    if provider.read_bytes and read and copy:
        written = provider.bytes - provider.read_bytes
        return provider.read_bytes / read.bandwidth + written / copy.bandwidth
    return 0.0


def rows(group: Group) -> list[dict[str, str]]:
    """All lines of a group under the same columns; absent peers come last."""
    lines = [row(group, result) for result in group.results]
    lines += [{"provider": a.name, "ms": f"absent: {a.install}"} for a in group.absent]
    columns = list(dict.fromkeys(key for line in sorted(lines, key=len)[::-1] for key in line))
    return [{column: line.get(column, "") for column in columns} for line in lines]


def show(group: Group, console: Console) -> None:
    """Print a group; refusals and absences come below the table."""
    caption = ""
    if group.base:
        caption = f"of stream: {group.stream}; times base: {group.base}"
    if group.matmul:
        caption = f"{caption}; work: peak less what all return; of floor: {group.matmul}"
    elif any(result.provider.read_bytes for result in group.results):
        caption = f"{caption}; of floor: what reads at the read probe, the rest at the copy probe"
    print_rows(group.title, caption, rows(group), console)


def console_under(stamp: dict[str, str]) -> Console:
    """A console, wide enough for the tables where it is a file, with the environment on top."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    console.print(" | ".join(f"{key} {value}" for key, value in stamp.items()), markup=False)
    return console


def print_rows(title: str, caption: str, lines: Sequence[dict[str, str]], console: Console) -> None:
    """Print the lines of one case, as `rows` gives them."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for column in lines[0]:
        table.add_column(column, justify="left" if column == "provider" else "right")
    notes = []
    for line in lines:
        if line.get("ms") and not line.get("ns/elem"):
            notes.append(f"  {line['provider']}: {line['ms']}")
        else:
            table.add_row(*line.values())
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)


def write(groups: Sequence[Group], stamp: dict[str, str], stem: str, directory: Path) -> list[Path]:
    """Write STEM.csv and STEM.json; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [{"case": group.title, **line} for group in groups for line in rows(group)]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    table, record = directory / f"{stem}.csv", directory / f"{stem}.json"
    with table.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in stamp.items())
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    seconds = {group.title: {r.provider.name: r.seconds for r in group.results} for group in groups}
    points = [_point(group.title, r) for group in groups for r in group.results if r.seconds]
    content = {"environment": stamp, "rows": lines, "points": points, "seconds": seconds}
    record.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [table, record]


def _point(case: str, result: Result) -> dict[str, object]:
    """What a roofline needs to know of a provider that was timed."""
    provider = result.provider
    return {
        "case": case,
        "provider": provider.name,
        "ours": provider.ours,
        "flops": provider.flops,
        "bytes": provider.bytes,
        "seconds": result.quantile(0.5),
    }


def stem(op: str, device: torch.device, quick: bool) -> str:
    """File name of results: op, machine, and whether they are only quick ones."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine(device).lower()).strip("-")
    return f"{op}-{slug}" + "-quick" * quick


def publish(op: str, groups: Iterable[Group], stamp: dict[str, str], options: Options) -> None:
    """Print the tables under their environment, each once it is measured; write all in the end."""
    console = console_under(stamp)
    done = []
    for group in groups:
        show(group, console)
        done.append(group)
    for path in write(done, stamp, stem(op, options.device, options.quick), options.output):
        console.print(f"wrote {path}", markup=False)
