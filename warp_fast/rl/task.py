"""What a run learns from, and how its policies are judged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from warp_fast.rl.config import WarpConfig
from warp_fast.rl.evaluate import Evaluator
from warp_fast.rl.policy import Policy, load_model
from warp_fast.rl.prompts import Prompt, read_prompts
from warp_fast.rl.reward import Reward, load_reward


@dataclass(frozen=True)
class Task:
    """Prompts and the reward of their completions."""

    prompts: list[Prompt]
    reward: Reward


def prepare(config: WarpConfig, policy: Policy) -> tuple[Task, Evaluator]:
    """Read prompts and rewards, and load SFT for comparison; raises ValueError on what is amiss."""
    longest = policy.context - config.max_new_tokens
    if longest < 1:
        raise ValueError(
            f"max_new_tokens must leave room in the model's context of {policy.context}; "
            f"got {config.max_new_tokens}"
        )
    prompts = read_prompts(config.prompts, policy.tokenizer, longest)
    held_back = read_prompts(config.eval_prompts or config.prompts, policy.tokenizer, longest)
    reward = load_reward(config.reward, policy.device)
    held_out = (
        load_reward(config.held_out_reward, policy.device) if config.held_out_reward else None
    )
    sft = load_model(config.policy, policy.model.config._attn_implementation)
    failures = Path(config.output) / "reward-failures.jsonl"
    sft = sft.to(policy.device).eval().requires_grad_(False)
    evaluator = Evaluator(config, policy, sft, held_back, reward, held_out, failures)
    return Task(prompts, reward), evaluator
