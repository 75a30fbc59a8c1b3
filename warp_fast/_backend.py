"""Which backend serves which op on which device, and why the others do not.

`reference` is plain PyTorch and always there. `cpp` and `cuda` are compiled at install
(`warp_fast._C`), `triton` comes with the package of that name. A backend named by the caller is
used or refused with the reason; nothing falls back after an error.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch

BACKENDS = ("reference", "cpp", "triton", "cuda")

# op -> device type -> backends that implement it, best first
SERVED: dict[str, dict[str, tuple[str, ...]]] = {
    # cuda comes after triton until it is measured to be faster
    "loss": {"cpu": ("cpp", "reference"), "cuda": ("triton", "cuda", "reference")},
    "linear_loss": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "ema": {"cpu": ("cpp", "reference"), "cuda": ("triton", "cuda", "reference")},
    "slerp": {"cpu": ("cpp", "reference"), "cuda": ("triton", "cuda", "reference")},
}

# (op, backend) -> the first compute capability that it needs, and for what
NEEDS: dict[tuple[str, str], tuple[tuple[int, int], str]] = {
    ("loss", "cuda"): ((9, 0), "thread-block clusters"),
}

# the interpreter of Triton runs its kernels on CPU tensors, and only there; slow, so last
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    for _served in SERVED.values():
        _served["cpu"] = (*_served["cpu"], "triton")
        _served["cuda"] = tuple(name for name in _served["cuda"] if name != "triton")


def _missing_extension() -> str | None:
    try:
        importlib.import_module("warp_fast._C")
    except ImportError as error:
        return (
            f"warp_fast._C is not built ({error}); reinstall with a C++ compiler: pip -v says why"
        )
    return None


def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install 'warp_fast[triton]'"
    return None


def _missing_cuda() -> str | None:
    if MISSING["cpp"] is not None:
        return MISSING["cpp"]
    extension = importlib.import_module("warp_fast._C")
    if not extension.has_cuda:
        return (
            "warp_fast._C was built without CUDA kernels; reinstall with nvcc on the PATH and "
            "WARP_FAST_CUDA_ARCHS other than 'none'"
        )
    return None


# backend -> why it cannot be used in this process, or None; found once, at import
MISSING: dict[str, str | None] = {"reference": None, "cpp": _missing_extension()}
MISSING["triton"] = _missing_triton()
MISSING["cuda"] = _missing_cuda()

_PREFERRED = os.environ.get("WARP_FAST_BACKEND", "auto")


def unavailable(op: str, backend: str, device: torch.device) -> str | None:
    """Why a backend that implements `op` cannot run it on `device`, or None."""
    if MISSING[backend] is not None or (op, backend) not in NEEDS:
        return MISSING[backend]
    needed, what = NEEDS[op, backend]
    found = torch.cuda.get_device_capability(device)
    if found >= needed:
        return None
    return (
        f"its {op!r} needs {what}, so compute capability {needed[0]}.{needed[1]}; this GPU has "
        f"{found[0]}.{found[1]}"
    )


def able(op: str, device: torch.device | str) -> list[str]:
    """The backends that can run `op` on `device`, best first."""
    device = torch.device(device)
    served = SERVED[op].get(device.type, ("reference",))
    return [name for name in served if unavailable(op, name, device) is None]


def resolve(op: str, backend: str, device: torch.device) -> str:
    """Name the backend that will run `op` on `device`.

    Args:
        op: "loss" (from logits), "linear_loss" (from hidden states), "ema" or "slerp".
        backend: "auto" (the environment variable WARP_FAST_BACKEND where that one serves the op
            on this device, else the best one present) or the name of a backend.
        device: where the tensors are.

    Raises:
        ValueError: the name is unknown, or that backend cannot serve this op here; says why.
    """
    served = SERVED[op].get(device.type, ("reference",))
    # the preferred one has no say where it does not serve; a name that is none is refused below
    if backend == "auto" and (_PREFERRED in served or _PREFERRED not in BACKENDS):
        backend = _PREFERRED
    if backend == "auto":
        return next(name for name in served if unavailable(op, name, device) is None)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend not in served:
        reason = MISSING[backend]
        raise ValueError(
            f"backend {backend!r} does not implement {op!r} on {device.type} tensors; "
            f"it has: {', '.join(served)}" + (f" (nor is it available: {reason})" if reason else "")
        )
    reason = unavailable(op, backend, device)
    if reason is not None:
        raise ValueError(f"backend {backend!r} is not available: {reason}")
    return backend
