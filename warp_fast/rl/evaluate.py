"""Evaluation of policies: reward and KL to SFT per completion, and the sweep of eta between two."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from warp_fast.rl.config import WarpConfig
from warp_fast.rl.files import replaced
from warp_fast.rl.policy import Policy
from warp_fast.rl.prompts import Prompt, derive_seed
from warp_fast.rl.reward import Reward, score
from warp_fast.rl.rollout import Rollout, rollout_loss, sample
from warp_fast.slerp import lerp

_Z95 = 1.96  # half-width of a 95 % normal interval, in standard errors


@dataclass(frozen=True)
class Evaluation:
    """Means over sampled completions; `*_ci` is the half-width of their 95 % interval.

    Attributes:
        reward: of the trained reward, without the length penalty.
        held_out: of the held-out reward; NaN when there is none.
        kl: KL(policy || SFT) of a whole completion, nats: exact over the vocabulary at every
            sampled prefix, summed over the completion (unbiased, never negative).
        length: tokens per completion.
        samples: completions.
    """

    reward: float
    reward_ci: float
    held_out: float
    held_out_ci: float
    kl: float
    kl_ci: float
    length: float
    samples: int

    @property
    def has_held_out(self) -> bool:
        """Whether there is a held-out reward."""
        return not math.isnan(self.held_out)


@dataclass(frozen=True)
class FrontPoint(Evaluation):
    """A point of a front: eta of the way from SFT to a policy, which is named."""

    policy: str
    eta: float


@dataclass
class Evaluator:
    """Samples from the policy and compares it with SFT; equal weights give equal results."""

    config: WarpConfig
    policy: Policy
    sft: Any
    prompts: list[Prompt]
    reward: Reward
    held_out: Reward | None
    failures: Path

    def __call__(self) -> Evaluation:
        """Evaluate the weights that policy.model has now."""
        rewards: list[float] = []
        held_out: list[float] = []
        kls: list[float] = []
        lengths: list[int] = []
        count = self.config.eval_samples
        size = self.config.eval_batch_size or self.config.batch_size
        for start in range(0, count, size):
            picked = range(start, min(start + size, count))
            rollout = sample(
                self.policy,
                [self.prompts[i % len(self.prompts)] for i in picked],
                self.config.temperature,
                self.config.max_new_tokens,
                derive_seed("evaluation", self.config.seed, start),
            )
            rewards += score(self.reward, rollout.prompts, rollout.completions, self.failures)
            if self.held_out is not None:
                held_out += score(
                    self.held_out, rollout.prompts, rollout.completions, self.failures
                )
            kls += self._kl(rollout)
            lengths += rollout.lengths.tolist()
        return Evaluation(
            *_mean_and_ci(rewards),
            *_mean_and_ci(held_out),
            *_mean_and_ci(kls),
            sum(lengths) / count,
            count,
        )

    @torch.no_grad()
    def _kl(self, rollout: Rollout) -> list[float]:
        advantages = torch.zeros(len(rollout.prompts), device=self.policy.device)
        result = rollout_loss(
            self.policy, self.sft, rollout, advantages, self.config.temperature, kl="reverse"
        )
        values: list[float] = result.kl.sum(1).tolist()
        return values


def sweep(
    evaluator: Evaluator,
    etas: Sequence[float],
    name: str,
    on_point: Callable[[FrontPoint], None] = lambda point: None,
) -> list[FrontPoint]:
    """Evaluate theta_sft + eta * (theta - theta_sft) for every eta; theta is policy.model's now.

    The policy's weights are theta again at the end.
    """
    weights = dict(evaluator.policy.model.named_parameters())
    target = {name: weight.detach().clone() for name, weight in weights.items()}
    sft = {name: weight.detach() for name, weight in evaluator.sft.named_parameters()}
    points = []
    for eta in etas:
        lerp(sft, [target], eta=eta, out=weights)
        points.append(FrontPoint(**vars(evaluator()), policy=name, eta=eta))
        on_point(points[-1])
    lerp(target, [target], out=weights)
    return points


def write_front(path: Path, points: Iterable[FrontPoint]) -> None:
    """Write front.csv: a row per point, policy and eta first."""
    names = [field.name for field in dataclasses.fields(FrontPoint)]
    names = names[-2:] + names[:-2]
    with replaced(path) as aside, open(aside, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, names)
        writer.writeheader()
        writer.writerows(vars(point) for point in points)


def read_front(path: Path) -> list[FrontPoint]:
    """The points of a front.csv."""
    kinds: dict[str, Callable[[str], Any]] = {"policy": str, "samples": int}
    with open(path, newline="", encoding="utf-8") as handle:
        return [
            FrontPoint(**{key: kinds.get(key, float)(value) for key, value in row.items()})
            for row in csv.DictReader(handle)
        ]


def _mean_and_ci(values: list[float]) -> tuple[float, float]:
    if not values:
        return math.nan, math.nan
    tensor = torch.tensor(values, dtype=torch.float64)
    spread = tensor.std().item() if len(values) > 1 else math.nan
    return tensor.mean().item(), _Z95 * spread / math.sqrt(len(values))
