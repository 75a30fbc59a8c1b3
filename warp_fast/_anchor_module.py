"""How the module of an EMAAnchor comes about, and whether it and the policy are what they were."""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import types
from typing import Any, Literal

import torch
from torch import Tensor, nn

from warp_fast._overlap import is_apart
from warp_fast._sharded import check_layout, is_sharded

Storage = Literal["split", "fp32", "bf16"]


def copied(
    policy: nn.Module, trainable: dict[str, nn.Parameter], dtypes: dict[str, torch.dtype]
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy of the policy with averages for its trainable parameters; the others are shared."""
    averages = {
        name: nn.Parameter(torch.empty_like(p, dtype=dtypes[name]), requires_grad=False)
        for name, p in trainable.items()
    }
    # deepcopy takes from the memo what stands for a parameter already: averages and shared ones
    stands_for: dict[int, Any] = {id(p): p for p in policy.parameters()}
    stands_for.update({id(p): averages[name] for name, p in trainable.items()})
    # nothing can be copied to elements that share a place
    stands_for.update({id(b): b.clone() for b in policy.buffers() if not is_apart(b)})
    _check_forwards(policy)
    module = copy.deepcopy(policy, stands_for)
    for part in module.modules():
        vars(part).pop("_compiled_call", None)  # what transformers compiled is the policy's
    return module, averages


def _check_forwards(policy: nn.Module) -> None:
    """Refuse a forward that would call the policy from a copy of it: deepcopy keeps functions."""
    modules = {id(part) for part in policy.modules()}
    for name, part in policy.named_modules():
        forward = vars(part).get("forward")
        # what torch.compile makes of a module has one too, and copies it rightly
        if forward is None or hasattr(part, "_orig_mod"):
            continue
        # a method's self, and what a partial was given, are copied
        kept = forward.func if isinstance(forward, functools.partial) else forward
        kept = kept.__func__ if isinstance(kept, types.MethodType) else kept
        if isinstance(forward, types.FunctionType) or _holds(kept, modules):
            raise ValueError(
                f"forward of {name or 'the policy'} was replaced by a function that holds the "
                "policy itself: a copy would call the policy. Make it a method of the module "
                "(types.MethodType) that finds everything in self, or give module="
            )


def _holds(value: Any, modules: set[int], seen: frozenset[int] = frozenset()) -> bool:
    """Whether a callable leads to one of the modules."""
    if id(value) in modules:
        return True
    if id(value) in seen:
        return False
    within: list[Any] = []
    if isinstance(value, types.MethodType):
        within = [value.__self__, value.__func__]
    elif isinstance(value, functools.partial):
        within = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.FunctionType):
        within = [*vars(value).values(), *(value.__defaults__ or ())]
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # nothing in it yet
                within.append(cell.cell_contents)
    return any(_holds(each, modules, seen | {id(value)}) for each in within)


@torch.no_grad()
def adopted(
    policy: nn.Module, module: nn.Module, dtypes: dict[str, torch.dtype]
) -> dict[str, nn.Parameter]:
    """The parameters of a given module that are to be averages; frozen ones get their values."""
    if module is policy:
        raise ValueError("module must be another module than the policy; got the policy itself")
    buffers_of(module, policy)
    theirs, ours = dict(policy.named_parameters()), dict(module.named_parameters())
    if theirs.keys() != ours.keys():
        odd = sorted(theirs.keys() ^ ours.keys())
        raise ValueError(f"module must have the policy's parameters; differing: {odd[:5]}")
    for name, parameter in ours.items():
        dtype = dtypes.get(name, theirs[name].dtype)
        if parameter.shape != theirs[name].shape or parameter.dtype != dtype:
            raise ValueError(
                f"{name} of module must be {tuple(theirs[name].shape)} {dtype}, the dtype of the "
                f"storage; got {tuple(parameter.shape)} {parameter.dtype}: cast module, or choose "
                "another storage ('fp32' for fp32, 'split' or 'bf16' for bf16)"
            )
        check_layout(f"{name} of module", parameter, theirs[name])
    in_training = {id(theirs[name]) for name in dtypes}
    if shared := [name for name, parameter in ours.items() if id(parameter) in in_training]:
        raise ValueError(
            f"module must have parameters of its own; it shares {shared[:5]} with the policy"
        )
    for name, parameter in ours.items():
        parameter.requires_grad_(False)
        if name not in dtypes:
            parameter.copy_(theirs[name])
    return {name: ours[name] for name in dtypes}


class Known:
    """The parameters of a module as they were when this was made."""

    def __init__(self, module: nn.Module) -> None:
        self.by_name = dict(module.named_parameters())
        self._placed = _placed(module)

    def replaced_in(self, module: nn.Module) -> list[str]:
        """Names of parameters that are gone, and of new ones; not of one that is renamed."""
        placed = _placed(module)
        if len(placed) == len(self._placed) and all(map(operator.is_, placed, self._placed)):
            return []
        known, now = self.by_name, dict(module.named_parameters())
        # between forward and backward FSDP2 has what it gathered in the place of a shard
        gathered = {n for n, p in known.items() if n in now and is_sharded(p) > is_sharded(now[n])}
        before, after = ({id(p) for p in each.values()} for each in (known, now))
        gone = [n for n, p in known.items() if id(p) not in after]
        new = [n for n, p in now.items() if id(p) not in before]
        return [name for name in dict.fromkeys(gone + new) if name not in gathered]


def _placed(module: nn.Module) -> list[nn.Parameter | None]:
    """What all its parts have, in their order; faster than by name, which every update would."""
    return [p for part in module.modules() for p in part._parameters.values()]


def buffers_of(module: nn.Module, policy: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The buffers of the anchor beside those of the policy, which must be of their shapes."""
    # under all their names: rotary embeddings make one of two buffers, and two again
    ours, theirs = (dict(m.named_buffers(remove_duplicate=False)) for m in (module, policy))
    first, second = ({n: b.shape for n, b in each.items()} for each in (ours, theirs))
    if first != second:
        odd = sorted({name for name, _ in first.items() ^ second.items()})
        raise ValueError(
            f"the anchor must have the buffers of the policy; differing: {odd[:5]}. Make the "
            "anchor after the policy has them"
        )
    return [(buffer, theirs[name]) for name, buffer in ours.items()]


def average_dtype(name: str, parameter: Tensor, storage: Storage) -> torch.dtype:
    if not parameter.is_floating_point():
        raise TypeError(f"{name} must be floating to be averaged; got {parameter.dtype}")
    if storage == "fp32":
        return torch.promote_types(parameter.dtype, torch.float32)
    if parameter.dtype == torch.float64:
        raise TypeError(f"{name} is float64, which {storage} storage cannot hold; use 'fp32'")
    return torch.bfloat16
