"""Which attention implementation a model runs with, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

_FLASH_HEAD = 256  # the widest head of flash-attn 2


def choose_attention(
    config: Any, requested: str, device: torch.device, dtype: torch.dtype
) -> tuple[str, str]:
    """Name the implementation for transformers, with the reason, honouring the model's softcap.

    Args:
        config: of the model; `attn_logit_softcapping` (Gemma 2) rules out sdpa, some releases of
            which drop the cap without a word.
        requested: "auto", or a name that transformers knows.
        dtype: of the forward pass.

    Raises:
        ValueError: the request would compute another function than the model's.
    """
    config = config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if requested != "auto":
        if capped and requested == "sdpa":
            raise ValueError(
                "attention must honour this model's attn_logit_softcapping; sdpa does not. Use "
                "auto, eager, flex_attention or flash_attention_2"
            )
        return requested, "as asked"
    if device.type == "cuda" and dtype != torch.float32 and _widest_head(config) <= _FLASH_HEAD:
        from transformers.utils.import_utils import is_flash_attn_2_available

        if is_flash_attn_2_available():
            return "flash_attention_2", "flash-attn is installed"
    if capped:
        return "eager", "the model caps its attention logits, which sdpa cannot"
    return "sdpa", "torch's own, no cap to honour"


def _widest_head(config: Any) -> int:
    """Of all layers; Gemma 4 has wider heads in those with full attention."""
    named = list(_head_sizes(config.to_dict()))
    return max(named) if named else int(config.hidden_size // config.num_attention_heads)


def _head_sizes(part: dict[Any, Any]) -> Iterator[int]:
    for key, value in part.items():
        if isinstance(value, dict):
            yield from _head_sizes(value)
        elif str(key).endswith("head_dim") and isinstance(value, int):
            yield value
