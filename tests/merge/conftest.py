"""Small checkpoints on disk, as the tests of merging need them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]


class Checkpoints:
    """Writes checkpoint directories below one root, and reads them back."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def save(
        self, name: str, weights: Weights, *, shards: int = 1, config: Any = None, order: int = 1
    ) -> Path:
        """Save weights in `shards` files, tensors dealt out in turn; order -1 deals backwards."""
        path = self.root / name
        path.mkdir(parents=True)
        if config is not None:
            (path / "config.json").write_text(json.dumps(config))
        names = sorted(weights)[::order]
        if shards == 1:
            save_file(weights, path / "model.safetensors", {"format": "pt"})
            return path
        files = {
            n: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
            for i, n in enumerate(names)
        }
        for file in set(files.values()):
            save_file({n: weights[n] for n in names if files[n] == file}, path / file)
        index = {"metadata": {}, "weight_map": files}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        return path

    def load(self, path: Path) -> Weights:
        """All tensors of a checkpoint directory."""
        files = sorted(path.glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path)


def _family(runs: int, dtypes: list[torch.dtype]) -> tuple[Weights, list[Weights]]:
    """theta_init and policies that differ from it by 3 %; dtypes in turn over the tensors."""
    generator = torch.Generator().manual_seed(runs)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (97, 8),
        "model.norm.weight": (3,),
        "model.scale": (),
        "model.one": (1,),
        "model.layers.0.empty": (0, 4),
    }
    for layer in (0, 2, 10):
        shapes[f"model.layers.{layer}.mlp.weight"] = (24, 8)
        shapes[f"model.layers.{layer}.self_attn.weight"] = (8, 8)
        shapes[f"model.layers.{layer}.norm.weight"] = (8,)
    init: Weights = {}
    policies: list[Weights] = [{} for _ in range(runs)]
    for i, (name, shape) in enumerate(shapes.items()):
        start = torch.randn(shape, generator=generator).to(dtypes[i % len(dtypes)])
        init[name] = start
        for m, policy in enumerate(policies):
            step = (0.03 + 0.01 * m) * torch.randn(shape, generator=generator)
            policy[name] = (start.float() + step).to(dtypes[(i + m) % len(dtypes)])
    return init, policies


@pytest.fixture
def family() -> Any:
    """The function (runs, dtypes) -> theta_init, policies."""
    return _family
