"""Every GPU kernel compiles for the generations it is meant for, without spills; needs no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
# A100, H100 and H200, B200: the generations whose instructions differ for these kernels
CAPABILITIES = ["80", "90", "100"]


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
@pytest.mark.parametrize("op", ["coefficients", "ema", "gram", "loss", "slerp"])
def test_triton_kernels_compile_without_spills(op: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(HERE / "aot.py"), op, "--capability", *CAPABILITIES],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    compiled: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(compiled) % len(CAPABILITIES) == 0 and compiled
    assert [c for c in compiled if c["stack"] or c["local"]] == []
    # 16-byte accesses wherever alignment was promised (fp64 ones have another name)
    for made in compiled:
        name = made["name"]
        if "fp64" in name or name == "gram sum" or "row_kernel" in name:
            continue
        promised = "unaligned" not in name
        assert (made["wide_loads"] > 0) == promised, made
        writes = op != "gram" and ("sums_kernel" not in name or "odds" in name)
        # beside fp32 policies 16-bit averages go 4 at a time, in stores of 8 bytes
        writes = writes and name not in ("ema split fp32", "ema stochastic fp32")
        assert (made["wide_stores"] > 0) == (promised and writes), made
    # all loads of an element by element pass are on their way before any result is needed
    if op in ("ema", "slerp"):
        assert [c for c in compiled if c["shared"]] == []
    # the bits of the EMA and of merged weights are those of unfused fp32 arithmetic, and a score of
    # the loss is the same in both passes over a row; exp, division and root in fp64 hold such ones
    fp64 = [c for c in compiled if re.search("loss.*(row_kernel|fp64)|solve", c["name"])]
    assert [c for c in compiled if c["fused_fp32"] and c not in fp64] == []
    # a pass over logits has few instructions for each
    assert [c for c in compiled if c["range_checks"]] == []
