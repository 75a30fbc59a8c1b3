"""Run benchmarks, then print what is known of this machine and draw its roofline.

    warp-fast bench [ema] [slerp] [merge] [loss] [logits] [OPTIONS]

Without a name nothing is run: the tables of this machine in bench/results/ are printed and drawn.
With names those benchmarks run first, with the options of each (--quick, --rounds, --threads,
--device, --output, ...; `python -m bench.bench_ema --help`).
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import roofline
from bench.harness import parse
from bench.report import console_under, print_rows, stem

OPS = ("ema", "slerp", "merge", "loss", "logits")


def main(given: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    words = list(sys.argv[1:] if given is None else given)
    if "-h" in words or "--help" in words:
        print(__doc__)
        return 0
    ops = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    if unknown := [op for op in ops if op not in OPS]:
        print(f"bench: {unknown[0]!r} is none of {', '.join(OPS)}", file=sys.stderr)
        return 2
    rest = words[len(ops) :]
    options = parse(__doc__ or "", rest)
    for op in ops:
        importlib.import_module(f"bench.bench_{op}").main(rest)
    found = {op: options.output / f"{stem(op, options.device, options.quick)}.json" for op in OPS}
    records = [record for record in found.values() if record.is_file()]
    if not records:
        print(f"no results of this machine in {options.output}: name what to run", file=sys.stderr)
        return 1
    if not ops:
        _print(records)
    _draw(records, options.output / stem("roofline", options.device, options.quick))
    return 0


def _print(records: Sequence[Path]) -> None:
    for record in records:
        content = json.loads(record.read_text(encoding="utf-8"))
        console = console_under(content["environment"])
        for case, lines in itertools.groupby(content["rows"], key=lambda line: line["case"]):
            print_rows(case, "", [_without_case(line) for line in lines], console)


def _without_case(line: dict[str, str]) -> dict[str, str]:
    return {column: cell for column, cell in line.items() if column != "case"}


def _draw(records: Sequence[Path], place: Path) -> None:
    timed = [record for record in records if not record.name.startswith("merge")]
    if timed:
        picture = place.with_suffix(".png")
        roofline.draw(roofline.read(timed), picture)
        print(f"drew {picture}")


if __name__ == "__main__":
    sys.exit(main())
