"""Evaluation: KL to SFT is the KL, eta moves along the line, and the weights come back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.rl import models
from warp_fast.rl import WarpConfig
from warp_fast.rl.compare import evaluate_checkpoints
from warp_fast.rl.evaluate import FrontPoint, read_front, sweep, write_front
from warp_fast.rl.policy import Policy, head_weight, load_policy
from warp_fast.rl.rollout import sample
from warp_fast.rl.task import prepare

MakeConfig = Callable[..., WarpConfig]


@pytest.fixture
def moved(make_config: MakeConfig, tmp_path: Path) -> Policy:
    """A policy that is not SFT."""
    policy = load_policy(make_config())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return policy


def test_kl_of_sft_to_itself_is_zero(make_config: MakeConfig) -> None:
    policy = load_policy(make_config())
    found = prepare(make_config(), policy)[1]()
    assert 0 <= found.kl < 1e-6 and found.samples == 16


def test_error_5_kl_agrees_with_the_log_ratio_of_the_same_completions(
    make_config: MakeConfig, moved: Policy
) -> None:
    """Exact KL summed along samples and the plain log-ratio have one expectation."""
    config = make_config(eval_samples=2000, batch_size=500, temperature=0.8)
    task, evaluator = prepare(config, moved)
    found = evaluator()
    rollout = sample(moved, task.prompts * 500, 0.8, config.max_new_tokens, seed=5)
    context = (rollout.tokens, rollout.attention_mask, rollout.mask.shape[1])
    logs = []
    with torch.no_grad():
        for model in (moved.model, evaluator.sft):
            logits = moved.hidden(model, *context) @ head_weight(model).T
            assert moved.softcap is not None
            logits = moved.softcap * torch.tanh(logits / moved.softcap) / 0.8
            picked = logits.log_softmax(-1).gather(-1, rollout.completion_ids[..., None])
            logs.append((picked[..., 0] * rollout.mask).sum(1))
    ratio = logs[0] - logs[1]
    error = 2 * ratio.std() / len(ratio) ** 0.5 + found.kl_ci
    assert abs(found.kl - ratio.mean().item()) < 2 * error


def test_sweep_ends_at_sft_and_at_the_policy_and_restores_it(
    make_config: MakeConfig, moved: Policy
) -> None:
    _, evaluator = prepare(make_config(), moved)
    before = {n: p.detach().clone() for n, p in moved.model.named_parameters()}
    alone = evaluator()
    points = sweep(evaluator, [0.0, 0.5, 1.0], "x")
    assert points[0].kl < 1e-6 < points[1].kl < points[2].kl
    assert points[2].kl == pytest.approx(alone.kl, rel=1e-3)
    for name, parameter in moved.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=1e-6)


def test_equal_weights_give_equal_results(make_config: MakeConfig, moved: Policy) -> None:
    _, evaluator = prepare(make_config(), moved)
    first = evaluator()
    torch.rand(7)
    assert vars(first)["kl"] == evaluator().kl


def test_intervals_cover(make_config: MakeConfig) -> None:
    """About 95 of 100 intervals hold the true mean."""
    from warp_fast.rl.evaluate import _mean_and_ci

    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        mean, half = _mean_and_ci(torch.randn(50, generator=generator).tolist())
        covered += abs(mean) <= half
    assert 0.90 <= covered / 400 <= 0.98


@pytest.mark.parametrize("other", ["vocabulary", "architecture", "untied", "nothing"])
def test_refuses_a_checkpoint_of_another_model_before_any_is_evaluated(
    make_config: MakeConfig,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    other: str,
) -> None:
    directory = tmp_path / other
    if other == "architecture":
        models.save(directory, "gemma")
    elif other == "nothing":
        directory.mkdir()
    else:
        shutil.copytree(checkpoint, directory)
        settings = json.loads((directory / "config.json").read_text())
        settings |= {"vocab_size": 99} if other == "vocabulary" else {"tie_word_embeddings": False}
        (directory / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("warp_fast.rl.compare.sweep", None)
    with pytest.raises(ValueError, match=f"policy .*{other} must (have the arch|be a causal LM)"):
        evaluate_checkpoints(make_config(), [checkpoint, directory], progress=False)


def test_front_file_round_trip(tmp_path: Path) -> None:
    point = FrontPoint(1.0, 0.1, float("nan"), float("nan"), 2.5, 0.2, 7.0, 16, "a", 0.3)
    write_front(tmp_path / "front.csv", [point, point])
    assert [repr(p) for p in read_front(tmp_path / "front.csv")] == [repr(point)] * 2


def test_models_reward_is_not_constant(make_config: MakeConfig) -> None:
    policy = load_policy(make_config())
    task, _ = prepare(make_config(), policy)
    rollout = sample(policy, task.prompts * 8, 1.0, 8, seed=0)
    values = models.early_words([p.text for p in rollout.prompts], rollout.completions)
    assert len(set(values)) > 1
