"""mergekit configurations, where they mean what WARP means; refused with the reason elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SLERP = (
    "mergekit's slerp rotates raw weights, which for policies trained from one model is linear "
    "interpolation; WARP rotates the differences from that model. "
)


def read_mergekit(path: str | Path) -> dict[str, Any]:
    """Read a mergekit YAML as arguments of merge_checkpoints.

        linear    equal weights: the mean of the policies; a base_model gets the part 1 - eta, by
                  its own weight or, not listed among the models, by that of parameters
        nuslerp   two equally weighted models and a base_model: WARP's SLERP, per tensor

    Args:
        path: YAML with merge_method, models or slices, base_model, parameters and dtype.

    Returns: keyword arguments init, policies, method, granularity, eta and dtype.

    Raises:
        ValueError: the file is no mergekit configuration, or means what merge_checkpoints does not
            do; says which command of warp-fast comes nearest.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict) or "merge_method" not in content:
        raise ValueError(f"{path} is not a mergekit configuration: it has no merge_method")
    _refuse_extras(content)
    content["parameters"] = content.get("parameters") or {}
    if not isinstance(content["parameters"], dict):
        raise ValueError(f"parameters must be a mapping; got {content['parameters']!r}")
    try:
        models = _models(content)
    except (TypeError, KeyError, AttributeError, IndexError):
        raise ValueError(
            "models must be a list of {model: DIR}, slices of {sources: [{model, layer_range}]}"
        ) from None
    if not models:
        raise ValueError("models must list at least one model; got none")
    base = content.get("base_model")
    if base is not None:
        _check_directory("base_model", base)
    method = content["merge_method"]
    common = {"dtype": _dtype(content)}
    if method == "slerp":
        _refuse_slerp(models, base, content)
    if method == "linear":
        return common | _linear(models, base, content)
    if method == "nuslerp":
        return common | _nuslerp(models, base, content)
    raise ValueError(f"merge_method must be linear or nuslerp; got {method!r}")


def _refuse_extras(content: dict[str, Any]) -> None:
    known = {"merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype"}
    for key in sorted(content.keys() - known):
        if not (key in ("tokenizer_source", "chat_template") and content[key] in ("base", "auto")):
            raise ValueError(f"{key} is not supported; the tokenizer and config are those of init")
    if ("models" in content) == ("slices" in content):
        raise ValueError("give either models or slices")


def _models(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Parameters by model, in order."""
    listed = content.get("models")
    if listed is None:
        slices = content["slices"]
        if len(slices) != 1:
            raise ValueError(f"slices must be one slice of whole models; got {len(slices)} slices")
        listed = slices[0]["sources"]
        for source in listed:
            _check_whole(source["model"], source["layer_range"])
        content["parameters"] = {**content["parameters"], **(slices[0].get("parameters") or {})}
    for each in listed:
        _check_directory("model", each["model"])
    models = {m["model"]: m.get("parameters") or {} for m in listed}
    if len(models) < len(listed):
        raise ValueError("each model must be listed once")
    for name, own in models.items():
        if not isinstance(own, dict):
            raise ValueError(f"parameters of {name} must be a mapping; got {own!r}")
        if "+" in Path(name).name:
            raise ValueError(f"{name}: merge the adapter into its model first")
    return models


def _check_directory(key: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a directory, as text; got {value!r}")


def _check_whole(model: str, layers: list[int]) -> None:
    config = Path(model) / "config.json"
    if not config.is_file():
        raise ValueError(f"{model} must be a local directory with config.json")
    fields = json.loads(config.read_text(encoding="utf-8"))
    count = fields.get("num_hidden_layers", fields.get("text_config", {}).get("num_hidden_layers"))
    if list(layers) != [0, count]:
        raise ValueError(f"layer_range of {model} must be the whole model, [0, {count}]")


def _weight(model: str, own: dict[str, Any], content: dict[str, Any]) -> float:
    weight = own.get("weight", content["parameters"].get("weight", 1.0))
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(
            f"weight of {model} must be one number; gradients and filters of mergekit are not "
            f"supported; got {weight!r}"
        )
    return float(weight)


def _dtype(content: dict[str, Any]) -> str | None:
    dtype = content.get("out_dtype") or content.get("dtype")
    return str(dtype) if dtype else None


def _refuse_slerp(
    models: dict[str, dict[str, Any]], base: str | None, content: dict[str, Any]
) -> None:
    t = content["parameters"].get("t", 0.5)
    others = [model for model in models if model != base]
    if base is not None and len(others) == 1:
        eta = f"{t:g}" if isinstance(t, int | float) else "T"
        near = f"warp-fast merge --method lerp --init {base} --policy {others[0]} --eta {eta}"
        raise ValueError(f"{_SLERP}The interpolation from the base model is: {near}")
    policies = " ".join(f"--policy {model}" for model in others)
    raise ValueError(f"{_SLERP}Name their common start: warp-fast merge --init START {policies}")


def _linear(
    models: dict[str, dict[str, Any]], base: str | None, content: dict[str, Any]
) -> dict[str, Any]:
    """sum w_m theta_m / sum w is theta_0 + eta * mean(theta_m - theta_0) if all w but w_0 agree."""
    if base is not None and base not in models and "models" in content:
        if "weight" not in content["parameters"]:
            raise ValueError(
                f"base_model {base} must be listed under models, with a weight of its own (0: no "
                "part in the mean); one that is not listed gets the weight under parameters in "
                "mergekit, and there is none"
            )
        models = {**models, base: {}}  # as mergekit adds it
    weights = {model: _weight(model, own, content) for model, own in models.items()}
    total = sum(weights.values())
    if content["parameters"].get("normalize", True) is not True and abs(total - 1) > 1e-9:
        raise ValueError(f"weights that are not normalised must sum to 1; got {total:g}")
    init = base if base is not None else next(iter(models))
    policies = [model for model in models if model != base]
    if len({weights[model] for model in policies}) != 1 or total <= 0:
        raise ValueError(f"weights of the policies must be equal, as in WARP; got {weights}")
    eta = 1.0 - weights.get(init, 0.0) / total if base is not None else 1.0
    return _arguments(init, policies, "lerp", "block", eta)


def _nuslerp(
    models: dict[str, dict[str, Any]], base: str | None, content: dict[str, Any]
) -> dict[str, Any]:
    policies = list(models)
    if base is None or base in models or len(policies) != 2:
        raise ValueError(
            "nuslerp must have two models and a base_model apart from them, their common start; "
            "without it mergekit rotates raw weights, which WARP does not"
        )
    parameters = content["parameters"]
    if parameters.get("nuslerp_flatten", True) is not True or parameters.get("nuslerp_row_wise"):
        raise ValueError(
            "nuslerp must treat a tensor as one vector, as WARP does (nuslerp_flatten)"
        )
    weights = {model: _weight(model, own, content) for model, own in models.items()}
    if len(set(weights.values())) != 1 or weights[policies[0]] <= 0:
        raise ValueError(f"weights of the policies must be equal, as in WARP; got {weights}")
    return _arguments(base, policies, "slerp", "tensor", 1.0)


def _arguments(
    init: str, policies: list[str], method: str, granularity: str, eta: float
) -> dict[str, Any]:
    return {
        "init": init,
        "policies": policies,
        "method": method,
        "granularity": granularity,
        "eta": eta,
    }
