"""A causal LM as a policy: loading, hidden states for the fused head, sampling, saving."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warp_fast._solve import first_of
from warp_fast.loss import linear_token_logprobs
from warp_fast.rl.attention import choose_attention
from warp_fast.rl.config import WarpConfig
from warp_fast.rl.files import replaced

logger = logging.getLogger("warp_fast")


@dataclass
class Policy:
    """A model in fp32, its tokenizer, and how its forward pass runs.

    Attributes:
        model: a transformers causal LM, in eval mode (no dropout, in the gradient pass neither).
        eos_ids: tokens that end a completion.
        softcap: final-logit softcap of the head, or None.
        generation_config: the checkpoint's own, kept for saving; sampling never uses it, since its
            top-k or top-p would make the sampled distribution another than the scored one.
        saved_dtype: dtype of the checkpoint it came from.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    compute_dtype: torch.dtype
    eos_ids: list[int]
    softcap: float | None
    generation_config: Any
    saved_dtype: torch.dtype

    @property
    def context(self) -> int:
        """Longest sequence the model takes."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Run matrix work in the compute dtype; fp32 needs nothing."""
        enabled = self.compute_dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=enabled):
            yield

    def hidden(self, model: Any, tokens: Tensor, attention_mask: Tensor, last: int) -> Tensor:
        """Hidden states that predict the `last` tokens of each row.

        Args:
            model: self.model, or a module of the same architecture such as the anchor.
            tokens, attention_mask: [B, L], left-padded.
            last: T, how many tokens at the end are scored.

        Returns: [B, T, D].
        """
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        with self.autocast():
            output = model.base_model(
                input_ids=tokens,
                attention_mask=attention_mask,
                position_ids=positions,
                use_cache=False,
            )
        states: Tensor = output.last_hidden_state[:, -last - 1 : -1]
        return states

    def save(self, directory: Path) -> None:
        """Write a Hugging Face directory, whole or not at all."""
        model = self.model
        with replaced(directory) as aside:
            ours, model.generation_config = model.generation_config, self.generation_config
            try:
                model.save_pretrained(aside)
            finally:
                model.generation_config = ours
            self.tokenizer.save_pretrained(aside)

    def load_weights(self, directory: Path) -> None:
        """Take over the weights of a directory written by `save` or by a merge."""
        self.model.load_state_dict(load_model(str(directory), "eager").state_dict())

    def check_same_model(self, directory: Path) -> None:
        """Raise ValueError where a directory has the config of another model; reads no data."""
        from transformers import AutoConfig, AutoModelForCausalLM

        maker: Any = AutoModelForCausalLM
        try:
            config = AutoConfig.from_pretrained(directory)
            with torch.device("meta"):
                other = maker.from_config(config)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"policy {directory} must be a causal LM; it is not: {error}"
            ) from error
        ours, theirs = _shapes(self.model), _shapes(other)
        if odd := sorted(n for n in ours | theirs if ours.get(n) != theirs.get(n)):
            rows = [f"{n} ({theirs.get(n, 'none')}, not {ours.get(n, 'none')})" for n in odd]
            raise ValueError(
                f"policy {directory} must have the architecture and vocabulary of the SFT policy; "
                f"it differs in {first_of(rows)}"
            )


def _shapes(model: Any) -> dict[str, list[int]]:
    """By parameter; tied ones once."""
    return {name: list(weight.shape) for name, weight in model.named_parameters()}


def head_weight(model: Any) -> Tensor:
    """[V, D] weight of the output head."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight


def load_model(source: str, attention: str) -> Any:
    """A causal LM in fp32 from a directory or hub id; one clear ValueError when it is not there."""
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    try:
        model, info = loader.from_pretrained(
            source, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
        )
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"policy {source!r} could not be loaded as a causal LM: {error}"
        ) from error
    except Exception as error:  # safetensors raises its own, unrelated to the above
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"policy {source!r} holds a corrupt checkpoint: {error}") from error
    check_loaded(f"policy {source!r}", model, info)
    return model


def check_loaded(what: str, model: Any, info: dict[str, Any]) -> None:
    """Every weight must come from the checkpoint: transformers draws those that it lacks."""
    missing, mismatched, unexpected = (
        sorted(map(str, info.get(f"{kind}_keys") or ()))
        for kind in ("missing", "mismatched", "unexpected")
    )
    # what is unexpected alone is another part of the model, such as its vision tower
    if missing or mismatched:
        kinds = {"lacks": missing, "mismatches": mismatched, "has unknown": unexpected}
        faults = [f"{kind} {first_of(names)}" for kind, names in kinds.items() if names]
        raise ValueError(
            f"{what} must hold every weight of {type(model).__name__}; it {', '.join(faults)}: "
            "save the whole model with save_pretrained"
        )


def load_policy(config: WarpConfig) -> Policy:
    """Load the policy of a config and check that it can be trained.

    Raises:
        ValueError: no model or tokenizer there, weights of another dtype than can be saved, no pad
            token, an attention that would drop the model's softcap, or a head that is not
            `softcap(hidden @ weight.T)`.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    source, device = config.policy, _device_of(config.device)
    try:
        settings = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"policy must be a Hugging Face directory or hub id with a tokenizer; {source!r} is "
            f"not: {error}"
        ) from error
    saved = getattr(settings, "dtype", None) or torch.float32
    if str(saved).removeprefix("torch.") not in ("float32", "bfloat16", "float16"):
        raise ValueError(
            f"policy must be in float32, bfloat16 or float16; {source!r} is in {saved}: save it "
            "again in one of these (model.float().save_pretrained(NEW))"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of {source!r} must have a pad token; set one that is in the vocabulary "
            "(tokenizer.pad_token = tokenizer.eos_token will do) and save it with the model"
        )
    dtype = _auto_dtype(config.compute_dtype, device)
    attention, why = choose_attention(settings, config.attention, device, dtype)
    logger.info("attention: %s (%s)", attention, why)
    model = load_model(source, attention).to(device).eval()
    original = model.generation_config
    eos_ids = _eos_ids(original, tokenizer)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=eos_ids or None,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=original.bos_token_id,
    )
    policy = Policy(
        model,
        tokenizer,
        device,
        dtype,
        eos_ids,
        getattr(model.config.get_text_config(), "final_logit_softcapping", None),
        original,
        saved,
    )
    _check_head(policy)
    return policy


def _device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu or cuda (cuda:1, ...); got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {name!r}, but torch sees {torch.cuda.device_count()} such GPUs; give auto "
            "or cpu, or see warp-fast doctor"
        )
    return device


def _auto_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _eos_ids(generation_config: Any, tokenizer: Any) -> list[int]:
    found = generation_config.eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return []
    return [int(i) for i in found] if isinstance(found, list) else [int(found)]


@torch.no_grad()
def _check_head(policy: Policy) -> None:
    """Hold the fused head to the model's own logits on a few tokens."""
    vocabulary = len(head_weight(policy.model))
    if policy.tokenizer.pad_token_id >= vocabulary:
        raise ValueError(
            f"the pad token must be in the vocabulary of {vocabulary}; its id is "
            f"{policy.tokenizer.pad_token_id}: take a token that is there, such as the eos token"
        )
    tokens = torch.arange(8, device=policy.device)[None] % vocabulary
    mask = torch.ones_like(tokens)
    hidden = policy.hidden(policy.model, tokens, mask, 7)[0].float()
    weight = head_weight(policy.model)
    ours = linear_token_logprobs(hidden, weight, tokens[0, 1:], softcap=policy.softcap)
    logits = policy.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[0, :-1]
    theirs = logits.float().log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    error = (ours - theirs).abs().max().item()
    if not error < (1e-3 if policy.compute_dtype == torch.float32 else 0.25):
        raise ValueError(
            f"{type(policy.model).__name__} must compute its logits as softcap(hidden @ weight.T); "
            f"its log-probs differ from that by {error:.3g}"
        )
