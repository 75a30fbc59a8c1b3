"""Prompts: reading them from a file, and the order in which each run sees them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Prompt:
    """A prompt as text, its token ids, and the other columns of its row for the reward."""

    text: str
    token_ids: list[int]
    columns: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: str, tokenizer: Any, longest: int) -> list[Prompt]:
    """Read a .jsonl or .txt file of prompts.

    Args:
        path: .jsonl rows hold "prompt" (or "messages"), a string or a list of chat messages; these
            are rendered with the tokenizer's chat template, which writes all special tokens that
            they get. .txt holds one prompt per line.
        tokenizer: of the policy.
        longest: most tokens a prompt may have.

    Raises:
        ValueError: no file, no prompts, a row without a prompt, or a prompt that is empty or too
            long; names the file and line.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"prompts must be a .jsonl or .txt file; there is none at {path}")
    if file.suffix not in (".jsonl", ".txt"):
        raise ValueError(
            f"prompts must be a .jsonl file, one object a line, or a .txt file; got {path}: "
            "convert it (to_json of a Hugging Face dataset or to_json(lines=True) of pandas do)"
        )
    # not at the other places where str.splitlines does, which JSON strings may hold
    lines = file.read_text(encoding="utf-8").split("\n")
    rows = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path} must hold at least one prompt; it is empty")
    parse = _parse_json if file.suffix == ".jsonl" else _parse_text
    prompts = []
    for number, line in rows:
        where = f"{path}, line {number}"
        prompt, columns = parse(line, where)
        text = prompt if isinstance(prompt, str) else _rendered(prompt, tokenizer)
        token_ids = tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]
        if not 0 < len(token_ids) <= longest:
            raise ValueError(
                f"{where}: a prompt must have 1 to {longest} tokens (the model's context less "
                f"max_new_tokens); this one has {len(token_ids)}"
            )
        prompts.append(Prompt(text, list(token_ids), columns))
    return prompts


def _rendered(messages: list[Any], tokenizer: Any) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def _parse_text(line: str, where: str) -> tuple[str, dict[str, Any]]:
    return line.strip(), {}


def _parse_json(line: str, where: str) -> tuple[str | list[Any], dict[str, Any]]:
    try:
        row = json.loads(line)
        prompt = row.pop("prompt" if "prompt" in row else "messages")
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f'{where} must be a JSON object with a "prompt"; got {line[:60]!r}'
        ) from error
    if not isinstance(prompt, str | list):
        raise ValueError(f'{where}: "prompt" must be text or chat messages; got {prompt!r}')
    return prompt, row


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any parts; equal parts give equal seeds on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def prompt_batch(count: int, size: int, step: int, seed: int) -> list[int]:
    """Indices of the `size` prompts of a step: a fresh shuffle of all `count` in every epoch."""
    positions = range(step * size, (step + 1) * size)
    orders = {}
    for epoch in {position // count for position in positions}:
        generator = torch.Generator().manual_seed(derive_seed("epoch", seed, epoch))
        orders[epoch] = torch.randperm(count, generator=generator).tolist()
    return [orders[position // count][position % count] for position in positions]
