"""The files of a checkpoint beside its weights: config, tokenizer, generation config, index."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warp_fast.merge.checkpoint import Checkpoint, CheckpointError
from warp_fast.merge.layout import index_json

if TYPE_CHECKING:
    from warp_fast.merge.plan import MergePlan

_CARRIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "vocab.*",
    "*.vocab",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates",  # a directory
    "*processor_config.json",
    "*.py",  # the model's own code, which auto_map in its config names
)


def carried_files(init: Checkpoint) -> list[Path]:
    """The files and directories beside config.json that belong to the model.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    found = sorted({path for pattern in _CARRIED for path in init.path.glob(pattern)})
    for path in (each for top in found for each in (top, *top.rglob("*"))):
        if not os.access(path, os.R_OK):
            raise CheckpointError(
                f"{init}: {path.relative_to(init.path)} must be readable, to be carried over; it "
                "is a broken link, or not permitted. Download it again, or remove it"
            )
    return found


def carry_over(plan: MergePlan, directory: Path) -> None:
    """Copy what belongs to the model from init, with the dtype of the output in its config."""
    for path in plan.carried:
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
