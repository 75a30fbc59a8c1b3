"""The command line, run as a user would: what it does, and one clear message where it cannot."""

from __future__ import annotations

import csv
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.rl import models
from warp_fast.cli import main
from warp_fast.rl import WarpConfig

MakeConfig = Callable[..., WarpConfig]
Failed = Callable[..., str]


@pytest.fixture
def failed(capsys: pytest.CaptureFixture[str]) -> Failed:
    """Run a command that must fail with one message; returns the message."""

    def run(*arguments: object, status: int = 1) -> str:
        assert main([str(a) for a in arguments]) == status
        error = capsys.readouterr().err
        assert error.count("warp-fast: error:") == 1 and "Traceback" not in error
        return error

    return run


@pytest.fixture
def config_file(make_config: MakeConfig, tmp_path: Path) -> Path:
    file = tmp_path / "warp.yaml"
    file.write_text(yaml.safe_dump(make_config(iterations=1, steps=2).to_dict()))
    return file


@pytest.mark.parametrize("family", models.FAMILIES)
def test_train_merge_and_eval_a_checkpoint(
    config_file: Path, tmp_path: Path, family: str, prompts: Path
) -> None:
    """A checkpoint directory of each Gemma goes through every command, as a hub one would."""
    sft = models.save(tmp_path / family, family)
    out = tmp_path / "out"
    assert main(["train", "--config", str(config_file), "--policy", str(sft)]) == 0
    runs = [str(out / "iteration-1" / f"run-{m}" / "policy") for m in (1, 2)]
    merged = tmp_path / "merged"
    arguments = ["--init", str(out / "sft"), "--policy", *runs, "--eta", "0.5", "1.0"]
    assert main(["merge", *arguments, "--output", str(merged)]) == 0
    evaluated = tmp_path / "evaluated"
    arguments = ["--sft", str(sft), "--policy", str(merged / "eta-1"), "--eta", "0", "1"]
    arguments += ["--prompts", str(prompts), "--reward", "tests.rl.models:early_words"]
    arguments += ["--output", str(evaluated), "--samples", "8", "--max_new_tokens", "8"]
    assert main(["eval", *arguments]) == 0
    rows = list(csv.DictReader((evaluated / "front.csv").open()))
    assert [float(row["eta"]) for row in rows] == [0.0, 1.0]
    assert float(rows[0]["kl"]) < 1e-6 < float(rows[1]["kl"])
    assert (evaluated / "front.png").exists()


def test_merging_one_policy_twice_is_that_policy(tmp_path: Path, checkpoint: Path) -> None:
    from safetensors.torch import load_file

    other = models.save(tmp_path / "other", "gemma2", seed=1)
    output = tmp_path / "merged"
    arguments = ["--init", str(checkpoint), "--policy", str(other), "--output", str(output)]
    assert main(["merge", *arguments]) == 0
    ours, theirs = load_file(output / "model.safetensors"), load_file(other / "model.safetensors")
    assert all((ours[name] - theirs[name]).abs().max() < 1e-6 for name in theirs)


def test_merge_does_without_transformers(
    failed: Failed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = importlib.util.find_spec

    def without(name: str) -> object:
        return None if name in ("transformers", "safetensors") else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert "needs transformers, safetensors" in failed("train")
    assert "give --init" in failed("merge", "--output", tmp_path / "out")


def test_merge_reads_a_mergekit_file(tmp_path: Path, checkpoint: Path) -> None:
    from safetensors.torch import load_file

    other = models.save(tmp_path / "other", "gemma2", seed=1)
    third = models.save(tmp_path / "third", "gemma2", seed=2)
    listed = [{"model": str(path)} for path in (other, third)]
    file = tmp_path / "merge.yaml"
    settings = {"merge_method": "nuslerp", "base_model": str(checkpoint), "models": listed}
    file.write_text(yaml.safe_dump(settings))
    assert main(["merge", "--mergekit", str(file), "--output", str(tmp_path / "a")]) == 0
    arguments = ["--init", str(checkpoint), "--policy", str(other), str(third)]
    arguments += ["--granularity", "tensor", "--output", str(tmp_path / "b")]
    assert main(["merge", *arguments]) == 0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)


def test_merge_refuses_what_a_mergekit_file_decides(failed: Failed, tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text("merge_method: linear\nmodels: [{model: a}, {model: b}]\n")
    asked = ["merge", "--mergekit", file, "--output", tmp_path / "out"]
    assert "--mergekit decides init, eta" in failed(*asked, "--init", "a", "--eta", "0.5")
    defaults = ["--eta", "1.0", "--granularity", "block", "--method", "slerp"]
    assert "--mergekit decides eta, method, granularity;" in failed(*asked, *defaults)
    settings = tmp_path / "settings.yaml"
    settings.write_text("method: lerp\ndtype: null\n")
    assert "--mergekit decides method;" in failed(*asked, "--config", settings)
    assert "give --init and at least one --policy" in failed("merge", "--output", tmp_path / "out")
    file.write_text("merge_method: ties\nmodels: [{model: a}, {model: b}]\n")
    assert "merge_method must be linear or nuslerp; got 'ties'" in failed(*asked)


def test_a_printed_config_stands_beside_a_mergekit_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It spells out the defaults, which nobody chose."""
    words = ["merge", "--mergekit", str(tmp_path / "mk.yaml"), "--output", str(tmp_path / "o")]
    with pytest.raises(SystemExit):
        main([*words, "--print_config"])
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    main(["merge", "--config", str(tmp_path / "c.yaml")])
    assert "decides" not in capsys.readouterr().err  # there is no mk.yaml
    main(["merge", "--config", str(tmp_path / "c.yaml"), "--eta", "1.0"])
    assert "--mergekit decides eta" in " ".join(capsys.readouterr().err.split())


def test_command_line_overrides_the_file(config_file: Path, tmp_path: Path) -> None:
    arguments = ["--beta", "0.25", "--sweep", "0", "1", "--steps=1"]
    assert main(["train", "--config", str(config_file), *arguments]) == 0
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (written["beta"], written["sweep"], written["steps"]) == (0.25, [0.0, 1.0], 1)


def test_unknown_key_names_the_nearest(failed: Failed, config_file: Path) -> None:
    settings = yaml.safe_load(config_file.read_text())
    config_file.write_text(yaml.safe_dump({**settings, "ema_rat": 0.1}))
    assert "did you mean ema_rate?" in failed("train", "--config", config_file, status=2)


def test_unknown_option_names_the_nearest(failed: Failed, config_file: Path) -> None:
    message = failed("train", "--config", config_file, "--learning_rat", 1, status=2)
    assert "did you mean --learning_rate?" in message


def test_an_option_without_its_value_is_not_unknown(failed: Failed, config_file: Path) -> None:
    message = failed("train", "--config", config_file, "--beta", status=2)
    assert "--beta" in message and "did you mean" not in message


def test_unknown_command_names_the_nearest(failed: Failed) -> None:
    assert "did you mean train?" in failed("trian", status=2)


def test_missing_required_option_is_named(failed: Failed) -> None:
    assert "policy" in failed("train", status=2)


def test_wrong_type_is_named(failed: Failed, config_file: Path) -> None:
    assert "beta" in failed("train", "--config", config_file, "--beta", "strong", status=2)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("runs", 0, "runs must be positive; got 0"),
        ("iterations", 0, "iterations must be positive"),
        ("eta", 1.5, r"eta must be in [0, 1]; got 1.5"),
        ("eta", -0.1, r"eta must be in [0, 1]"),
        ("ema_rate", 2, r"ema_rate must be in [0, 1]"),
        ("beta", -1, "beta must be finite and >= 0"),
        ("temperature", 0, "temperature must be positive"),
        ("batch_size", 7, "batch_size must be a multiple of samples_per_prompt (2); got 7"),
        ("samples_per_prompt", 1, "at least 2 for the leave_one_out baseline"),
        ("steps", "[1, 2, 3]", "one for each of the 1 iterations"),
        ("policy", "no/such/dir", "Hugging Face directory or hub id"),
        ("prompts", "no-such.txt", "there is none at no-such.txt"),
        ("reward", "no_such:reward", "reward must be"),
        ("max_new_tokens", 64, "room in the model's context of 48"),
        ("device", "gpu", "device must be auto, cpu or cuda (cuda:1, ...); got 'gpu'"),
        ("device", "cuda:77", "device is 'cuda:77', but torch sees"),
    ],
)
def test_bad_values(
    failed: Failed, config_file: Path, field: str, value: Any, message: str
) -> None:
    status = 1
    assert message in failed("train", "--config", config_file, f"--{field}={value}", status=status)
    assert not (config_file.parent / "out" / "config.yaml").exists()


def test_long_prompt_names_its_line(failed: Failed, config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("good\n" + "the room was good and " * 20)
    message = failed("train", "--config", config_file, "--prompts", tmp_path / "long.txt")
    assert "long.txt, line 2" in message and "1 to 40 tokens" in message


def test_raising_reward(failed: Failed, config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def f(prompts, completions): return 1 / 0\n")
    message = failed("train", "--config", config_file, "--reward", f"{tmp_path}/bad.py:f")
    assert "raised ZeroDivisionError" in message and "reward-failures.jsonl" in message
    assert "bad.py, line 1, in f" in " ".join(message.split())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--eta", "3", "eta must be in [0, 2]"),
        ("--samples", "0", "samples must be positive"),
        ("--policy", "nowhere", "there is none at ['nowhere']"),
        ("--policy", "", "give at least one policy"),
        ("--output", "a-file", "a-file"),
        ("--output", "run", "must not be a training run, whose front.csv would be lost"),
    ],
)
def test_eval_refuses_before_it_loads_anything(
    failed: Failed,
    checkpoint: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    (tmp_path / "run" / "sft").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    monkeypatch.setattr("warp_fast.rl.compare.load_policy", None)
    given: dict[str, Any] = {"--sft": checkpoint, "--policy": checkpoint, "--prompts": prompts}
    given |= {"--reward": "tests.rl.models:early_words", "--output": "out", option: value}
    words = [word for pair in given.items() for word in pair if word != ""]
    assert message in " ".join(failed("eval", *words).split())


@pytest.mark.parametrize("eta", ["-0.5", "7"])
def test_merge_refuses_eta(failed: Failed, checkpoint: Path, tmp_path: Path, eta: str) -> None:
    output = tmp_path / "merged"
    arguments = ["--init", checkpoint, "--policy", checkpoint, "--output", output, f"--eta={eta}"]
    assert "eta" in failed("merge", *arguments)
    assert not output.exists()


def test_merge_refuses_a_missing_policy(failed: Failed, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--init", checkpoint, "--policy", "nowhere", "--output", tmp_path / "m"]
    assert "nowhere" in failed("merge", *arguments)


@pytest.mark.parametrize(
    ("command", "name", "advice"),
    [("merge", "merge.merge_checkpoints", "to begin from zero"), ("train", "rl.warp", "to go on")],
)
def test_interrupted_command_says_what_the_next_one_does(
    failed: Failed, config_file: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str,
    advice: str,
) -> None:  # fmt: skip
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    module, _, function = name.partition(".")
    monkeypatch.setattr(importlib.import_module(f"warp_fast.{module}"), function, interrupted)
    options = {"merge": ["--init", "a", "--policy", "b", "--output", "o"]}
    given = options.get(command, ["--config", config_file])
    assert f"start the same command again {advice}" in failed(command, *given, status=130)


def test_lists_are_not_appended_to_their_default(
    failed: Failed, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    assert "--eta+" not in capsys.readouterr().out
    given = ["--init", "a", "--policy", "b", "--output", "o", "--eta+", "0.5"]
    assert "did you mean --eta?" in failed("merge", *given, status=2)


def test_print_config_has_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "--output", "o", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["eta"] == [1.0]


def test_help_lists_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for name in WarpConfig.__dataclass_fields__:
        assert f"--{name}" in shown


@pytest.mark.parametrize("spelling", [["--dry-run"], ["--dry_run"], ["--dry_run", "true"]])
def test_a_flag_alone_is_true(
    tmp_path: Path, spelling: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    start = models.save(tmp_path / "sft", models.FAMILIES[0])
    arguments = ["--init", str(start), "--policy", str(start), *spelling]
    assert main(["merge", *arguments, "--output", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out").exists()
    assert main(["merge", "--output", str(tmp_path / "out"), *arguments]) == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["100", "true", "x: y", "r #1", "a,b"])
def test_words_of_a_list_stay_words(failed: Failed, tmp_path: Path, name: str) -> None:
    start = models.save(tmp_path / "sft", models.FAMILIES[0])
    message = failed("merge", "--init", start, "--policy", start, name, "--output", tmp_path / "o")
    assert f"policy 2: {name} is not a directory" in message


def test_a_directory_with_brackets_is_a_word(
    failed: Failed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[odd]").mkdir()
    start = models.save(tmp_path / "sft", models.FAMILIES[0])
    message = failed("merge", "--init", start, "--policy", "[odd]", "--output", "out")
    assert "policy 1: [odd] holds neither" in message
    message = failed("merge", "--init", start, "--policy", "[a, b]", "--output", "out")
    assert "policy 1: a is not a directory" in message
