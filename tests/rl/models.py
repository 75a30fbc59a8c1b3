"""Small real Gemma checkpoints on disk, with a tokenizer, as a hub checkpoint would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from warp_fast.demo.sft import build_tokenizer
from warp_fast.demo.task import PLACES, prompt_of

FAMILIES = ("gemma", "gemma2", "gemma3", "gemma3 with images")


def build(family: str, tokenizer: Any, seed: int = 0) -> Any:
    """A randomly initialised model of a family; sharpened so that its policy is not uniform."""
    import transformers as t

    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 48,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    if family == "gemma":
        return t.GemmaForCausalLM(t.GemmaConfig(**common))
    if family == "gemma2":
        return t.Gemma2ForCausalLM(
            t.Gemma2Config(**common, query_pre_attn_scalar=8, sliding_window=16)
        )
    text = t.Gemma3TextConfig(**common, query_pre_attn_scalar=8, sliding_window=16)
    if family == "gemma3":
        return t.Gemma3ForCausalLM(text)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )


def save(directory: Path, family: str, seed: int = 0) -> Path:
    """Write a checkpoint directory that also carries sampling defaults, as hub ones do."""
    tokenizer = build_tokenizer()
    model = build(family, tokenizer, seed)
    model.generation_config.update(do_sample=True, top_k=3, top_p=0.5)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_prompts(path: Path) -> Path:
    """One prompt per place, as text."""
    path.write_text("\n".join(prompt_of(place) for place in PLACES) + "\n", encoding="utf-8")
    return path


def early_words(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward with signal on an untrained model: the share of words that begin with a to l."""
    words = [completion.split() for completion in completions]
    return [sum(word[0] < "m" for word in w) / max(1, len(w)) for w in words]
