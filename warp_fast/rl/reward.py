"""Rewards: a Python function or a sequence-classification model, checked before they are used."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from warp_fast.rl.files import append_json_lines
from warp_fast.rl.policy import check_loaded
from warp_fast.rl.prompts import Prompt, derive_seed

Reward = Callable[..., Sequence[float]]
_SCORED = 16  # texts that a classifier sees at a time
logger = logging.getLogger("warp_fast")


class RewardError(ValueError):
    """A reward raised, or returned what is not one finite number per completion."""


def load_reward(spec: str, device: torch.device) -> Reward:
    """Find a reward: "module:function" (or "module.function"), "file.py:function", or a classifier.

    A classifier is a directory or a hub id.

    Raises:
        ValueError: there is no such module, function or model; says what was looked for.
    """
    dotted = "." in spec and all(map(str.isidentifier, spec.split(".")))
    if (dotted or ":" in spec) and not Path(spec).is_dir():
        return _load_function(spec)
    return _load_classifier(spec, device)


def _load_function(spec: str) -> Reward:
    place, _, name = spec.rpartition(":" if ":" in spec else ".")
    try:
        if place.endswith(".py"):
            module = _module_of(Path(place).resolve())
        else:
            if "" not in sys.path:  # a module beside the config, as under `python -m`
                sys.path.insert(0, "")
            module = importlib.import_module(place)
        function: Reward = getattr(module, name)
    except Exception as error:  # whatever the module does while it is imported
        raise ValueError(
            f"reward must be an importable 'module:function' or 'file.py:function'; "
            f"{spec!r} is not: {type(error).__name__}: {error}"
        ) from error
    return function


def _module_of(file: Path) -> ModuleType:
    """The module of a file, which may import its neighbours; run once for all its rewards."""
    # listed, since a dataclass looks its module up; by a name that hides no other module
    name = f"{file.stem}_{derive_seed(str(file))}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None and found.loader is not None
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_classifier(spec: str, device: torch.device) -> Reward:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(spec)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            spec, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"reward must be 'module:function' or a sequence-classification model; {spec!r} could "
            f"not be loaded: {error}"
        ) from error
    if model.config.num_labels != 1:
        raise ValueError(
            f"a reward model must have one label; {spec} has {model.config.num_labels}"
        )
    check_loaded(f"reward model {spec!r}", model, info)
    model = model.to(device).eval()
    tokenizer.truncation_side = "left"  # a completion is judged by its end
    longest = _context_of(model, tokenizer)

    @torch.no_grad()
    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        # the tokenizer adds the special tokens that a chat template has written already
        begin = tokenizer.bos_token or ""
        texts = [p.removeprefix(begin) + c for p, c in zip(prompts, completions, strict=True)]
        values: list[float] = []
        for at in range(0, len(texts), _SCORED):
            some = texts[at : at + _SCORED]
            batch = tokenizer(some, padding=True, return_tensors="pt")
            if (most := batch["input_ids"].shape[1]) > longest:
                message = "%s takes %d tokens; texts of up to %d lose their beginning"
                logger.warning(message, spec, longest, most)
                cut = {"truncation": True, "max_length": longest}
                batch = tokenizer(some, padding=True, return_tensors="pt", **cut)
            values += model(**batch.to(device)).logits[:, 0].float().tolist()
        return values

    return reward


def _context_of(model: Any, tokenizer: Any) -> int:
    """The most tokens that a classifier takes."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(int(tokenizer.model_max_length), int(positions or tokenizer.model_max_length))


def score(
    reward: Reward, prompts: list[Prompt], completions: list[str], failures: Path
) -> list[float]:
    """Call the reward on a batch and check its answer.

    Raises:
        RewardError: it raised, gave a wrong number of values, or one that is not finite in fp32;
            the offending samples are saved to `failures` first.
    """
    samples = [
        {**p.columns, "prompt": p.text, "completion": c}
        for p, c in zip(prompts, completions, strict=True)
    ]
    keys = {key for p in prompts for key in p.columns}
    columns = {key: [p.columns.get(key) for p in prompts] for key in sorted(keys)}
    try:
        values = reward(prompts=[p.text for p in prompts], completions=completions, **columns)
    except Exception as error:
        append_json_lines(failures, samples)
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise RewardError(
            f"the reward raised {type(error).__name__}: {error} ({last.filename}, line "
            f"{last.lineno}, in {last.name}); its batch is in {failures}"
        ) from error
    try:
        rewards = [float(value) for value in values]
    except Exception as error:  # float() of a tensor or of a generator's next raises anything
        append_json_lines(failures, samples)
        got = " ".join(repr(values).split())[:80]
        raise RewardError(
            f"the reward must return one number per completion ({len(completions)}); got "
            f"{got}: {type(error).__name__}: {error}; its batch is in {failures}"
        ) from error
    if len(rewards) != len(completions):
        append_json_lines(failures, samples)
        raise RewardError(
            f"the reward must return one number per completion ({len(completions)}); got "
            f"{len(rewards)}; its batch is in {failures}"
        )
    # as they are trained on: 1e300 is finite in fp64 alone
    single = torch.tensor(rewards, dtype=torch.float32, device="cpu").tolist()
    bad = [i for i, value in enumerate(single) if not math.isfinite(value)]
    if bad:
        append_json_lines(failures, [{**samples[i], "reward": str(rewards[i])} for i in bad])
        raise RewardError(
            f"rewards must be finite in float32; {len(bad)} of {len(rewards)} are not, the first "
            f"is {rewards[bad[0]]} for {completions[bad[0]][:80]!r}; they are in {failures}"
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
