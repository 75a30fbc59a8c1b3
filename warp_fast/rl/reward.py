"""Rewards: a Python function or a sequence-classification model, checked before they are used."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from warp_fast.rl.files import append_json_lines
from warp_fast.rl.prompts import Prompt

Reward = Callable[..., Sequence[float]]


class RewardError(ValueError):
    """A reward raised, or returned what is not one finite number per completion."""


def load_reward(spec: str, device: torch.device) -> Reward:
    """Find a reward: "module:function", "file.py:function", or a classifier directory or hub id.

    Raises:
        ValueError: there is no such module, function or model; says what was looked for.
    """
    if ":" in spec and not Path(spec).is_dir():
        return _load_function(spec)
    return _load_classifier(spec, device)


def _load_function(spec: str) -> Reward:
    place, _, name = spec.rpartition(":")
    try:
        if place.endswith(".py"):
            found = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert found is not None and found.loader is not None
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
        else:
            if "" not in sys.path:  # a module beside the config, as under `python -m`
                sys.path.insert(0, "")
            module = importlib.import_module(place)
        function: Reward = getattr(module, name)
    except (ImportError, OSError, AttributeError) as error:
        raise ValueError(
            f"reward must be an importable 'module:function' or 'file.py:function'; "
            f"{spec!r} is not: {error}"
        ) from error
    return function


def _load_classifier(spec: str, device: torch.device) -> Reward:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(spec)
        model = AutoModelForSequenceClassification.from_pretrained(spec).to(device).eval()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"reward must be 'module:function' or a sequence-classification model; {spec!r} could "
            f"not be loaded: {error}"
        ) from error
    if model.config.num_labels != 1:
        raise ValueError(
            f"a reward model must have one label; {spec} has {model.config.num_labels}"
        )

    @torch.no_grad()
    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        texts = [p + c for p, c in zip(prompts, completions, strict=True)]
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        values: list[float] = model(**batch).logits[:, 0].float().tolist()
        return values

    return reward


def score(
    reward: Reward, prompts: list[Prompt], completions: list[str], failures: Path
) -> list[float]:
    """Call the reward on a batch and check its answer.

    Raises:
        RewardError: it raised, gave a wrong number of values, or one that is not a finite number;
            the offending samples are saved to `failures` first.
    """
    samples = [
        {"prompt": p.text, "completion": c, **p.columns}
        for p, c in zip(prompts, completions, strict=True)
    ]
    keys = {key for p in prompts for key in p.columns}
    columns = {key: [p.columns.get(key) for p in prompts] for key in sorted(keys)}
    try:
        values = reward(prompts=[p.text for p in prompts], completions=completions, **columns)
        rewards = [float(value) for value in values]
    except Exception as error:
        append_json_lines(failures, samples)
        raise RewardError(
            f"the reward raised {type(error).__name__}: {error}; its batch is in {failures}"
        ) from error
    if len(rewards) != len(completions):
        append_json_lines(failures, samples)
        raise RewardError(
            f"the reward must return one number per completion ({len(completions)}); got "
            f"{len(rewards)}; its batch is in {failures}"
        )
    bad = [i for i, value in enumerate(rewards) if not math.isfinite(value)]
    if bad:
        append_json_lines(failures, [{**samples[i], "reward": str(rewards[i])} for i in bad])
        raise RewardError(
            f"rewards must be finite; {len(bad)} of {len(rewards)} are not, the first is "
            f"{rewards[bad[0]]} for {completions[bad[0]][:80]!r}; they are in {failures}"
        )
    return rewards


def advantages(
    rewards: Tensor, group: int, baseline: Literal["leave_one_out", "batch_mean", "none"]
) -> Tensor:
    """Rewards less their baseline; [B] with the `group` samples of a prompt next to each other.

    leave_one_out: the mean of the other samples of the same prompt (unbiased); batch_mean: the mean
    of the batch.
    """
    if baseline == "none":
        return rewards
    if baseline == "batch_mean":
        return rewards - rewards.mean()
    grouped = rewards.view(-1, group)
    others = (grouped.sum(1, keepdim=True) - grouped) / (group - 1)
    return (grouped - others).flatten()
