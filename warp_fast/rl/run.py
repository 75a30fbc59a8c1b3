"""One RL run: REINFORCE with a KL penalty toward an EMA anchor, resumable at any step."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warp_fast.anchor import EMAAnchor
from warp_fast.rl.config import WarpConfig
from warp_fast.rl.files import append_json_lines, remove, replaced
from warp_fast.rl.policy import Policy
from warp_fast.rl.prompts import derive_seed, prompt_batch
from warp_fast.rl.reward import advantages, score
from warp_fast.rl.rollout import Rollout, rollout_loss, sample
from warp_fast.rl.task import Task

Metrics = dict[str, Any]


class Run:
    """Run m of iteration i: owns its state (policy weights, anchor, optimizer, step) and files.

    Everything random is drawn from seeds derived from (seed, iteration, run, step), so the state
    needs no generator, and a run that goes on after a kill ends with the same bits.

    Args:
        directory: holds state.pt while the run goes on, metrics.jsonl, samples.jsonl, and policy/
            when it is done.
    """

    def __init__(
        self,
        config: WarpConfig,
        policy: Policy,
        task: Task,
        directory: Path,
        iteration: int,
        number: int,
    ) -> None:
        self.config, self.policy, self.task = config, policy, task
        self.directory = directory
        self.iteration, self.number = iteration, number
        self.steps = config.steps_of(iteration)
        self.step = 0
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]
        self.anchor = EMAAnchor(policy.model, config.ema_rate, config.anchor_storage)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.adam_betas,
            weight_decay=config.weight_decay,
        )
        directory.mkdir(parents=True, exist_ok=True)

    def train(
        self,
        on_step: Callable[[Metrics], None] = lambda metrics: None,
        evaluate: Callable[[], Metrics] | None = None,
    ) -> None:
        """Go on from the last checkpoint to the end, and save the policy.

        Args:
            on_step: called with the metrics of every step.
            evaluate: gives more metrics, every config.eval_every steps.
        """
        self._resume()
        while self.step < self.steps:
            metrics = self.train_step()
            every = self.config.eval_every
            if evaluate is not None and every and self.step % every == 0:
                metrics |= evaluate()
            append_json_lines(self.directory / "metrics.jsonl", [metrics])
            on_step(metrics)
            if self.step % self.config.save_every == 0 and self.step < self.steps:
                self._save()
        self.policy.save(self.directory / "policy")
        remove(self.directory / "state.pt")

    def train_step(self) -> Metrics:
        """Rollout, reward, loss, optimizer, anchor.

        Raises:
            ValueError: the gradient is not finite; weights and checkpoint are those before it.
        """
        started = time.perf_counter()
        config = self.config
        seed = derive_seed(config.seed, self.iteration, self.number)
        picked = prompt_batch(
            len(self.task.prompts), config.batch_size // config.samples_per_prompt, self.step, seed
        )
        prompts = [self.task.prompts[i] for i in picked for _ in range(config.samples_per_prompt)]
        rollout = sample(
            self.policy,
            prompts,
            config.temperature,
            config.max_new_tokens,
            derive_seed("rollout", seed, self.step),
        )
        rewards = self._rewards(rollout)
        penalized = rewards - config.length_penalty * rollout.lengths
        gains = advantages(penalized, config.samples_per_prompt, config.baseline)
        metrics = self._accumulate(rollout, gains)
        rate = config.learning_rate * min(1.0, (self.step + 1) / max(1, config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm).item()
        if not math.isfinite(norm):
            raise ValueError(
                f"the gradient must be finite; its norm is {norm} at step {self.step + 1} of "
                f"{self.directory}, whose last checkpoint is kept: rewards, or the learning rate "
                f"({config.learning_rate:g}), are too large"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.anchor.update()
        self.step += 1
        if self.step == 1 or self.step % self.config.save_every == 0:
            self._keep_samples(rollout, rewards)
        return {
            "iteration": self.iteration,
            "run": self.number,
            "step": self.step,
            "reward": rewards.mean().item(),
            "reward_std": rewards.std().item() if len(rewards) > 1 else 0.0,
            **metrics,
            "length": rollout.lengths.float().mean().item(),
            "finished": rollout.finished.float().mean().item(),
            "tokens": int(rollout.lengths.sum()),
            "grad_norm": norm,
            "learning_rate": rate,
            "seconds": time.perf_counter() - started,
        }

    def _rewards(self, rollout: Rollout) -> Tensor:
        failures = self.directory / "reward-failures.jsonl"
        values = score(self.task.reward, rollout.prompts, rollout.completions, failures)
        return torch.tensor(values, device=self.policy.device)

    def _accumulate(self, rollout: Rollout, gains: Tensor) -> Metrics:
        """Add the gradient of the loss over the batch, in micro-batches; exact for any size."""
        config = self.config
        size = config.micro_batch_size or config.batch_size
        loss = kl = entropy = 0.0
        for start in range(0, config.batch_size, size):
            part = rollout.rows(slice(start, start + size))
            result = rollout_loss(
                self.policy,
                self.anchor.module,
                part,
                gains[start : start + size],
                config.temperature,
                beta=config.beta,
                kl=config.kl,
                normalizer=float(config.batch_size),
                return_entropy=True,
            )
            torch.autograd.backward(result.loss)
            assert result.entropy is not None
            loss += result.loss.item()
            kl += (result.logprobs - result.anchor_logprobs).sum().item()
            entropy += result.entropy.sum().item()
        return {
            "loss": loss,
            "kl_to_anchor": kl / config.batch_size,
            "entropy": entropy / int(rollout.lengths.sum()),
        }

    def _keep_samples(self, rollout: Rollout, rewards: Tensor) -> None:
        shown = range(0, min(4 * self.config.samples_per_prompt, len(rewards)))
        rows = [
            {
                "iteration": self.iteration,
                "run": self.number,
                "step": self.step,
                "prompt": rollout.prompts[i].text,
                "completion": rollout.completions[i],
                "reward": rewards[i].item(),
            }
            for i in shown
        ]
        append_json_lines(self.directory / "samples.jsonl", rows)

    # --- state: one owner, one way in and one way out ---

    def _save(self) -> None:
        logs = {name: _size(self.directory / name) for name in ("metrics.jsonl", "samples.jsonl")}
        state = {
            "step": self.step,
            "policy": self.policy.model.state_dict(),
            "anchor": self.anchor.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "logs": logs,
        }
        with replaced(self.directory / "state.pt") as aside:
            torch.save(state, aside)

    def _resume(self) -> None:
        path = self.directory / "state.pt"
        if not path.exists():
            self._truncate_logs({})
            return
        try:
            state = torch.load(path, map_location=self.policy.device, weights_only=True)
            self.policy.model.load_state_dict(state["policy"])
            self.anchor.load_state_dict(state["anchor"])
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception as error:
            raise ValueError(
                f"checkpoint {path} must be one that this run wrote; it could not be read: "
                f"{error}. Delete it to start this run again"
            ) from error
        self.step = state["step"]
        self._truncate_logs(state["logs"])

    def _truncate_logs(self, sizes: dict[str, int]) -> None:
        """Drop what a killed process logged after the checkpoint that is resumed."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.directory / name
            if _size(path) > sizes.get(name, 0):
                os.truncate(path, sizes.get(name, 0))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
