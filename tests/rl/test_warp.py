"""The whole of Algorithm 1: restarts, merges, fronts, and what is refused before it begins."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rl import models
from warp_fast import slerp
from warp_fast.rl import WarpConfig, warp
from warp_fast.rl.policy import load_model

MakeConfig = Callable[..., WarpConfig]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, prompts: Path
) -> tuple[WarpConfig, Path]:
    config = WarpConfig(
        policy=str(checkpoint),
        prompts=str(prompts),
        reward="tests.rl.models:early_words",
        held_out_reward="tests.rl.models:early_words",
        output=str(tmp_path_factory.mktemp("warp") / "out"),
        iterations=2,
        runs=3,
        steps=3,
        eta=0.5,
        ema_rate=0.1,
        sweep=[0.0, 0.5, 1.0],
        learning_rate=1e-2,
        warmup_steps=1,
        batch_size=8,
        max_new_tokens=8,
        eval_samples=16,
        eval_every=2,
    )
    return config, warp(config, progress=False)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in load_model(str(directory), "eager").named_parameters()}


def blocks(names: Any) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        key = ".".join(parts[: parts.index("layers") + 2]) if "layers" in parts else name
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def test_errors_12_13_merge_is_slerp_of_all_runs_from_their_start(
    finished: tuple[WarpConfig, Path],
) -> None:
    _, output = finished
    init = weights(output / "sft")
    runs = [weights(output / "iteration-1" / f"run-{m}" / "policy") for m in (1, 2, 3)]
    groups = blocks(init)
    for eta, name in ((1.0, "eta-1"), (0.5, "eta-0.5")):
        expected = slerp(init, runs, segments=groups, eta=eta)
        merged = weights(output / "iteration-1" / "merged" / name)
        for key in expected:
            torch.testing.assert_close(merged[key], expected[key], rtol=0, atol=1e-6)


def test_second_iteration_merges_around_its_own_start(finished: tuple[WarpConfig, Path]) -> None:
    _, output = finished
    init = weights(output / "iteration-1" / "merged" / "eta-0.5")
    runs = [weights(output / "iteration-2" / f"run-{m}" / "policy") for m in (1, 2, 3)]
    expected = slerp(init, runs, segments=blocks(init))
    merged = weights(output / "iteration-2" / "merged" / "eta-1")
    for key in expected:
        torch.testing.assert_close(merged[key], expected[key], rtol=0, atol=1e-6)


def test_error_3_every_run_starts_from_the_same_weights(finished: tuple[WarpConfig, Path]) -> None:
    """The anchor equals the policy at the first step of every run, so their KL is zero."""
    _, output = finished
    rows = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    firsts = [row for row in rows if row["step"] == 1]
    assert len(firsts) == 6 and len(rows) == 18
    assert all(abs(row["kl_to_anchor"]) < 1e-4 for row in firsts)
    assert len({row["reward"] for row in firsts[:3]}) > 1


def test_front_starts_at_sft_and_has_every_eta(finished: tuple[WarpConfig, Path]) -> None:
    _, output = finished
    rows = list(csv.DictReader((output / "front.csv").open()))
    assert [(row["policy"], float(row["eta"])) for row in rows] == [
        (f"WARP iteration {i}", eta) for i in (1, 2) for eta in (0.0, 0.5, 1.0)
    ]
    for row in rows:
        assert float(row["kl"]) >= 0 and float(row["kl_ci"]) >= 0
        assert row["reward"] == row["held_out"] and int(row["samples"]) == 16
    assert float(rows[0]["kl"]) < 1e-6 < float(rows[1]["kl"])


def test_final_policy_is_a_hugging_face_directory(finished: tuple[WarpConfig, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, output = finished
    model: Any = AutoModelForCausalLM.from_pretrained(output / "policy")
    tokenizer = AutoTokenizer.from_pretrained(output / "policy")
    text = tokenizer("review of the cafe :", return_tensors="pt")
    tokens = model.generate(text["input_ids"], do_sample=False, max_new_tokens=4)
    assert tokens.shape[1] > text["input_ids"].shape[1]
    assert model.generation_config.top_k == 3  # the checkpoint's own, not that of the rollouts
    assert model.lm_head.weight is model.model.embed_tokens.weight
    final, merged = weights(output / "policy"), weights(output / "iteration-2/merged/eta-1")
    for name in final:
        torch.testing.assert_close(final[name], merged[name], rtol=0, atol=1e-6)


def test_pictures_and_report_are_there(finished: tuple[WarpConfig, Path]) -> None:
    _, output = finished
    for name in ("front.png", "angles.png"):
        assert (output / name).read_bytes()[:4] == b"\x89PNG"
    report = (output / "report.md").read_text()
    assert "| WARP iteration 2 | 1 |" in report and "front.png" in report
    assert not list(output.rglob("*.partial*")) and not list(output.rglob("state.pt"))


def test_evaluation_during_training_is_logged(finished: tuple[WarpConfig, Path]) -> None:
    _, output = finished
    rows = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if "eval_kl" in row] == [2] * 6


def test_refuses_an_output_of_another_config(finished: tuple[WarpConfig, Path]) -> None:
    config, _ = finished
    changed: dict[str, Any] = {**config.to_dict(), "beta": 0.7}
    with pytest.raises(ValueError, match=r"another config \(beta: 0.1 there, 0.7 now\)"):
        warp(WarpConfig(**changed), progress=False)


def test_goes_on_with_smaller_micro_batches(finished: tuple[WarpConfig, Path]) -> None:
    """As after a run out of memory."""
    config, output = finished
    smaller: dict[str, Any] = {**config.to_dict(), "micro_batch_size": 2, "save_every": 1}
    before = (output / "front.csv").read_bytes()
    assert warp(WarpConfig(**smaller), progress=False) == output
    assert (output / "front.csv").read_bytes() == before


def test_refuses_an_output_with_other_things(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"it holds thesis\.tex"):
        warp(make_config(), progress=False)
    assert os.listdir(tmp_path / "out") == [".lock", "thesis.tex"] or set(
        os.listdir(tmp_path / "out")
    ) == {".lock", "thesis.tex"}


@pytest.mark.parametrize("text", ["", "- a\n", "a: [\n"])
def test_refuses_an_output_whose_config_is_none(
    make_config: MakeConfig, tmp_path: Path, text: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml must hold the options of a run"):
        warp(make_config(), progress=False)


def test_refuses_two_processes_in_one_output(make_config: MakeConfig, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="written by another process"):
            warp(make_config(), progress=False)


def test_refuses_a_tokenizer_without_pad_token(
    make_config: MakeConfig, checkpoint: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "unpadded"
    shutil.copytree(checkpoint, directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="must have a pad token"):
        warp(make_config(policy=str(directory)), progress=False)


def test_refuses_weights_in_fp64(make_config: MakeConfig, checkpoint: Path, tmp_path: Path) -> None:
    """The final policy could not be saved in their dtype."""
    directory = tmp_path / "fp64"
    shutil.copytree(checkpoint, directory)
    load_model(str(checkpoint), "eager").double().save_pretrained(directory)
    with pytest.raises(ValueError, match=r"must be in float32, .* is in torch\.float64"):
        warp(make_config(policy=str(directory)), progress=False)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_refuses_a_corrupt_checkpoint(
    make_config: MakeConfig, checkpoint: Path, tmp_path: Path, damage: str
) -> None:
    directory = tmp_path / "corrupt"
    shutil.copytree(checkpoint, directory)
    file = directory / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        file.unlink()
    with pytest.raises(ValueError, match="corrupt"):
        warp(make_config(policy=str(directory)), progress=False)


@pytest.mark.parametrize("saved", ["prefixed", "headless"])
def test_refuses_weights_that_the_checkpoint_lacks(
    checkpoint: Path, tmp_path: Path, saved: str
) -> None:
    """They would be drawn at random."""
    from safetensors.torch import load_file, save_file

    directory = tmp_path / saved
    shutil.copytree(checkpoint, directory)
    held = load_file(directory / "model.safetensors")
    if saved == "prefixed":
        held = {f"module.{name}": weight for name, weight in held.items()}
        message = r"lacks .*embed_tokens.*, has unknown module\.model"
    else:
        settings = json.loads((directory / "config.json").read_text())
        settings["tie_word_embeddings"] = False
        (directory / "config.json").write_text(json.dumps(settings))
        message = r"every weight of Gemma2ForCausalLM; it lacks lm_head\.weight"
    save_file(held, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_model(str(directory), "eager")


def test_refuses_an_unknown_policy(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="Hugging Face directory or hub id"):
        warp(make_config(policy="no/such/model/dir"), progress=False)


def test_refuses_sdpa_where_the_model_caps_attention(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="attn_logit_softcapping"):
        warp(make_config(attention="sdpa"), progress=False)


def test_full_disk_stops_with_one_message_and_can_go_on(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    config = make_config(iterations=1, runs=1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            warp(config, progress=False)
    assert not list((tmp_path / "out").rglob("*.partial*"))
    warp(config, progress=False)
    assert (tmp_path / "out" / "front.csv").exists()


def test_reward_failure_saves_its_batch(make_config: MakeConfig, tmp_path: Path) -> None:
    from warp_fast.rl.reward import RewardError

    (tmp_path / "bad.py").write_text("def f(prompts, completions): return [float('nan')] * 8\n")
    with pytest.raises(RewardError, match="must be finite"):
        warp(make_config(reward=f"{tmp_path}/bad.py:f"), progress=False)
    saved = list((tmp_path / "out").rglob("reward-failures.jsonl"))
    assert len(saved) == 1 and len(saved[0].read_text().splitlines()) == 8


@pytest.mark.parametrize("family", models.FAMILIES)
def test_families(make_config: MakeConfig, tmp_path: Path, family: str) -> None:
    directory = models.save(tmp_path / family, family)
    config = make_config(policy=str(directory), iterations=1, steps=2)
    output = warp(config, progress=False)
    assert (output / "policy" / "model.safetensors").exists()
