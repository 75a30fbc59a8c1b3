"""The best that any policy can do on the demo's task at a given KL: the tilted SFT policy.

pi*(y | x) = pi_sft(y | x) exp(lambda r(y)) / Z(x)     has the most reward at its KL to SFT
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from warp_fast.demo.task import naive_reward, true_score
from warp_fast.rl.config import WarpConfig
from warp_fast.rl.policy import load_policy
from warp_fast.rl.prompts import derive_seed
from warp_fast.rl.rollout import sample
from warp_fast.rl.task import prepare

_SAMPLES = 2048  # of each prompt
_LARGEST_KL = math.log(_SAMPLES) / 2  # beyond, a few samples hold all the weight


def best_curve(config: WarpConfig) -> list[dict[str, float]]:
    """Points of the optimal front, estimated by reweighting completions of the SFT policy."""
    policy = load_policy(config)
    prompts = prepare(config, policy)[0].prompts
    rewards, scores = [], []
    for prompt in prompts:
        seed = derive_seed("optimum", config.seed, prompt.text)
        rollout = sample(
            policy, [prompt] * _SAMPLES, config.temperature, config.max_new_tokens, seed
        )
        given = [prompt.text] * _SAMPLES
        rewards.append(naive_reward(given, rollout.completions))
        scores.append(true_score(given, rollout.completions))
    tables = torch.tensor(rewards).double(), torch.tensor(scores).double()
    points = [_tilted(*tables, 0.25 * step) for step in range(41)]
    return [point for point in points if point["kl"] <= _LARGEST_KL]


def _tilted(rewards: Tensor, scores: Tensor, strength: float) -> dict[str, float]:
    """The point of the policy with these weights on the samples [prompts, samples]."""
    weights = (strength * rewards).softmax(1)
    divergence = weights * (weights * rewards.shape[1]).log()
    found = {"kl": divergence, "reward": weights * rewards, "held_out": weights * scores}
    return {name: values.sum(1).mean().item() for name, values in found.items()}
