"""Which attention `auto` takes: flash where it computes the model's own function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.utils import import_utils

from warp_fast.rl.attention import choose_attention

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def _flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_utils, "is_flash_attn_2_available", lambda: True)


@pytest.mark.usefixtures("_flash")
@pytest.mark.parametrize(
    ("config", "device", "dtype", "expected"),
    [
        ("Gemma2Config", CUDA, BF16, "flash_attention_2"),
        ("Gemma2Config", CUDA, FP32, "eager"),
        ("Gemma2Config", CPU, BF16, "eager"),
        ("Gemma3Config", CUDA, BF16, "flash_attention_2"),
        ("Gemma4TextConfig", CUDA, BF16, "sdpa"),
        ("GPT2Config", CUDA, BF16, "flash_attention_2"),
        ("GPT2Config", CUDA, FP32, "sdpa"),
    ],
)
def test_auto(config: str, device: torch.device, dtype: torch.dtype, expected: str) -> None:
    if not hasattr(transformers, config):
        pytest.skip(f"this release of transformers has no {config}")
    made: Any = getattr(transformers, config)()
    assert choose_attention(made, "auto", device, dtype)[0] == expected


def test_without_flash_attn() -> None:
    assert choose_attention(transformers.Gemma2Config(), "auto", CUDA, BF16)[0] == "eager"


def test_sdpa_would_drop_the_cap() -> None:
    with pytest.raises(ValueError, match="attn_logit_softcapping; sdpa does not"):
        choose_attention(transformers.Gemma2Config(), "sdpa", CUDA, BF16)
