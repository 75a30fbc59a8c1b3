"""Compile the Triton kernels ahead of time, and print what the compiler made of each as JSON.

    python tests/aot.py ema --capability 80 90 100

Runs in a process of its own: Triton decides at its import between compiling and interpreting, and
the tests beside this file interpret.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

CODE = {"bf16": 0, "fp16": 1, "fp32": 2, "fp64": 3, "int16": 4}


@dataclass(frozen=True)
class Variant:
    """One kernel with its argument types, constants and launch options."""

    name: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, int]
    options: dict[str, int | bool]
    multiples: tuple[str, ...] = ()  # integers known to be multiples of 16, as a usual V is


@dataclass(frozen=True)
class Compiled:
    """What came out: bytes of spills and counts of instructions, by their names in SASS or PTX.

    shared: bytes of shared memory.
    fused_fp32: multiply-adds that the compiler made of a product and a sum.
    range_checks: exponentials and divisions in fp32 that come with tests for odd operands.
    """

    name: str
    capability: int
    registers: int
    stack: int
    local: int
    shared: int
    wide_loads: int
    wide_stores: int
    fused_fp32: int
    range_checks: int


def ema_variants(kernels: Any) -> Iterator[Variant]:
    """Every storage with bf16 and fp32 params, and each flag of the launch once.

    fp16 params differ from bf16 by one conversion, so they are compiled with one storage; fp64
    averages are for oracles and are compiled once.
    """
    storages = {"fp32": (0, "fp32"), "split": (1, "bf16"), "stochastic": (2, "bf16")}
    grid = [(s, p, True, False) for s in storages for p in ("bf16", "fp32")]
    grid += [("split", "fp16", True, False), ("split", "bf16", False, False)]
    grid += [("split", "bf16", True, True), ("stochastic", "bf16", True, True)]
    for storage, param, aligned, device_rate in grid:
        number, ema = storages[storage]
        yield Variant(
            f"ema {storage} {param}{'' if aligned else ' unaligned'}{' device' * device_rate}",
            "_ema_kernel",
            {
                "table": "*i64",
                "block_entry": "*i32",
                "rate": "*fp32" if device_rate else "fp32",
                "key_in": "i32",
                "key_out": "i32",
            },
            {
                "STORAGE": number,
                "EMA_CODE": CODE[ema],
                "PARAM_CODE": CODE[param],
                "ALIGNED": aligned,
                "DEVICE_RATE": device_rate,
                "BLOCK": kernels._BLOCK,
            },
            {"num_warps": kernels._WARPS, "enable_fp_fusion": False},
        )


def packed(codes: list[str]) -> int:
    return sum(CODE[code] << 3 * i for i, code in enumerate(codes))


def heavy(codes: list[str], aligned: bool) -> bool:
    return not aligned or "fp64" in codes


def gram_variants(kernels: Any) -> Iterator[Variant]:
    """M below, at and above one group of policies; mixed dtypes; scalar loads; the second stage.

    M = 9 has every kind of group (4 with itself, 4 with 4, 4 with 1, 1 with itself); M = 16 only
    repeats them, at a multiple of the time.
    """
    types = {"table": "*i64", "block_entry": "*i32", "partial": "*fp64"}
    bf16 = ["bf16"] * 17
    grid = [(bf16[: 1 + m], True) for m in (2, 5, 9)]
    grid += [(["fp32"] * 3, True), (["fp32", *bf16[:5]], True), (bf16[:3], False)]
    grid += [(["fp64"] * 3, True), (["fp64"] * 10, True)]
    grid += [(["fp32"] * 6, False), (bf16[:10], False)]
    for codes, aligned in grid:
        runs = len(codes) - 1
        group, chunk, stages = kernels.tiling(runs, heavy(codes, aligned))
        yield Variant(
            f"gram M{runs} {codes[0]} {codes[1]}{'' if aligned else ' unaligned'}",
            "_gram_kernel",
            types,
            {
                "M": runs,
                "CODES": packed(codes),
                "ALIGNED": aligned,
                "GROUP": group,
                "CHUNK": chunk,
                "STAGES": stages,
                "ROWS": kernels._ROWS,
            },
            {"num_warps": kernels._WARPS, "enable_fp_fusion": True, **kernels._REGISTERS},
        )
    types = {"partial": "*fp64", "bounds": "*i64", "gram": "*fp64", "M": "i32"}
    constants: dict[str, int] = {"BLOCK": kernels._SUM_BLOCK}
    yield Variant("gram sum", "_sum_kernel", types, constants, {"enable_fp_fusion": False})


def coefficients_variants(kernels: Any) -> Iterator[Variant]:
    """The usual M, a large one, and the largest."""
    types = {"gram": "*fp64", "coefficients": "*fp64", "linear": "*i1"}
    types |= dict.fromkeys(("segments", "policies"), "i32")
    for runs in (1, 2, 5, 16):
        size = 1 << (runs - 1).bit_length()
        options: dict[str, int | bool] = {"num_warps": 1, "enable_fp_fusion": False}
        yield Variant(f"solve fp64 M{runs}", "_solve_kernel", types, {"SIZE": size}, options)


def slerp_variants(kernels: Any) -> Iterator[Variant]:
    """The usual M and the largest; mixed dtypes; scalar accesses."""
    types = {"table": "*i64", "block_entry": "*i32", "coefficients": "*fp64"}
    types |= dict.fromkeys(("stride", "rows", "segments", "blocks"), "i32")
    bf16 = ["bf16"] * 17
    grid = [(bf16[: 1 + m], "bf16", True) for m in (2, 5, 16)]
    grid += [(["fp32"] * 3, "fp32", True), (["fp32", *bf16[:5]], "bf16", True)]
    grid += [(["fp64"] * 3, "fp64", True), (["fp16"] * 3, "fp16", True)]
    grid += [(bf16[:3], "bf16", False), (["fp32"] * 17, "fp32", False)]
    for codes, out, aligned in grid:
        yield Variant(
            f"slerp M{len(codes) - 1} {codes[0]} {codes[1]}{'' if aligned else ' unaligned'}",
            "_apply_kernel",
            types,
            {
                "M": len(codes) - 1,
                "CODES": packed(codes),
                "OUT_CODE": CODE[out],
                "ALIGNED": aligned,
                "BLOCK": kernels._BLOCK,
            },
            {
                "num_warps": kernels._WARPS * (2 if heavy([*codes, out], aligned) else 1),
                "enable_fp_fusion": False,
            },
        )


# (logits, anchor, exact KL, softcap, V): no anchor; a sampled KL; each exact KL; the fp32 logits of
# a head, with an exact KL and with the odds; a vocabulary that is odd, or no multiple of 16; fp64
LOSSES: list[tuple[str, str | None, str, bool, int]] = [
    ("bf16", None, "", True, 256128),
    ("bf16", "bf16", "", True, 256128),
    ("bf16", "bf16", "reverse", True, 256128),
    ("fp32", "fp32", "reverse", True, 256128),
    ("fp32", None, "", True, 256128),
    ("bf16", "bf16", "reverse", False, 50257),
    ("bf16", "bf16", "reverse", False, 128264),
    ("fp32", None, "", False, 128264),
    ("fp16", "fp16", "forward", True, 262144),
    ("fp64", "fp64", "reverse", True, 1024),
]


def loss_variants(kernels: Any) -> Iterator[Variant]:
    """The three kernels of each, with entropy but for the default loss; the scaling."""
    places = [f"{of}{what}" for of in ("", "anchor_", "out_") for what in ("stride", "jump")]
    for logits, anchor, exact, softcap, size in LOSSES:
        entropy = anchor is None or bool(exact)
        fine = "fp64" if logits == "fp64" else "fp32"
        # the gradient of a head's fp32 logits is rounded for the GEMMs
        out = "bf16" if logits == "fp32" else logits
        matrices = {"logits": f"*{logits}", "anchor": f"*{anchor or logits}"}
        types = {**matrices, "out": f"*{out}", "token_ids": "*i64", "kept": "*u8", "state": "*fp64"}
        types |= dict.fromkeys(("sums", "upstream", "logprobs", "entropies"), f"*{fine}")
        types |= dict.fromkeys(("anchor_logprobs", "kls"), f"*{fine}")
        types |= dict.fromkeys((*places, "run", "size"), "i32")
        types |= {"inner": "fp64", "outer": "fp64", "odds": f"*{out}", "factors": f"*{fine}"}
        constants: dict[str, int] = {
            "PIECES": -(-size // kernels._PIECE),
            "SOFTCAP": softcap,
            "EXACT": kernels.EXACT_CODES[exact],
            "WIDE": fine == "fp64",
        }
        vectors = kernels._VECTORS[{"fp32": 4, "fp64": 8}.get(logits, 2)]
        tiles: dict[str, int] = {"PIECE": kernels._PIECE, "VECTORS": vectors}
        tiles["EIGHTS"] = size % 8 == 0
        sums: dict[str, int] = {"ANCHOR": anchor is not None, "ENTROPY": entropy}
        # of a head's logits without an exact KL
        sums["ODDS"] = CODE[out] if logits == "fp32" and not exact else -1
        pieces = constants["PIECES"]
        padded: dict[str, int] = {"PADDED": 1 << (pieces - 1).bit_length()}
        variants: dict[str, dict[str, int]] = {
            "sums_kernel": sums | tiles,
            "row_kernel": sums | padded,
            "gradient_kernel": tiles | {"CODE": CODE[out]},
        }
        for kernel, more in variants.items():
            suffix = " odds" * (more.get("ODDS", -1) >= 0) + " unaligned" * (size % 8 != 0)
            yield Variant(
                f"loss {kernel} {logits} {anchor} {exact} {size}{suffix}",
                kernel,
                types,
                constants | more,
                {
                    "num_warps": 1 if kernel == "row_kernel" else kernels._WARPS,
                    "enable_fp_fusion": False,
                },
                (*places, "size") if size % 16 == 0 else (),
            )
    yield Variant(
        "loss scaled_kernel",
        "scaled_kernel",
        {"values": "*fp32", "out": "*bf16", "factor": "*fp32", "size": "i64"},
        {"CODE": CODE["bf16"], "BLOCK": kernels._BLOCK},
        {"num_warps": kernels._WARPS, "enable_fp_fusion": False},
        ("size",),
    )
    types = dict.fromkeys(("run", "stride", "jump", "size"), "i32")
    for code, bytes_, size in (("bf16", 2, 262144), ("fp32", 4, 262144), ("bf16", 2, 50257)):
        unaligned = size % 16 != 0
        yield Variant(
            f"loss scale_kernel {code}{' unaligned' * unaligned}",
            "scale_kernel",
            {"values": f"*{code}", "factor": "*fp32", **types},
            {
                "PIECES": -(-size // kernels._PIECE),
                "PIECE": kernels._PIECE,
                "CODE": CODE[code],
                "VECTORS": kernels._VECTORS[bytes_],
                "EIGHTS": not unaligned,
            },
            {"num_warps": kernels._WARPS, "enable_fp_fusion": False},
            () if unaligned else ("stride", "jump", "size"),
        )


def compile_variant(kernels: Any, variant: Variant, capability: int) -> Compiled:
    """Compile for one GPU generation and read the result with the tools inside triton."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels, variant.kernel)
    signature = {
        name: "constexpr" if name in variant.constants else variant.types[name]
        for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in variant.multiples
    }
    source = ASTSource(kernel, signature, variant.constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.options)
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _run(os.path.join(tools, "cuobjdump"), "--dump-resource-usage", file.name)
        sass = _run(os.path.join(tools, "nvdisasm"), "-c", file.name)
    ptx = made.asm["ptx"]
    registers, stack, local = (
        int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK", "LOCAL")
    )
    return Compiled(
        variant.name,
        capability,
        registers,
        stack,
        local,
        made.metadata.shared,
        len(re.findall(r"ld\.global[\w.:]*\.v4\.b32|cp\.async\.cg[^;]*, 0x10,", ptx)),
        len(re.findall(r"st\.global[\w.:]*\.v4\.b32", ptx)),
        len(re.findall(r"\bFFMA", sass)) - len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32", ptx)),
        len(re.findall(r"\b(?:ex2\.approx|div\.full|div\.rn)\.f32", ptx)),
    )


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


VARIANTS = {
    "coefficients": coefficients_variants,
    "ema": ema_variants,
    "gram": gram_variants,
    "loss": loss_variants,
    "slerp": slerp_variants,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", choices=sorted(VARIANTS))
    parser.add_argument("--capability", type=int, nargs="+", default=[90])
    arguments = parser.parse_args()
    kernels = importlib.import_module(f"warp_fast.kernels.{arguments.op}")
    for variant in VARIANTS[arguments.op](kernels):
        for capability in arguments.capability:
            print(json.dumps(asdict(compile_variant(kernels, variant, capability))), flush=True)


if __name__ == "__main__":
    main()
