"""Other people's ways to do the weight-space ops, by name; packages are imported when asked for.

Where a project writes its update inside a trainer, the formula stands here as torch calls, with a
link. Measured against: timm 1.0.31, ema-pytorch 0.8.3, mergekit 0.1.5.
"""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

Tensors = list[Tensor]


class Average(NamedTuple):
    """A running average: `update` reads the parameters it was made for, `values` is what it is."""

    update: Callable[[], object]
    values: Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class AveragePeer:
    """make(params, rate) starts from an exact copy of params, kept in `storage`.

    `gives` are the dtypes of params that it takes; None of a package means torch alone.
    """

    name: str
    storage: torch.dtype
    gives: tuple[torch.dtype, ...]
    make: Callable[[Tensors, float], Average]
    package: str | None = None


@dataclass(frozen=True)
class MergePeer:
    """merge(init, policies) makes a new tensor.

    `target` is what it computes, in float64; `most` how many policies it takes.
    """

    name: str
    merge: Callable[[Tensor, Tensors], Tensor]
    target: Callable[[Tensor, Tensors], Tensor]
    most: int
    package: str | None = None


def missing(package: str | None) -> str | None:
    """How to install a package that is not there."""
    if package is None or importlib.util.find_spec(package.replace("-", "_")) is not None:
        return None
    return f"pip install {package}"


def _copies(params: Tensors, dtype: torch.dtype) -> Tensors:
    return [param.detach().to(dtype, copy=True) for param in params]


def _module(params: Tensors) -> nn.Module:
    """A module of these very parameters."""
    return nn.ParameterList([nn.Parameter(param, requires_grad=False) for param in params])


def _foreach_lerp(params: Tensors, rate: float, storage: torch.dtype) -> Average:
    ema = _copies(params, storage)
    return Average(lambda: torch._foreach_lerp_(ema, params, rate), lambda: ema)


def _upcast_lerp(params: Tensors, rate: float) -> Average:
    ema = _copies(params, torch.float32)

    def update() -> None:
        torch._foreach_lerp_(ema, [param.float() for param in params], rate)

    return Average(update, lambda: ema)


# https://github.com/huggingface/trl/blob/main/trl/trainer/callbacks.py, SyncRefModelCallback
def _trl(params: Tensors, rate: float, storage: torch.dtype) -> Average:
    ema = _copies(params, storage)

    def update() -> None:
        for average, param in zip(ema, params, strict=True):
            average.mul_(1.0 - rate).add_(param, alpha=rate)

    return Average(update, lambda: ema)


# https://github.com/OpenRLHF/OpenRLHF, deepspeed.py, moving_average
def _openrlhf(params: Tensors, rate: float, storage: torch.dtype) -> Average:
    ema = _copies(params, storage)

    def update() -> None:
        for average, param in zip(ema, params, strict=True):
            average.copy_(rate * param + (1.0 - rate) * average)

    return Average(update, lambda: ema)


# https://github.com/facebookresearch/dinov3, update_ema of the meta architecture
def _dino(params: Tensors, rate: float) -> Average:
    ema = _copies(params, torch.float32)

    def update() -> None:
        torch._foreach_mul_(ema, 1.0 - rate)
        torch._foreach_add_(ema, params, alpha=rate)

    return Average(update, lambda: ema)


def _averaged_model(params: Tensors, rate: float) -> Average:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    policy = _module(params)
    ema = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(1.0 - rate))  # type: ignore[no-untyped-call]
    ema.update_parameters(policy)  # the first update copies
    return Average(lambda: ema.update_parameters(policy), lambda: list(ema.module.parameters()))


def _timm(params: Tensors, rate: float, storage: torch.dtype, stochastic: bool = True) -> Average:
    # model_ema.py needs torch alone; the package around it needs a torchvision that fits torch
    found = importlib.util.find_spec("timm")
    assert found is not None and found.submodule_search_locations
    path = Path(found.submodule_search_locations[0]) / "utils" / "model_ema.py"
    spec = importlib.util.spec_from_file_location("bench._timm_model_ema", path)
    assert spec is not None and spec.loader is not None
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    policy = _module(params)
    ema = source.ModelEmaV3(policy, decay=1.0 - rate, dtype=storage, stochastic_rounding=stochastic)
    return Average(lambda: ema.update(policy), lambda: list(ema.module.parameters()))


def _ema_pytorch(params: Tensors, rate: float, storage: torch.dtype) -> Average:
    from ema_pytorch import EMA

    policy = _module(params)
    ema = EMA(
        policy,
        ema_model=_module(_copies(params, storage)),
        beta=1.0 - rate,
        min_value=1.0 - rate,
        update_after_step=-2,
        update_every=1,
        include_online_model=False,
        use_foreach=True,
        coerce_dtype=True,
    )
    ema.update()  # the first update copies
    return Average(ema.update, lambda: list(ema.ema_model.parameters()))


_BF16, _FP32 = torch.bfloat16, torch.float32
_BOTH = (_BF16, _FP32)

AVERAGES = [
    AveragePeer("torch _foreach_lerp_", _BF16, (_BF16,), lambda p, r: _foreach_lerp(p, r, _BF16)),
    AveragePeer("torch _foreach_lerp_", _FP32, (_FP32,), lambda p, r: _foreach_lerp(p, r, _FP32)),
    AveragePeer("torch _foreach_lerp_, params upcast", _FP32, (_BF16,), _upcast_lerp),
    AveragePeer("AveragedModel", _BF16, (_BF16,), _averaged_model),
    AveragePeer("AveragedModel", _FP32, (_FP32,), _averaged_model),
    AveragePeer("TRL formula", _BF16, (_BF16,), lambda p, r: _trl(p, r, _BF16)),
    AveragePeer("TRL formula", _FP32, _BOTH, lambda p, r: _trl(p, r, _FP32)),
    AveragePeer("OpenRLHF formula", _BF16, (_BF16,), lambda p, r: _openrlhf(p, r, _BF16)),
    AveragePeer("OpenRLHF formula", _FP32, (_FP32,), lambda p, r: _openrlhf(p, r, _FP32)),
    AveragePeer("DINOv3 formula", _FP32, _BOTH, _dino),
    AveragePeer("timm ModelEmaV3", _BF16, (_BF16,), lambda p, r: _timm(p, r, _BF16), "timm"),
    AveragePeer("timm ModelEmaV3", _FP32, _BOTH, lambda p, r: _timm(p, r, _FP32), "timm"),
    AveragePeer(
        "ema-pytorch", _BF16, (_BF16,), lambda p, r: _ema_pytorch(p, r, _BF16), "ema-pytorch"
    ),
    AveragePeer("ema-pytorch", _FP32, _BOTH, lambda p, r: _ema_pytorch(p, r, _FP32), "ema-pytorch"),
]


def _mergekit(method: str, tensors: Tensors, dtype: torch.dtype, **parameters: float) -> Tensor:
    from mergekit.merge_methods.api import merge_tensors

    merged: Tensor = merge_tensors(
        tensors,
        method,
        parameters=parameters,
        base_index=0,
        dtype=dtype,
        out_dtype=tensors[0].dtype,
    )
    return merged


def _wide(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 weights."""
    return torch.promote_types(tensors[0].dtype, torch.float32)


def _raw_slerp(init: Tensor, policies: Tensors) -> Tensor:
    """mergekit's slerp of the weights themselves; init takes no part."""
    return _mergekit("slerp", policies, _wide(init), t=0.5)


def _nuslerp(init: Tensor, policies: Tensors) -> Tensor:
    return _mergekit("nuslerp", [init, *policies], _wide(init), weight=1.0)


def _multislerp(init: Tensor, policies: Tensors) -> Tensor:
    return _mergekit("multislerp", [init, *policies], _wide(init), weight=1.0)


def between(a: Tensor, b: Tensor, rate: float, flat: float | None = None) -> Tensor:
    """slerp(a, b, rate), linear where |cos| is above `flat`; without it nothing waits for a GPU."""
    cosine = torch.clamp((a * b).sum() / (a.norm() * b.norm()), -1, 1)
    if flat is not None and abs(cosine.item()) > flat:
        return (1 - rate) * a + rate * b
    angle = torch.acos(cosine)
    return (torch.sin((1 - rate) * angle) * a + torch.sin(rate * angle) * b) / torch.sin(angle)


def warp_slerp(init: Tensor, policies: Tensors) -> Tensor:
    """WARP's merge as one would write it in torch: the recursion on the task vectors, in fp32."""
    start = init.to(_wide(init))
    total = policies[0].to(start.dtype) - start
    for m, policy in enumerate(policies[1:], 2):
        total = between(total, policy.to(start.dtype) - start, 1 / m)
    return (start + total).to(init.dtype)


def raw_target(init: Tensor, policies: Tensors) -> Tensor:
    first, second = (policy.double() for policy in policies)
    return between(first, second, 0.5, flat=0.9995)


def _multislerp_target(init: Tensor, policies: Tensors) -> Tensor:
    """The mean direction, moved by the mean of the parts of the unit vectors across it."""
    deltas = torch.stack([(policy.double() - init.double()).flatten() for policy in policies])
    lengths = deltas.norm(dim=1, keepdim=True)
    units = deltas / lengths
    mean = units.mean(0) / units.mean(0).norm()
    across = (units - (units @ mean)[:, None] * mean).mean(0)
    move = float(across.norm())
    direction = mean * math.cos(move) + across * (math.sin(move) / move if move else 1.0)
    merged: Tensor = init.double() + (direction * lengths.mean()).view(init.shape)
    return merged


def warp_target(init: Tensor, policies: Tensors) -> Tensor:
    """WARP's merge in float64."""
    return warp_slerp(init.double(), [policy.double() for policy in policies])


MERGES = [
    MergePeer("torch, the recursion in fp32", warp_slerp, warp_target, 16),
    MergePeer("mergekit slerp (raw weights)", _raw_slerp, raw_target, 2, "mergekit"),
    MergePeer("mergekit nuslerp, base", _nuslerp, warp_target, 2, "mergekit"),
    MergePeer("mergekit multislerp, base", _multislerp, _multislerp_target, 16, "mergekit"),
]


def mergekit_command(python: str, config: Path) -> list[str]:
    """mergekit's command line under the interpreter that has it, but for the output."""
    options = ["--quiet", "--no-copy-tokenizer", "--lazy-unpickle"]
    return [python, "-m", "mergekit.scripts.run_yaml", *options, str(config)]


def mergekit_version(python: str) -> str | None:
    """The version of mergekit that an interpreter can run, or None."""
    look = "import mergekit.scripts.run_yaml, importlib.metadata as m; print(m.version('mergekit'))"
    done = subprocess.run([python, "-c", look], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def rerun_under(python: str, module: str, given: Sequence[str] | None) -> NoReturn:
    """Run a whole benchmark under the interpreter that has mergekit: one process, one run."""
    options = sys.argv[1:] if given is None else given
    raise SystemExit(subprocess.call([python, "-m", module, *options, "--mergekit-python", ""]))
