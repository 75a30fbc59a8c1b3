"""The hyperparameters of a WARP run, under the names of the paper, with the paper's values."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints

from warp_fast.loss import Kl


@dataclass
class WarpConfig:
    """Hyperparameters of Algorithm 1 (arXiv 2406.16768) and of what it runs on.

    Args:
        policy: SFT policy to start from, a Hugging Face directory or hub id of a causal LM.
        prompts: file of prompts, .jsonl with a "prompt" per line (text or chat messages; other
            columns reach the reward) or .txt with one per line.
        reward: what to maximise, "package.module:function" or "file.py:function" with the signature
            f(prompts, completions, **columns) -> list of floats, or a directory or hub id of a
            sequence-classification model.
        output: directory of the run; the same command started again goes on where it stopped
            (micro_batch_size and save_every may change).
        held_out_reward: a second reward that is never trained on, reported beside the first.
        eval_prompts: prompts of the evaluation (default: those of training).
        iterations: I, how often the M runs are merged.
        runs: M, policies trained from each initialisation.
        steps: T, optimizer steps of a run; one number, or one per iteration.
        beta: strength of the KL penalty toward the anchor.
        ema_rate: mu, rate of the EMA anchor; 0 keeps the anchor at the start of the run.
        eta: LITI step: how far the next start lies from this iteration's start toward its merge.
        merge: how the M task vectors are merged.
        granularity: tensors that share one SLERP angle.
        sweep: values of eta evaluated from SFT toward the merge of each iteration; the front.
        final_eta: value of eta at which the final policy is exported.
        kl: KL term of the loss, see warp_fast.warp_loss; "reward" is the paper's.
        baseline: subtracted from the rewards of the batch.
        length_penalty: reward lost per completion token.
        learning_rate: of AdamW, after the warm-up.
        warmup_steps: linear warm-up of the learning rate.
        adam_betas: betas of AdamW.
        weight_decay: decoupled, as in AdamW.
        max_grad_norm: gradients are clipped to this norm.
        batch_size: completions per step.
        samples_per_prompt: completions per prompt, the group of the leave-one-out baseline.
        micro_batch_size: completions per forward and backward pass (default: the batch).
        temperature: of sampling, and of the log-probabilities of policy and anchor alike.
        max_new_tokens: longest completion.
        eval_samples: completions per evaluated policy.
        eval_batch_size: completions sampled at a time in evaluation (default: the batch).
        eval_every: evaluate the policy in training every so many steps; 0 never does.
        save_every: write a checkpoint every so many steps.
        seed: seed of the prompt order and of sampling.
        device: "auto" is cuda where present.
        compute_dtype: of the forward and backward pass; weights and optimizer are float32; "auto"
            is bfloat16 on cuda, float32 on cpu.
        anchor_storage: of the EMA. The default is that of the policy, so that two equal ones have a
            KL of 0; "split" is as exact, but computes with weights rounded to bf16.
        attention: "auto" takes the fastest implementation that honours the model's softcap.
    """

    policy: str
    prompts: str
    reward: str
    output: str
    held_out_reward: str | None = None
    eval_prompts: str | None = None
    iterations: int = 5
    runs: int = 2
    steps: int | list[int] = field(default_factory=lambda: [9000, 7000, 7000, 5000, 5000])
    beta: float = 0.1
    ema_rate: float = 0.01
    eta: float = 0.3
    merge: Literal["slerp", "lerp"] = "slerp"
    granularity: Literal["tensor", "block", "model"] = "block"
    sweep: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
    final_eta: float = 1.0
    kl: Kl = "reward"
    baseline: Literal["leave_one_out", "batch_mean", "none"] = "leave_one_out"
    length_penalty: float = 0.0
    learning_rate: float = 1e-6
    warmup_steps: int = 100
    adam_betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 128
    samples_per_prompt: int = 2
    micro_batch_size: int | None = None
    temperature: float = 0.9
    max_new_tokens: int = 256
    eval_samples: int = 256
    eval_batch_size: int | None = None
    eval_every: int = 0
    save_every: int = 100
    seed: int = 0
    device: str = "auto"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    anchor_storage: Literal["fp32", "split", "bf16"] = "fp32"
    attention: str = "auto"

    def __post_init__(self) -> None:
        for name in _PATHS:
            if (path := getattr(self, name)) is not None:
                _require(isinstance(path, (str, os.PathLike)), name, "be a string", repr(path))
                setattr(self, name, os.fspath(path))
        for name, hint in get_type_hints(WarpConfig).items():
            if get_origin(hint) is Literal:
                options, value = get_args(hint), getattr(self, name)
                _require(value in options, name, f"be one of {', '.join(options)}", repr(value))
        for name in _POSITIVE:
            _require(getattr(self, name) > 0, name, "be positive", getattr(self, name))
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            _require(value >= 0 and math.isfinite(value), name, "be finite and >= 0", value)
        for name in ("ema_rate", "eta"):
            value = getattr(self, name)
            _require(0 <= value <= 1, name, "be in [0, 1]", value)
        alike = self.eta != 1 and f"{self.eta:g}" == "1"  # names of the two merges of an iteration
        _require(not alike, "eta", "be 1 or differ from it in six digits", self.eta)
        for value in [*self.sweep, self.final_eta]:
            _require(0 <= value <= 2, "sweep and final_eta", "be in [0, 2]", value)
        _require(len(self.sweep) > 0, "sweep", "hold at least one eta", self.sweep)
        self._check_batch()
        if isinstance(self.steps, list):
            fits = len(self.steps) == self.iterations and all(t > 0 for t in self.steps)
            rule = f"be one positive number, or one for each of the {self.iterations} iterations"
            _require(fits, "steps", rule, self.steps)
        else:
            _require(self.steps > 0, "steps", "be positive", self.steps)

    def _check_batch(self) -> None:
        group = self.samples_per_prompt
        whole = self.batch_size % group == 0
        rule = f"be a multiple of samples_per_prompt ({group})"
        _require(whole, "batch_size", rule, self.batch_size)
        if self.baseline == "leave_one_out":
            rule = "be at least 2 for the leave_one_out baseline (or set baseline: batch_mean)"
            _require(group >= 2, "samples_per_prompt", rule, group)
        for name in ("micro_batch_size", "eval_batch_size"):
            size = getattr(self, name)
            _require(size is None or size > 0, name, "be positive", size)

    def steps_of(self, iteration: int) -> int:
        """T of an iteration, counted from 1."""
        return self.steps[iteration - 1] if isinstance(self.steps, list) else self.steps

    def to_dict(self) -> dict[str, object]:
        """Plain values, as written to config.yaml."""
        values = dataclasses.asdict(self)
        values["adam_betas"] = list(self.adam_betas)
        return values


# what may be another when a run goes on, since nothing depends on it but rounding
FREE = ("output", "micro_batch_size", "save_every")
_PATHS = ("policy", "prompts", "reward", "output", "held_out_reward", "eval_prompts")
_POSITIVE = (
    "iterations",
    "runs",
    "learning_rate",
    "max_grad_norm",
    "batch_size",
    "samples_per_prompt",
    "temperature",
    "max_new_tokens",
    "eval_samples",
    "save_every",
)
_NOT_NEGATIVE = ("beta", "length_penalty", "warmup_steps", "weight_decay", "eval_every", "seed")


def _require(holds: bool, name: str, rule: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name} must {rule}; got {got}")
