"""The fused ops in a training loop of your own: a KL to a slow EMA of the policy, then a merge."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from warp_fast import EMAAnchor, linear_warp_loss, slerp

VOCABULARY, WIDTH, BATCH, LENGTH = 50, 16, 8, 6


class TinyPolicy(nn.Module):
    """Stands for your model: hidden states from the body, logits from the head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Hidden states [B, T, D]."""
        hidden: Tensor = self.body(token_ids)
        return hidden


def sample(policy: TinyPolicy) -> Tensor:
    """[B, T + 1] token ids from the policy."""
    token_ids = torch.zeros(BATCH, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(LENGTH):
            logits = policy.head(policy(token_ids[:, -1:]))[:, 0]
            token_ids = torch.cat([token_ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    return token_ids


def reward(token_ids: Tensor) -> Tensor:
    """[B]: the share of even tokens."""
    return (token_ids[:, 1:] % 2 == 0).float().mean(1)


def train(policy: TinyPolicy, steps: int) -> list[float]:
    """REINFORCE with a leave-one-out baseline and a KL to the EMA anchor; the mean rewards."""
    anchor = EMAAnchor(policy, rate=0.01, storage="fp32")
    averaged: Any = anchor.module
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    rewards = []
    for _ in range(steps):
        token_ids = sample(policy)
        values = reward(token_ids)
        others = (values.sum() - values) / (BATCH - 1)
        inputs, targets = token_ids[:, :-1], token_ids[:, 1:]
        with torch.no_grad():
            anchor_hidden = averaged(inputs)
        result = linear_warp_loss(
            policy(inputs),
            policy.head.weight,
            targets,
            values - others,
            anchor_hidden=anchor_hidden,
            anchor_weight=averaged.head.weight,
            beta=0.1,
        )
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        anchor.update()
        rewards.append(values.mean().item())
    return rewards


def main(runs: int = 2, steps: int = 150) -> tuple[float, float]:
    """Train `runs` policies from one start and merge them; (first, last) mean reward."""
    torch.manual_seed(0)
    init = TinyPolicy()
    policies = [copy.deepcopy(init) for _ in range(runs)]
    curves = [train(policy, steps) for policy in policies]
    start = init.state_dict()
    merged = slerp(start, [policy.state_dict() for policy in policies])
    init.load_state_dict(merged)
    first = sum(sum(curve[:10]) for curve in curves) / (10 * runs)
    last = torch.stack([reward(sample(init)).mean() for _ in range(50)]).mean().item()
    print(f"mean reward: {first:.2f} at the start, {last:.2f} from the merged policy")
    return first, last


if __name__ == "__main__":
    main()
