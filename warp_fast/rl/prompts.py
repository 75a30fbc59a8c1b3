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
            they get. .txt holds one prompt per line. Both are UTF-8, with or without a mark of it.
        tokenizer: of the policy.
        longest: most tokens a prompt may have.

    Raises:
        ValueError: no file, one that is not UTF-8, no prompts, a row without a prompt, a chat that
            the template refuses or that ends with the answer, or a prompt that is empty or too
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
    lines = _read(file).split("\n")
    rows = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path} must hold at least one prompt; it is empty")
    parse = _parse_json if file.suffix == ".jsonl" else _parse_text
    prompts = []
    for number, line in rows:
        where = f"{path}, line {number}"
        prompt, columns = parse(line, where)
        text, token_ids = _tokenized(prompt, tokenizer, where)
        if not text.strip():
            raise ValueError(f"{where}: a prompt must not be empty; got {prompt!r}")
        if not 0 < len(token_ids) <= longest:
            raise ValueError(
                f"{where}: a prompt must have 1 to {longest} tokens (the model's context less "
                f"max_new_tokens); this one has {len(token_ids)}"
            )
        prompts.append(Prompt(text, token_ids, columns))
    return prompts


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8 text; it is not: {error}") from error


def _tokenized(prompt: str | list[Any], tokenizer: Any, where: str) -> tuple[str, list[int]]:
    chat = not isinstance(prompt, str)
    try:
        text: Any = prompt
        if chat:
            given = {"tokenize": False, "add_generation_prompt": True}
            text = tokenizer.apply_chat_template(prompt, **given)
        text.encode()  # half a surrogate pair, which JSON can hold, is no text
        return text, list(tokenizer(text, add_special_tokens=not chat)["input_ids"])
    except Exception as error:  # a template raises what it likes
        kind = "chat that the tokenizer's template takes" if chat else "text"
        raise ValueError(f"{where} must be a {kind}: {error}; got {prompt!r:.200}") from error


def _parse_text(line: str, where: str) -> tuple[str, dict[str, Any]]:
    return line.strip(), {}


def _parse_json(line: str, where: str) -> tuple[str | list[Any], dict[str, Any]]:
    try:
        row = json.loads(line)
        prompt = row.pop("prompt" if "prompt" in row else "messages")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f'{where} must be a JSON object with a "prompt"; got {line[:60]!r}'
        ) from error
    if not isinstance(prompt, str | list):
        raise ValueError(f'{where}: "prompt" must be text or chat messages; got {prompt!r}')
    if isinstance(prompt, list):
        _check_chat(prompt, where)
    return prompt, row


def _check_chat(messages: list[Any], where: str) -> None:
    if not messages or not all(isinstance(message, dict) for message in messages):
        rule = 'chat messages must be objects with "role" and "content"'
        raise ValueError(f"{where}: {rule}; got {messages!r:.200}")
    if messages[-1].get("role") == "assistant":
        raise ValueError(
            f"{where}: chat messages must end before the answer, which the policy gives; these end "
            "with one of the assistant: leave it out, or keep it in another column for the reward"
        )


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
