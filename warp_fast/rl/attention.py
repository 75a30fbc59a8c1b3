"""Which attention implementation a model runs with, and why."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch


def choose_attention(config: Any, requested: str, device: torch.device) -> tuple[str, str]:
    """Name the implementation for transformers, with the reason, honouring the model's softcap.

    Args:
        config: of the model; `attn_logit_softcapping` (Gemma 2) rules out sdpa, some releases of
            which drop the cap without a word.
        requested: "auto", or a name that transformers knows.

    Raises:
        ValueError: the request would compute another function than the model's.
    """
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if requested != "auto":
        if capped and requested == "sdpa":
            raise ValueError(
                "attention must honour this model's attn_logit_softcapping; sdpa does not. Use "
                "auto, eager, flex_attention or flash_attention_2"
            )
        return requested, "as asked"
    if device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2", "flash-attn is installed"
    if capped:
        return "eager", "the model caps its attention logits, which sdpa cannot"
    return "sdpa", "torch's own, no cap to honour"
