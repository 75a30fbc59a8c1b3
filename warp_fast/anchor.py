"""EMAAnchor: a second module whose weights are the exponential moving average of a policy."""

from __future__ import annotations

import contextlib
import copy
import operator
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from warp_fast._overlap import is_apart
from warp_fast._sharded import (
    check_layout,
    gatherers,
    holds_fsdp1,
    is_sharded,
    local,
    with_local,
)
from warp_fast.ema import check_rate, counter, ema_update_
from warp_fast.reference.ema import join_float32, split_float32

Storage = Literal["split", "fp32", "bf16"]


class EMAAnchor:
    """The KL anchor of WARP: starts as an exact copy of the policy and follows it slowly.

        anchor <- anchor + rate * (policy - anchor)     after every optimizer step
                                                        (arXiv 2406.16768, Algorithm 1; rate is mu)

    Args:
        policy: the module being trained. Its frozen parameters are shared, not copied, so they must
            stay frozen; tied weights are stored once; buffers are copied at every update. Make the
            anchor when the parameters are what they stay: after fully_shard or a load with assign.
        rate: mu in [0, 1]; may be assigned to later. 0 keeps a static anchor.
        storage: "split" keeps bf16 weights in `module` and 16 more bits aside, together an exact
            fp32 average at 4 bytes per parameter; "fp32" keeps fp32 weights in `module` (fp64 for a
            fp64 policy); "bf16" keeps bf16 weights, rounded stochastically, at 2 bytes. Where the
            policy is fp32, an anchor of bf16 weights is its rounding: their KL starts near 1e-4
            nats per token, not at 0, and parts that are frozen in fp32 need autocast; give "fp32".
        seed: of the stochastic rounding.
        module: what becomes the anchor, for a policy that cannot be copied (FSDP2): built, cast to
            the dtype of the storage and sharded like the policy. Its values are overwritten.

    Attributes:
        module: the anchor itself, in eval mode, with parameters that take no gradient; call it like
            the policy, under torch.no_grad() (hooks are copied too, and some make inputs take one).
        step: updates made since the last reset.

    Raises:
        ValueError: unknown storage, a rate outside [0, 1], a module unlike the policy, or a policy
            whose copy would still be the policy; later, before anything is written, a parameter
            that was frozen before, is another object, gone or new, other buffers, or an anchor cast
            to another dtype. TypeError: a float64 parameter in split or bf16 storage.

    Traffic: an update reads the trainable parameters and reads and writes the average: 10 bytes per
        parameter for split or fp32 storage of a bf16 policy, 6 for bf16.
    """

    def __init__(
        self,
        policy: nn.Module,
        rate: float = 0.01,
        storage: Storage = "split",
        *,
        seed: int = 0,
        module: nn.Module | None = None,
    ) -> None:
        if storage not in ("split", "fp32", "bf16"):
            raise ValueError(f"storage must be 'split', 'fp32' or 'bf16'; got {storage!r}")
        check_rate(rate)
        if any(isinstance(part, nn.parallel.DistributedDataParallel) for part in policy.modules()):
            raise ValueError(
                "policy must be what DistributedDataParallel wraps; pass policy.module"
            )
        if module is None and holds_fsdp1(policy):
            raise ValueError(
                "what FullyShardedDataParallel wraps cannot be copied; give module=, built and "
                "wrapped like the policy"
            )
        self.policy = policy
        self.rate = rate
        self.storage = storage
        self.seed = counter("seed", seed)
        self.step = 0
        trainable = {n: p for n, p in policy.named_parameters() if p.requires_grad}
        dtypes = {n: _average_dtype(n, p, storage) for n, p in trainable.items()}
        if module is None:
            self.module, self._averages = _copied(policy, trainable, dtypes)
        else:
            self.module, self._averages = module, _adopted(policy, module, dtypes)
        self.module.eval()
        self._residuals: dict[str, Tensor] = {}
        if storage == "split":
            for name, average in self._averages.items():
                self._residuals[name] = torch.zeros_like(average, dtype=torch.int16)
        self._sources = list(trainable.values())
        self._known = dict(policy.named_parameters())
        self._dtypes = list(dtypes.values())
        self._placed = _parameters(policy)
        self._gatherers = gatherers(self.module)
        self._is_swapped = False
        self.reset_()

    def update(self, stream: torch.cuda.Stream | None = None) -> None:
        """Move the anchor one step toward the policy; call it after every optimizer step.

        stream: do so there, behind what the current stream has to do by now. The current stream
            must wait for it before the policy changes again or the anchor is used.
        """
        if stream is None:
            self._update()
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            self._update()

    def _check(self) -> None:
        """Policy and anchor are as they were when the anchor was made."""
        if self._is_swapped:
            raise RuntimeError("the policy has the anchor's weights; leave swapped() before that")
        frozen = {n: p for n, p in self._known.items() if n not in self._averages}
        if thawed := [name for name, p in frozen.items() if p.requires_grad]:
            raise ValueError(
                f"parameters that are frozen when the anchor is made have no average; {thawed[:5]} "
                "require a gradient now: make the anchor after they do"
            )
        now = _parameters(self.policy)
        same = len(now) == len(self._placed) and all(map(operator.is_, now, self._placed))
        if not same and (odd := _replaced(self._known, self.policy)):
            raise ValueError(
                f"the policy has other parameters than when the anchor was made ({odd[:5]}), as "
                "after fully_shard, load_state_dict(assign=True) or another layer: make the anchor "
                "after that"
            )
        self._check_averages()

    def _check_averages(self) -> None:
        for (name, average), dtype in zip(self._averages.items(), self._dtypes, strict=True):
            if average.dtype != dtype:
                raise ValueError(
                    f"the anchor's {name} must stay {dtype}, which its storage is made of; it is "
                    f"{average.dtype}: do not cast anchor.module, use autocast"
                )

    @torch.no_grad()
    def _update(self) -> None:
        self._check()
        buffers = _buffers(self.module, self.policy)
        ema_update_(
            list(self._averages.values()),
            self._sources,
            self.rate,
            residual=list(self._residuals.values()) if self.storage == "split" else None,
            stochastic=self.storage == "bf16",
            seed=self.seed,
            step=self.step,
        )
        self._copy(buffers)
        self.step += 1

    @contextlib.contextmanager
    def swapped(self) -> Iterator[nn.Module]:
        """The policy with the anchor's weights, as for an evaluation; its own come back after.

        No copy where policy and average have one dtype. Do not train inside. Raises ValueError for
        a sharded policy: evaluate `module` instead.
        """
        if holds_fsdp1(self.policy) or any(is_sharded(source) for source in self._sources):
            raise ValueError("a sharded policy cannot be swapped; evaluate anchor.module instead")
        self._check()
        own = [source.data for source in self._sources]
        try:
            self._is_swapped = True
            for source, (name, average) in zip(self._sources, self._averages.items(), strict=True):
                alike = average.dtype == source.dtype
                source.data = average.data if alike else self._exact(name).to(source.dtype)
            torch.clear_autocast_cache()  # of the casts of other weights
            yield self.policy
        finally:
            for source, data in zip(self._sources, own, strict=True):
                source.data = data
            torch.clear_autocast_cache()
            self._is_swapped = False

    @torch.no_grad()
    def reset_(self) -> None:
        """Make the anchor an exact copy of the policy again (each run of WARP starts so).

        bf16 storage rounds what is not bf16.
        """
        self._check()
        buffers = _buffers(self.module, self.policy)
        for (name, average), source in zip(self._averages.items(), self._sources, strict=True):
            value, target = local(source.detach()), local(average)
            if self.storage == "split":
                high, low = split_float32(value.float())
                target.copy_(high)
                local(self._residuals[name]).copy_(low)
            else:
                target.copy_(value)
        self._copy(buffers)
        self.step = 0

    def _copy(self, buffers: list[tuple[Tensor, Tensor]]) -> None:
        for ours, theirs in buffers:
            ours.copy_(theirs)
        # FSDP2 keeps what a root gathered until its backward pass, and an anchor has none
        for part in self._gatherers:
            part.reshard()

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs, by reference: the averages, residuals, step and rate.

        Frozen parameters belong to the policy's state and are not in it.
        """
        return {
            "storage": self.storage,
            "rate": float(self.rate),
            "seed": self.seed,
            "step": self.step,
            "averages": {name: average.detach() for name, average in self._averages.items()},
            "residuals": dict(self._residuals),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; raises ValueError, changing nothing, if it is of another anchor.

        Buffers and frozen parameters are the policy's: load the policy first.
        """
        if missing := sorted(self.state_dict().keys() - state.keys()):
            raise ValueError(f"the state of an anchor must hold {missing}; got {sorted(state)}")
        if state["storage"] != self.storage:
            raise ValueError(
                f"storage must be {self.storage!r}; the state has {state['storage']!r}"
            )
        check_rate(state["rate"])
        seed, step = counter("seed", state["seed"]), counter("step", state["step"])
        self._check()
        buffers = _buffers(self.module, self.policy)
        targets: dict[str, dict[str, Tensor]] = {
            "averages": dict(self._averages.items()),
            "residuals": self._residuals,
        }
        for part, ours in targets.items():
            theirs = state[part]
            if not isinstance(theirs, Mapping) or not all(
                isinstance(tensor, Tensor) for tensor in theirs.values()
            ):
                raise ValueError(f"{part} must be tensors by name; got {type(theirs).__name__}")
            if ours.keys() != theirs.keys():
                odd = sorted(ours.keys() ^ theirs.keys())
                raise ValueError(f"{part} must have the policy's names; differing: {odd[:5]}")
            for name in ours:
                expected, got = ours[name], theirs[name]
                if (expected.shape, expected.dtype) != (got.shape, got.dtype):
                    raise ValueError(
                        f"{part} of {name} must be {tuple(expected.shape)} {expected.dtype}; "
                        f"got {tuple(got.shape)} {got.dtype}"
                    )
        for part, ours in targets.items():
            for name, tensor in ours.items():
                tensor.copy_(state[part][name])
        self._copy(buffers)
        self.rate, self.seed, self.step = state["rate"], seed, step

    def averaged_state_dict(self) -> dict[str, Tensor]:
        """The anchor's weights at full precision (fp32 averages), under the names of the module.

        Averages of fp32 storage, frozen parameters and buffers by reference: clone what is to stay.
        """
        self._check_averages()
        exact = {id(average): self._exact(name) for name, average in self._averages.items()}
        tensors = self.module.state_dict(keep_vars=True)
        # what get_extra_state gives need not be a tensor
        others = {n: x.detach() if isinstance(x, Tensor) else x for n, x in tensors.items()}
        return {name: exact.get(id(tensor), others[name]) for name, tensor in tensors.items()}

    def _exact(self, name: str) -> Tensor:
        average = self._averages[name].detach()
        if self.storage != "split":
            return average.to(torch.promote_types(average.dtype, torch.float32))
        joined = join_float32(local(average), local(self._residuals[name]))
        return with_local(joined, average)


def _copied(
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
    for name, part in policy.named_modules():
        # what torch.compile makes of a module has one too, and copies it rightly
        compiled = hasattr(part, "_orig_mod")
        if isinstance(vars(part).get("forward"), types.FunctionType) and not compiled:
            raise ValueError(
                f"forward of {name or 'the policy'} was replaced by a function, which holds the "
                "policy itself: a copy would call the policy. Make it a method of the module "
                "(types.MethodType), or give module="
            )
    return copy.deepcopy(policy, stands_for), averages


@torch.no_grad()
def _adopted(
    policy: nn.Module, module: nn.Module, dtypes: dict[str, torch.dtype]
) -> dict[str, nn.Parameter]:
    """The parameters of a given module that are to be averages; frozen ones get their values."""
    if module is policy:
        raise ValueError("module must be another module than the policy; got the policy itself")
    _buffers(module, policy)
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


def _parameters(policy: nn.Module) -> list[nn.Parameter | None]:
    """What all its modules have, in their order; faster than by name, which every update would."""
    return [p for part in policy.modules() for p in part._parameters.values()]


def _replaced(known: dict[str, nn.Parameter], policy: nn.Module) -> list[str]:
    """Names of parameters that are gone, and of new ones; not of one that has another name now."""
    now = dict(policy.named_parameters())
    # between forward and backward FSDP2 has what it gathered in the place of a shard
    gathered = {n for n, p in known.items() if n in now and is_sharded(p) > is_sharded(now[n])}
    before, after = ({id(p) for p in each.values()} for each in (known, now))
    gone = [n for n, p in known.items() if id(p) not in after]
    new = [n for n, p in now.items() if id(p) not in before]
    return [name for name in dict.fromkeys(gone + new) if name not in gathered]


def _buffers(module: nn.Module, policy: nn.Module) -> list[tuple[Tensor, Tensor]]:
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


def _average_dtype(name: str, parameter: Tensor, storage: Storage) -> torch.dtype:
    if not parameter.is_floating_point():
        raise TypeError(f"{name} must be floating to be averaged; got {parameter.dtype}")
    if storage == "fp32":
        return torch.promote_types(parameter.dtype, torch.float32)
    if parameter.dtype == torch.float64:
        raise TypeError(f"{name} is float64, which {storage} storage cannot hold; use 'fp32'")
    return torch.bfloat16
