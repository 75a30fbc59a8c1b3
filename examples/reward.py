"""A reward is a function of prompts and completions; other columns of the prompts are keywords."""

from __future__ import annotations

from typing import Any


def short_and_polite(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """One number per completion, finite; an exception or NaN stops the run and saves the batch."""
    return [("please" in text.lower()) - 0.01 * len(text.split()) for text in completions]
