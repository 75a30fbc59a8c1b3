"""EMAAnchor: a second module whose weights are the exponential moving average of a policy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from warp_fast._anchor_module import (
    Known,
    Storage,
    adopted,
    average_dtype,
    buffers_of,
    copied,
)
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
            that was frozen before, is another object, gone or new (of the policy or the anchor),
            other buffers, or an anchor cast to another dtype. TypeError: a float64 parameter in
            split or bf16 storage.

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
        if not isinstance(policy, nn.Module):
            raise TypeError(f"policy must be a torch.nn.Module; got {type(policy).__name__}")
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
        dtypes = {n: average_dtype(n, p, storage) for n, p in trainable.items()}
        if module is None:
            self.module, self._averages = copied(policy, trainable, dtypes)
        else:
            self.module, self._averages = module, adopted(policy, module, dtypes)
        self.module.eval()
        self._residuals: dict[str, Tensor] = {}
        if storage == "split":
            for name, average in self._averages.items():
                self._residuals[name] = torch.zeros_like(average, dtype=torch.int16)
        self._sources = list(trainable.values())
        self._dtypes = list(dtypes.values())
        self._known, self._known_averages = Known(policy), Known(self.module)
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
        frozen = {n: p for n, p in self._known.by_name.items() if n not in self._averages}
        if thawed := [name for name, p in frozen.items() if p.requires_grad]:
            raise ValueError(
                f"parameters that are frozen when the anchor is made have no average; {thawed[:5]} "
                "require a gradient now: make the anchor after they do"
            )
        if odd := self._known.replaced_in(self.policy):
            raise ValueError(
                f"the policy has other parameters than when the anchor was made ({odd[:5]}), as "
                "after fully_shard, load_state_dict(assign=True) or another layer: make the anchor "
                "after that"
            )
        self._check_averages()

    def _check_averages(self) -> None:
        if odd := self._known_averages.replaced_in(self.module):
            raise ValueError(
                f"anchor.module must keep its parameters, which are the averages; {odd[:5]} were "
                "replaced: give a new EMAAnchor the module, or load the anchor's own state"
            )
        for (name, average), dtype in zip(self._averages.items(), self._dtypes, strict=True):
            if average.dtype != dtype:
                raise ValueError(
                    f"the anchor's {name} must stay {dtype}, which its storage is made of; it is "
                    f"{average.dtype}: do not cast anchor.module, use autocast"
                )

    @torch.no_grad()
    def _update(self) -> None:
        self._check()
        buffers = buffers_of(self.module, self.policy)
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
        buffers = buffers_of(self.module, self.policy)
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

        Buffers and frozen parameters are the policy's: load the policy first. A sharded anchor has
        a sharded state: torch.distributed.checkpoint saves and loads it.
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
        buffers = buffers_of(self.module, self.policy)
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
                check_layout(f"{part} of {name}", got, expected)
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
