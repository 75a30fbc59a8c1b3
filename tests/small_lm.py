"""A small causal LM with its head inside, whose methods return losses, as trainers wrap them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from warp_fast import linear_token_logprobs, linear_warp_loss

VOCABULARY, WIDTH, LENGTH = 37, 8, 5


@dataclass(frozen=True)
class Batch:
    """Completions: [B, LENGTH] each, but advantages [B]."""

    inputs: Tensor
    targets: Tensor
    advantages: Tensor
    mask: Tensor

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(self.inputs[rows], self.targets[rows], self.advantages[rows], self.mask[rows])


def batch(sequences: int, seed: int = 0) -> Batch:
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (sequences, LENGTH + 1), generator=make)
    mask = torch.rand(sequences, LENGTH, generator=make) > 0.3
    return Batch(ids[:, :-1], ids[:, 1:], torch.randn(sequences, generator=make), mask)


class Block(nn.Module):
    """Mixes each token with those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        count = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None]
        mixed: Tensor = self.down(torch.tanh(self.up(hidden.cumsum(1) / count)))
        return hidden + mixed


class SmallLM(nn.Module):
    """Its methods run the fused head, so that a wrapper of the module has its weight at hand."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.last = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def hidden(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.embed(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.last(hidden)
        return hidden

    def loss(self, part: Batch, anchor_logprobs: Tensor, **options: Any) -> Any:
        options = {"kl": "reward_to_go", "beta": 0.3, **options}
        return linear_warp_loss(
            self.hidden(part.inputs),
            self.head.weight,
            part.targets,
            part.advantages,
            anchor_logprobs=anchor_logprobs,
            mask=part.mask,
            **options,
        ).loss

    # DistributedDataParallel knows this method alone
    forward = loss

    @torch.no_grad()
    def logprobs(self, part: Batch) -> Tensor:
        """What an anchor gives: log pi(y_t), [B, LENGTH]."""
        found: Tensor = linear_token_logprobs(
            self.hidden(part.inputs), self.head.weight, part.targets
        )
        return found


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """By name; of every parameter."""
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found
