"""One run: what Algorithm 1 says of the anchor, the temperature, the loss and the optimizer.

Numbers in names are those of the errors found in public re-implementations of WARP.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from warp_fast.rl import WarpConfig
from warp_fast.rl.policy import Policy, head_weight, load_policy
from warp_fast.rl.rollout import sample
from warp_fast.rl.run import Run
from warp_fast.rl.task import prepare

MakeConfig = Callable[..., WarpConfig]


def start(config: WarpConfig, tmp_path: Path) -> tuple[Run, Policy]:
    policy = load_policy(config)
    task, _ = prepare(config, policy)
    return Run(config, policy, task, tmp_path / "run", 1, 1), policy


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_errors_1_2_3_4_anchor_follows_each_step(make_config: MakeConfig, tmp_path: Path) -> None:
    run, policy = start(make_config(ema_rate=0.1), tmp_path)
    expected = {n: w.double() for n, w in weights(policy.model).items()}
    for _ in range(3):
        run.train_step()
        now = weights(policy.model)
        expected = {n: 0.9 * e + 0.1 * now[n].double() for n, e in expected.items()}
    for name, average in run.anchor.averaged_state_dict().items():
        if name in expected:
            torch.testing.assert_close(average.double(), expected[name], rtol=0, atol=1e-6)


def test_rate_zero_keeps_a_static_anchor(make_config: MakeConfig, tmp_path: Path) -> None:
    run, policy = start(make_config(ema_rate=0.0), tmp_path)
    before = weights(policy.model)
    run.train_step()
    after = dict(run.anchor.module.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(before["model.norm.weight"], weights(policy.model)["model.norm.weight"])


def test_kl_to_anchor_is_zero_at_the_first_step(make_config: MakeConfig, tmp_path: Path) -> None:
    run, _ = start(make_config(), tmp_path)
    assert abs(run.train_step()["kl_to_anchor"]) < 1e-4
    assert run.train_step()["kl_to_anchor"] != 0.0


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_errors_6_7_scored_distribution_is_the_sampled_one(
    make_config: MakeConfig, temperature: float
) -> None:
    """First tokens drawn many times have the frequencies that the loss scores them with.

    Fails when sampling truncates (the checkpoint asks for top_k 3), or at another temperature.
    """
    policy = load_policy(make_config())
    task, _ = prepare(make_config(), policy)
    rollout = sample(policy, [task.prompts[0]] * 4000, temperature, 1, seed=3)
    with torch.no_grad():
        hidden = policy.hidden(policy.model, rollout.tokens[:1], rollout.attention_mask[:1], 1)
        logits = hidden[0, 0] @ head_weight(policy.model).T
        capped = policy.softcap * torch.tanh(logits / policy.softcap)  # type: ignore[operator]
        expected = (capped / temperature).softmax(-1)
    counts = torch.bincount(rollout.completion_ids[:, 0], minlength=len(expected))
    spread = (4000 * expected * (1 - expected)).sqrt()
    assert ((counts - 4000 * expected).abs() < 5 * spread + 2).all()


def test_error_7_no_dropout_in_the_gradient_pass(make_config: MakeConfig, tmp_path: Path) -> None:
    run, policy = start(make_config(), tmp_path)
    run.train_step()
    assert not policy.model.training and not run.anchor.module.training


def test_micro_batches_give_the_gradient_of_the_batch(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    gradients = []
    for size in (None, 3):
        run, policy = start(make_config(micro_batch_size=size), tmp_path / str(size))
        prompts = [p for p in run.task.prompts for _ in range(2)]
        rollout = sample(policy, prompts, 0.9, 8, seed=0)
        run._accumulate(rollout, torch.linspace(-1, 1, 8))
        gradients.append(
            torch.cat([p.grad.flatten() for p in run.parameters if p.grad is not None])
        )
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_error_16_one_optimizer_per_run(make_config: MakeConfig, tmp_path: Path) -> None:
    run, policy = start(make_config(), tmp_path)
    for _ in range(3):
        run.train_step()
    state = run.optimizer.state[policy.model.model.norm.weight]
    assert state["step"] == 3


def test_reward_rises(make_config: MakeConfig, tmp_path: Path) -> None:
    """Error 8: with the sign of the loss wrong, or rewards not detached, it would not."""
    config = make_config(steps=30, batch_size=32, learning_rate=1e-2, beta=0.01, kl="reward")
    run, _ = start(config, tmp_path)
    rewards = [run.train_step()["reward"] for _ in range(30)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


@pytest.mark.parametrize("kl", ["reward_to_go", "k2", "k3", "reverse", "forward", "none"])
def test_every_kl_trains(make_config: MakeConfig, tmp_path: Path, kl: Any) -> None:
    run, _ = start(make_config(kl=kl), tmp_path)
    metrics = [run.train_step() for _ in range(2)]
    assert all(torch.tensor(m["loss"]).isfinite() for m in metrics)


def test_a_gradient_that_is_not_finite_changes_nothing(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops, and its weights and last checkpoint are those of the step before."""
    run, policy = start(make_config(save_every=1), tmp_path)
    for _ in range(2):
        run.train_step()
    run._save()
    kept, before = (tmp_path / "run" / "state.pt").read_bytes(), weights(policy.model)
    monkeypatch.setattr("warp_fast.rl.run.advantages", lambda r, *_: torch.full_like(r, torch.inf))
    with pytest.raises(ValueError, match=r"norm is (nan|inf) at step 3 of .*checkpoint is kept"):
        run.train()
    assert (tmp_path / "run" / "state.pt").read_bytes() == kept
    assert all(torch.equal(w, before[n]) for n, w in weights(policy.model).items())


def test_runs_see_prompts_in_different_orders(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    policy = load_policy(config)
    task, _ = prepare(config, policy)
    seen = []
    for number in (1, 2):
        directory = tmp_path / f"run-{number}"
        Run(config, policy, task, directory, 1, number).train_step()
        rows = [json.loads(line) for line in (directory / "samples.jsonl").open()]
        seen.append([(row["prompt"], row["completion"]) for row in rows])
    assert seen[0] != seen[1]


def test_completion_mask_ends_with_the_first_end_token(make_config: MakeConfig) -> None:
    policy = load_policy(make_config())
    task, _ = prepare(make_config(), policy)
    rollout = sample(policy, task.prompts * 16, 1.0, 12, seed=1)
    for tokens, mask in zip(rollout.completion_ids.tolist(), rollout.mask.tolist(), strict=True):
        ends = [i for i, token in enumerate(tokens) if token in policy.eos_ids]
        length = ends[0] + 1 if ends else len(tokens)
        assert mask == [True] * length + [False] * (len(tokens) - length)


def test_left_padding_changes_nothing(make_config: MakeConfig) -> None:
    policy = load_policy(make_config())
    tokens = torch.tensor([[1, 5, 6, 7, 8, 9]])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1)
    mask = (padded != 0).long()
    with torch.no_grad():
        alone = policy.hidden(policy.model, tokens, torch.ones_like(tokens), 3)
        beside = policy.hidden(policy.model, padded, mask, 3)
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-5)
