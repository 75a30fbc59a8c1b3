"""Rewards: where they come from, what they may return, and their baselines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rl import models
from warp_fast.demo.sft import build_tokenizer
from warp_fast.rl.prompts import Prompt
from warp_fast.rl.reward import RewardError, advantages, load_reward, score

PROMPTS = [Prompt("a", [1], {"answer": 1}), Prompt("b", [2], {"answer": 2})]
CPU = torch.device("cpu")


def test_loads_a_function_by_module_and_by_file(tmp_path: Path) -> None:
    assert load_reward("tests.rl.models:early_words", CPU)(["x"], ["good poor"]) == [0.5]
    assert load_reward("tests.rl.models.early_words", CPU)(["x"], ["good poor"]) == [0.5]
    file = tmp_path / "mine.py"
    file.write_text("def length(prompts, completions):\n    return [len(c) for c in completions]\n")
    assert load_reward(f"{file}:length", CPU)(["x"], ["abc"]) == [3]


@pytest.mark.parametrize(
    "spec", ["no_such_module:f", "math:no_such", "math.no_such", "gone.py:f", "no/such/model"]
)
def test_refuses_what_is_not_there(spec: str) -> None:
    with pytest.raises(ValueError, match="reward must be"):
        load_reward(spec, CPU)


def test_a_file_is_a_module_like_any_other(tmp_path: Path) -> None:
    """It may hold dataclasses and import its neighbours, and two rewards run it once."""
    (tmp_path / "neighbour_of_mine.py").write_text("VALUE = 4.0\n")
    file = tmp_path / "json.py"  # and hides no module of that name
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from neighbour_of_mine import VALUE\n@dataclass\nclass Held:\n    x: float = VALUE\n"
        "held = Held()\ndef one(**_):\n    return held\ndef two(**_):\n    return held\n"
    )
    one, two = (load_reward(f"{file}:{name}", CPU) for name in ("one", "two"))
    held: Any = one()
    assert held.x == 4.0 and two() is held and json.loads("1") == 1
    file.write_text("def one(:\n")
    other = file.rename(tmp_path / "other.py")
    with pytest.raises(ValueError, match="is not: SyntaxError"):
        load_reward(f"{other}:one", CPU)


def reward_model(directory: Path) -> Any:
    from transformers import Gemma2Config, Gemma2ForSequenceClassification

    tokenizer = build_tokenizer()
    sizes: dict[str, Any] = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_labels=1,
    )
    config = Gemma2Config(vocab_size=len(tokenizer), pad_token_id=0, **sizes)
    model: Any = Gemma2ForSequenceClassification
    model(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return tokenizer


def test_reward_model_scores_prompt_and_completion(tmp_path: Path) -> None:
    reward_model(tmp_path)
    reward = load_reward(str(tmp_path), CPU)
    values = reward(prompts=["the room ", "the "], completions=["was good", "room was good"])
    assert len(values) == 2 and values[0] == pytest.approx(values[1], abs=1e-5)
    assert reward(prompts=["the room "], completions=["was bad"]) != values[:1]
    # a chat template has written what the tokenizer adds
    chat = reward(prompts=["<bos>the room "], completions=["was good"])
    assert chat == pytest.approx(values[:1], abs=1e-6)


def test_reward_model_without_its_head_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    reward_model(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    del held["score.weight"]
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"reward model .* lacks score\.weight"):
        load_reward(str(tmp_path), CPU)


def test_reward_model_sees_the_end_of_what_is_too_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = reward_model(tmp_path)
    tokenizer.model_max_length = 8
    tokenizer.save_pretrained(tmp_path)
    reward = load_reward(str(tmp_path), CPU)
    prompts, ends = ["the room was good and " * 3] * 20, ["bad", "good"] * 10
    values = reward(prompts=prompts, completions=ends)
    assert len(values) == 20 and values[0] != pytest.approx(values[1], abs=1e-7)
    assert values == pytest.approx(list(values[:2]) * 10, abs=1e-6)
    assert "takes 8 tokens" in caplog.text


def test_columns_of_the_prompts_reach_the_reward(tmp_path: Path) -> None:
    def reward(prompts: list[str], completions: list[str], answer: list[int]) -> list[float]:
        return [float(a) for a in answer]

    assert score(reward, PROMPTS, ["x", "y"], tmp_path / "f") == [1.0, 2.0]


@pytest.mark.parametrize(
    ("returned", "message", "saved"),
    [
        ([1.0, math.nan], "must be finite in float32; 1 of 2", 1),
        ([math.inf, math.inf], "must be finite in float32; 2 of 2", 2),
        ([1e300, 0.0], "1 of 2 are not, the first is 1e\\+300", 1),
        ([1.0], r"one number per completion \(2\); got 1", 2),
        (None, r"one number per completion \(2\); got None: ", 2),
        (0.5, r"one number per completion \(2\); got 0\.5: ", 2),
        ([[1.0], [2.0]], r"one number per completion \(2\); got \[\[1\.0\], \[2\.0\]\]: ", 2),
        (["a", "b"], r"got \['a', 'b'\]: ValueError: could not convert string to float", 2),
    ],
)
def test_bad_rewards_stop_and_save_their_samples(
    tmp_path: Path, returned: Any, message: str, saved: int
) -> None:
    failures = tmp_path / "not" / "there" / "failures.jsonl"
    with pytest.raises(RewardError, match=message):
        score(lambda **_: returned, PROMPTS, ["x", "y"], failures)
    rows = [json.loads(line) for line in failures.open()]
    assert len(rows) == saved and {"prompt", "completion", "answer"} <= rows[0].keys()


def test_the_sampled_text_is_saved_beside_a_column_of_its_name(tmp_path: Path) -> None:
    prompts = [Prompt("a", [1], {"completion": "the reference", "prompt": "another"})]
    with pytest.raises(RewardError):
        score(lambda **_: [math.nan], prompts, ["x"], tmp_path / "f")
    saved = json.loads((tmp_path / "f").read_text())
    assert saved == {"prompt": "a", "completion": "x", "reward": "nan"}


def test_baselines() -> None:
    rewards = torch.tensor([1.0, 3.0, 10.0, 20.0])
    assert advantages(rewards, 2, "leave_one_out").tolist() == [-2, 2, -10, 10]
    assert advantages(rewards, 2, "batch_mean").tolist() == [-7.5, -5.5, 1.5, 11.5]
    assert advantages(rewards, 1, "none").tolist() == rewards.tolist()


def test_reward_module_is_importable_from_here() -> None:
    assert models.early_words(["x"], [""]) == [0.0]
