"""mergekit configurations: the same meaning, or a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from warp_fast.merge import merge_checkpoints, read_mergekit


def _read(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "merge.yaml"
    path.write_text(text)
    return read_mergekit(path)


LINEAR = "merge_method: linear\n"
TWO = "models: [{model: a}, {model: b}]\n"


def test_linear_of_equal_weights_is_lerp(tmp_path: Path) -> None:
    expected = {"init": "a", "policies": ["a", "b"], "method": "lerp", "granularity": "block"}
    expected_eta = {"eta": 1.0, "dtype": None}
    assert _read(tmp_path, LINEAR + TWO) == expected | expected_eta
    assert _read(tmp_path, LINEAR + "parameters:\n" + TWO) == expected | expected_eta


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ("dtype: float32\nout_dtype: bfloat16\n", "bfloat16"),
        ("dtype: bfloat16\nout_dtype: null\n", "bfloat16"),
        ("dtype: null\n", None),
    ],
)
def test_dtype_is_that_of_the_output(tmp_path: Path, dtypes: str, expected: str | None) -> None:
    assert _read(tmp_path, LINEAR + TWO + dtypes)["dtype"] == expected


def test_linear_with_the_base_among_the_models_is_liti(tmp_path: Path) -> None:
    text = LINEAR + "base_model: a\nmodels:\n"
    text += "- {model: a, parameters: {weight: 0.7}}\n- {model: b, parameters: {weight: 0.3}}\n"
    found = _read(tmp_path, text)
    assert (found["init"], found["policies"]) == ("a", ["b"])
    assert found["eta"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("normalize", "weight"), [("true", 0.5), ("true", 2), ("false", "0.3333333333333")]
)
def test_linear_with_a_base_that_is_not_listed_gives_it_the_weight_of_all(
    tmp_path: Path, normalize: str, weight: object
) -> None:
    parameters = f"parameters: {{weight: {weight}, normalize: {normalize}}}\n"
    found = _read(tmp_path, LINEAR + TWO + "base_model: base\n" + parameters)
    assert (found["init"], found["policies"]) == ("base", ["a", "b"])
    assert found["eta"] == pytest.approx(2 / 3)


def test_linear_with_a_listed_base_of_no_weight_is_the_mean(tmp_path: Path) -> None:
    text = LINEAR + "base_model: c\n"
    text += "models: [{model: a}, {model: b}, {model: c, parameters: {weight: 0}}]\n"
    found = _read(tmp_path, text)
    assert (found["init"], found["policies"], found["eta"]) == ("c", ["a", "b"], 1.0)


def test_linear_gives_the_weighted_sum(tmp_path: Path, checkpoints: Any) -> None:
    weights = [{"w": torch.randn(7)} for _ in range(3)]
    paths = [checkpoints.save(n, w) for n, w in zip("abc", weights, strict=True)]
    models = "".join(
        f"- {{model: {path}, parameters: {{weight: {weight}}}}}\n"
        for path, weight in zip(paths, (2, 1, 1), strict=True)
    )
    arguments = _read(tmp_path, f"{LINEAR}base_model: {paths[0]}\nmodels:\n{models}")
    merge_checkpoints(**arguments, output=tmp_path / "out", progress=False)
    expected = (2 * weights[0]["w"] + weights[1]["w"] + weights[2]["w"]) / 4
    torch.testing.assert_close(checkpoints.load(tmp_path / "out")["w"], expected)


def test_nuslerp_with_a_base_is_slerp_per_tensor(tmp_path: Path) -> None:
    found = _read(tmp_path, "merge_method: nuslerp\nbase_model: base\n" + TWO)
    assert found["init"] == "base"
    assert (found["method"], found["granularity"], found["eta"]) == ("slerp", "tensor", 1.0)


@pytest.mark.parametrize("layers", [2, 3])
def test_slices_must_be_whole_models(tmp_path: Path, layers: int) -> None:
    sources = []
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
        sources.append(f"{{model: {tmp_path / name}, layer_range: [0, {layers}]}}")
    text = f"{LINEAR}slices: [{{sources: [{', '.join(sources)}], parameters: }}]\n"
    if layers == 2:
        assert _read(tmp_path, text)["policies"] == [str(tmp_path / n) for n in "ab"]
    else:
        with pytest.raises(ValueError, match=r"whole model, \[0, 2\]"):
            _read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("merge_method: slerp\nbase_model: a\nparameters: {t: 0.3}\n" + TWO,
         "raw weights.*--method lerp --init a --policy b --eta 0.3"),
        ("merge_method: slerp\n" + TWO, "raw weights.*--init START --policy a --policy b"),
        ("merge_method: slerp\nbase_model: a\nparameters: {t: [0, 1]}\n" + TWO, "--eta T"),
        ("merge_method: ties\n" + TWO, "linear or nuslerp; got 'ties'"),
        ("merge_method: nuslerp\n" + TWO, "base_model apart"),
        ("merge_method: nuslerp\nbase_model: c\nparameters: {nuslerp_row_wise: true}\n" + TWO,
         "one vector"),
        (LINEAR + "models: [{model: a, parameters: {weight: 2}}, {model: b}]\n", "must be equal"),
        (LINEAR + "models: [{model: a, parameters: {weight: [0, 1]}}, {model: b}]\n", "gradients"),
        (LINEAR + "parameters: {normalize: false}\n" + TWO, "sum to 1; got 2"),
        (LINEAR + "models: [{model: a}, {model: a}]\n", "listed once"),
        (LINEAR + "models: [{model: a+lora}, {model: b}]\n", "adapter"),
        (LINEAR + "tokenizer_source: union\n" + TWO, "tokenizer_source is not supported"),
        (LINEAR, "either models or slices"),
        (LINEAR + "slices: [{sources: []}, {sources: []}]\n", "2 slices"),
        (LINEAR + "models: 3\n", "models must"),
        (LINEAR + "models: []\n", "at least one model; got none"),
        (LINEAR + "parameters: 3\n" + TWO, "parameters must be a mapping; got 3"),
        (LINEAR + "models: [{model: a, parameters: x}]\n", "of a must be a mapping; got 'x'"),
        (LINEAR + "models: [{model: {model: a}}]\n", "model must be a directory, as text; got {"),
        (LINEAR + "base_model: {model: c}\n" + TWO, "base_model must be a directory, as text"),
        (LINEAR + "base_model: c\n" + TWO, "base_model c must be listed.*there is none"),
        (LINEAR + "base_model: c\nmodels: [{model: a, parameters: {weight: 1}}]\n",
         "base_model c must be listed"),
        (LINEAR + "base_model: c\nparameters: {weight: 0.5, normalize: false}\n" + TWO,
         "sum to 1; got 1.5"),
        ("a: 1\n", "no merge_method"),
        ("{", "not valid YAML"),
    ],
)  # fmt: skip
def test_what_differs_is_refused(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        _read(tmp_path, text)
