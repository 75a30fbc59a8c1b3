"""The files of a checkpoint beside its weights: config, tokenizer, generation config, index."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from warp_fast.merge.layout import index_json
from warp_fast.merge.plan import MergePlan

_CARRIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",  # a directory
    "*processor_config.json",
    "*.py",  # the model's own code, which auto_map in its config names
)


def carry_over(plan: MergePlan, directory: Path) -> None:
    """Copy what belongs to the model from init, with the dtype of the output in its config."""
    for pattern in _CARRIED:
        for path in plan.init.path.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, directory / path.name, copy_function=shutil.copyfile)
            else:
                shutil.copyfile(path, directory / path.name)
    if plan.init.config:
        config = with_dtype(plan.init.config, plan.dtype)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    if len(plan.files) > 1:
        index = directory / "model.safetensors.index.json"
        index.write_text(index_json(plan.files), encoding="utf-8")


def with_dtype(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """A config, its text and vision parts included, that says the dtype of the output."""
    if dtype is None:
        return config
    result = _replaced(config, dtype)
    return result if {"dtype", "torch_dtype"} & result.keys() else {**result, "dtype": dtype}


def _replaced(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            value = dtype
        elif key.endswith("_config") and isinstance(value, dict):
            value = _replaced(value, dtype)
        result[key] = value
    return result
