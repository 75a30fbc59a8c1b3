"""Build the small Gemma 2 of the demo and fit it to the reviews: the SFT policy."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from warp_fast.demo.task import PLACES, prompt_of, vocabulary, write_review
from warp_fast.rl.files import replaced

_BATCH = 64
_LEARNING_RATE = 4e-3


def build_tokenizer() -> Any:
    """A tokenizer with one token per word, and pad, start and end tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = {word: i for i, word in enumerate([*special, *vocabulary()])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", words["<bos>"])]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def build_model(tokenizer: Any) -> Any:
    """A Gemma 2 of two layers: softcaps, sliding window, tied embeddings, GQA, all of it real."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=64,
        sliding_window=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Gemma2ForCausalLM(config)


def fit(steps: int, seed: int, on_step: Callable[[int, float], None]) -> tuple[Any, Any]:
    """Fit the model to reviews by next-token prediction; returns (model, tokenizer)."""
    torch.manual_seed(seed)
    source = random.Random(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    for step in range(steps):
        places = [source.choice(list(PLACES)) for _ in range(_BATCH)]
        texts = [f"{prompt_of(p)} {write_review(p, source)} <eos>" for p in places]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        on_step(step + 1, loss.item())
    return model.eval(), tokenizer


def prepare(directory: Path, steps: int, seed: int, on_step: Callable[[int, float], None]) -> None:
    """Write directory/sft (Hugging Face checkpoint) and directory/prompts.jsonl, once."""
    if directory.exists():
        return
    with replaced(directory) as aside:
        model, tokenizer = fit(steps, seed, on_step)
        model.save_pretrained(aside / "sft")
        tokenizer.save_pretrained(aside / "sft")
        rows = [json.dumps({"prompt": prompt_of(place)}) for place in PLACES]
        (aside / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
