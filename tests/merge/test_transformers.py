"""The output is a checkpoint that transformers loads, and the import stays light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import warp_fast
from warp_fast import merge_checkpoints

transformers = pytest.importorskip("transformers")


def _model() -> Any:
    config = transformers.Gemma2Config(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config).eval()


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(torch.arange(20)[None] % 97).logits
    return result


def test_merged_gemma_loads_and_has_the_merged_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _model()
    states, paths = [], []
    for m in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02 * (m > 0))
        path = tmp_path / str(m)
        model.save_pretrained(path, max_shard_size="50KB" if m == 1 else "5GB")
        paths.append(path)
        states.append({n: p.detach().clone() for n, p in model.named_parameters()})
    merge_checkpoints(paths[0], paths[1:], tmp_path / "out", eta=0.7, progress=False)

    merged, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    blocks: dict[str, list[str]] = {}
    for name in states[0]:
        parts = name.split(".")
        blocks.setdefault(".".join(parts[:3]) if "layers" in parts else name, []).append(name)
    expected = warp_fast.slerp(states[0], states[1:], segments=blocks, eta=0.7)
    model.load_state_dict(expected, strict=False)
    torch.testing.assert_close(_logits(merged), _logits(model), rtol=1e-5, atol=1e-6)
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()


def test_import_is_light() -> None:
    check = (
        "import sys, warp_fast, warp_fast.merge; warp_fast.merge_checkpoints; "
        "print(*{'safetensors', 'matplotlib', 'rich', 'yaml', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""
