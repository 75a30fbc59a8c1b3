"""Whether policies fit the init: names, shapes, vocabulary, tied heads; by their headers."""

from __future__ import annotations

import torch

from warp_fast._solve import first_of
from warp_fast.merge.checkpoint import Checkpoint, CheckpointError

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def tied_heads(init: Checkpoint, policies: list[Checkpoint]) -> set[str]:
    """Heads that are the embedding: by the config of init, or because init stores none."""
    config = init.config
    text = config.get("text_config")
    nested = text if isinstance(text, dict) else {}
    # configs leave out what is the default of their class; for every Gemma that is tied
    default = str(config.get("model_type", "")).startswith("gemma")
    tied = config.get("tie_word_embeddings", nested.get("tie_word_embeddings", default))
    stored = [name for c in (init, *policies) for name in c.entries]
    heads = {name for name in stored if name == _HEAD or name.endswith("." + _HEAD)}
    embedded = any(name.endswith(_EMBEDDING) for name in init.entries)
    if embedded and tied:
        return heads or {_HEAD}
    return heads if embedded and heads.isdisjoint(init.entries) else set()


def embedding_of(checkpoint: Checkpoint, head: str) -> str:
    """The input embedding nearest to a head by name."""
    found = [name for name in checkpoint.entries if name.endswith(_EMBEDDING)]
    root = head.removesuffix(_HEAD)
    return min(found, key=lambda name: (not name.startswith(root), len(name)))


def check_match(init: Checkpoint, policy: Checkpoint, names: list[str], tied: set[str]) -> None:
    """A policy must have the tensors of init; a head that init ties may be there or not."""
    expected, found = set(names), policy.entries.keys() - tied
    odd = {"lacks": expected - found, "has unknown": found - expected}
    if faults := [f"{what} {_some(names)}" for what, names in odd.items() if names]:
        raise CheckpointError(f"{policy}, compared to init, {' and '.join(faults)}")
    for name in names:
        ours, theirs = init.entries[name], policy.entries[name]
        if ours.shape != theirs.shape:
            raise CheckpointError(f"{policy}: {_shape_fault(name, ours.shape, theirs.shape)}")
        if (ours.dtype in FLOATING) != (theirs.dtype in FLOATING):
            raise CheckpointError(f"{policy}: {name} is {theirs.dtype}, but {ours.dtype} in init")


def _some(names: set[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({first_of(sorted(names))})"


def _shape_fault(name: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> str:
    if name.endswith((_HEAD, _EMBEDDING)) and ours[1:] == theirs[1:]:
        return (
            f"vocabulary of {theirs[0]} rows in {name}, but {ours[0]} in init; resize one of the "
            "models first (resize_token_embeddings), nothing is truncated here"
        )
    return f"{name} has shape {list(theirs)}, but {list(ours)} in init"


def check_floating(checkpoints: list[Checkpoint]) -> None:
    """There must be weights to merge; quantised ones are integers, and would pass for buffers."""
    for checkpoint in checkpoints:
        if checkpoint.config.get("quantization_config"):
            raise CheckpointError(f"{checkpoint} is quantised; merge the full-precision weights")
        if not any(e.dtype in FLOATING and e.numel for e in checkpoint.entries.values()):
            raise CheckpointError(f"{checkpoint} holds no floating-point tensors")
