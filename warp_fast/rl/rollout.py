"""Sampling completions from the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from warp_fast.loss import WarpLoss, linear_warp_loss
from warp_fast.rl.policy import Policy, head_weight
from warp_fast.rl.prompts import Prompt


@dataclass(frozen=True)
class Rollout:
    """B completions, left-padded prompts before them.

    Attributes:
        prompts: B prompts, those of one group next to each other.
        completions: B texts, without special tokens.
        tokens, attention_mask: [B, P + T].
        mask: [B, T] bool, the sampled tokens, up to and including the one that ends a completion.
        finished: [B] bool, completions that ended by themselves.
    """

    prompts: list[Prompt]
    completions: list[str]
    tokens: Tensor
    attention_mask: Tensor
    mask: Tensor
    finished: Tensor

    @property
    def completion_ids(self) -> Tensor:
        """[B, T]."""
        return self.tokens[:, -self.mask.shape[1] :]

    @property
    def lengths(self) -> Tensor:
        """[B] sampled tokens."""
        return self.mask.sum(1)

    def rows(self, part: slice) -> Rollout:
        """A part of the batch."""
        return Rollout(
            self.prompts[part],
            self.completions[part],
            self.tokens[part],
            self.attention_mask[part],
            self.mask[part],
            self.finished[part],
        )


@torch.no_grad()
def sample(
    policy: Policy, prompts: list[Prompt], temperature: float, max_new_tokens: int, seed: int
) -> Rollout:
    """Sample one completion per prompt from pi at `temperature`, with nothing truncated.

    No top-k, top-p or penalty: the log-probabilities of the loss are those of the sampled
    distribution. Equal seeds give equal completions.
    """
    batch = policy.tokenizer.pad(
        {"input_ids": [p.token_ids for p in prompts]}, padding=True, return_tensors="pt"
    ).to(policy.device)
    torch.manual_seed(seed)
    with policy.autocast():
        tokens = policy.model.generate(
            **batch,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
        )
    sampled = tokens[:, batch["input_ids"].shape[1] :]
    ends = torch.isin(sampled, torch.tensor(policy.eos_ids, device=sampled.device).long())
    mask = (ends.cumsum(1) - ends.long()) == 0  # up to and including the first end
    attention_mask = torch.cat([batch["attention_mask"], mask.to(batch["attention_mask"])], dim=1)
    completions = policy.tokenizer.batch_decode(
        [row[kept].tolist() for row, kept in zip(sampled, mask, strict=True)],
        skip_special_tokens=True,
    )
    return Rollout(prompts, completions, tokens, attention_mask, mask, ends.any(1))


def rollout_loss(
    policy: Policy,
    anchor: Any,
    rollout: Rollout,
    advantages: Tensor,
    temperature: float,
    **options: Any,
) -> WarpLoss:
    """`linear_warp_loss` of sampled completions; anchor: a module of the policy's architecture."""
    given = (rollout.tokens, rollout.attention_mask, rollout.mask.shape[1])
    with torch.no_grad():
        anchor_hidden = policy.hidden(anchor, *given)
    return linear_warp_loss(
        policy.hidden(policy.model, *given),
        head_weight(policy.model),
        rollout.completion_ids,
        advantages,
        anchor_hidden=anchor_hidden,
        anchor_weight=head_weight(anchor),
        mask=rollout.mask,
        temperature=temperature,
        softcap=policy.softcap,
        **options,
    )
