"""Checkpoints of the shape of a Gemma 3, with random weights, as the merge benchmark reads them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Model:
    """Sizes of a Gemma 3."""

    layers: int
    hidden: int
    inner: int
    heads: int
    head: int
    vocabulary: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        wide, inner, queries = self.hidden, self.inner, self.heads * self.head
        layer = {
            "self_attn.q_proj": (queries, wide),
            "self_attn.k_proj": (self.head, wide),
            "self_attn.v_proj": (self.head, wide),
            "self_attn.o_proj": (wide, queries),
            "self_attn.q_norm": (self.head,),
            "self_attn.k_norm": (self.head,),
            "mlp.gate_proj": (inner, wide),
            "mlp.up_proj": (inner, wide),
            "mlp.down_proj": (wide, inner),
            "input_layernorm": (wide,),
            "post_attention_layernorm": (wide,),
            "pre_feedforward_layernorm": (wide,),
            "post_feedforward_layernorm": (wide,),
        }
        found: dict[str, tuple[int, ...]] = {
            f"model.layers.{i}.{name}.weight": shape
            for i in range(self.layers)
            for name, shape in layer.items()
        }
        ends = {"model.embed_tokens.weight": (self.vocabulary, wide), "model.norm.weight": (wide,)}
        return {**found, **ends}

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": 1,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
        }


GEMMA_3_1B = Model(26, 1152, 6912, 4, 256, 262144)
GEMMA_3_270M = Model(18, 640, 2048, 4, 256, 262144)
SMALL = Model(4, 640, 2048, 4, 256, 8192)


def make_checkpoints(root: Path, model: Model, runs: int = 2) -> list[Path]:
    """init and policies, bf16, in one file each."""
    random = torch.Generator().manual_seed(0)
    init = {n: 0.02 * torch.randn(s, generator=random) for n, s in model.shapes().items()}
    paths = [root / name for name in ["init", *(f"policy-{m}" for m in range(runs))]]
    for i, path in enumerate(paths):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(model.config()))
        weights = {}
        for name, start in init.items():
            step = 4e-4 * torch.randn(start.shape, generator=random) if i else 0.0
            weights[name] = (start + step).bfloat16()
        save_file(weights, path / "model.safetensors", {"format": "pt"})
    return paths
