"""Sequences of a batch: which advantage is whose, what one may not do to another, and none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_loss_checks import B, T, arguments, both, every_kl, gradients, loss_of, served

# N = 6 = B, so that advantages of [6] could be of tokens
SOME_EMPTY = torch.tensor([0, 2, 2, 3, 3, 3, 6])
LAYOUTS = {"padded": None, "packed": torch.tensor([0, 2, 2, 6])}


@both
@served
def test_as_many_advantages_as_sequences_are_of_the_sequences(form: str, backend: str) -> None:
    """Even where there are as many tokens; [B] means the same whatever the lengths are."""
    given = arguments(form, 6)
    given["cu_seqlens"] = SOME_EMPTY
    owner = torch.tensor([0, 0, 2, 5, 5, 5])
    found = loss_of(given, kl="none", backend=backend)
    expected = -(given["advantages"][owner] * found.logprobs).sum() / 6
    torch.testing.assert_close(found.loss, expected)


@both
@served
def test_sequences_of_one_token_have_its_advantage(form: str, backend: str) -> None:
    given = arguments(form, 6)
    given["cu_seqlens"] = torch.arange(7)
    found = loss_of(given, kl="none", backend=backend)
    torch.testing.assert_close(found.loss, -(given["advantages"] * found.logprobs).sum() / 6)


def token_gradients(given: dict[str, Any], backend: str, **options: Any) -> Tensor:
    """Of the loss with respect to the logits or hidden states, [N, ...]."""
    loss = loss_of(given, kl="reward_to_go", backend=backend, **options).loss
    return gradients(given, loss)[0].reshape(B * T, -1)


@served
@both
@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reward_to_go_stays_in_its_sequence(
    layout: str, value: float, form: str, backend: str
) -> None:
    """An anchor that rules a token out spoils that token and those before it, no other."""
    shape = (B, T) if layout == "padded" else (B * T,)
    given = {k: v for k, v in arguments(form, *shape).items() if not k.startswith("anchor")}
    given["advantages"] = torch.randn(shape)
    given["cu_seqlens"] = LAYOUTS[layout]
    anchor = -torch.rand(shape) - 1
    expected = token_gradients(given, backend, anchor_logprobs=anchor)
    last = 4  # of the last sequence; what follows in it does not see it either
    anchor.view(-1)[last] = value
    found = token_gradients(given, backend, anchor_logprobs=anchor)
    start = 3 if layout == "padded" else 2
    kept = [n for n in range(B * T) if not start <= n <= last]
    torch.testing.assert_close(found[kept], expected[kept])
    assert not torch.equal(found[last], expected[last])


@both
@served
def test_reward_to_go_of_long_and_short_sequences(form: str, backend: str) -> None:
    lengths = [1, 33, 0, 2, 64, 5, 0]
    given = arguments(form, sum(lengths))
    given["advantages"] = torch.zeros(len(lengths))
    given["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    found = loss_of(given, kl="reward_to_go", beta=1.0, backend=backend)
    expected = torch.zeros(())
    for kl, logp in zip(found.kl.split(lengths), found.logprobs.split(lengths), strict=True):
        expected = expected + (kl.detach().flip(0).cumsum(0).flip(0) * logp).sum() / len(lengths)
    torch.testing.assert_close(found.loss, expected)


@served
@both
@every_kl
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,)], ids=str)
def test_no_tokens(shape: tuple[int, ...], kl: str, form: str, backend: str) -> None:
    for sequences in (0, 2) if len(shape) == 1 else (shape[0],):
        given = arguments(form, *shape)
        given["advantages"] = torch.randn(sequences)
        if len(shape) == 1:
            given["cu_seqlens"] = torch.zeros(sequences + 1, dtype=torch.int32)
        for normalizer in ("sequence", "token"):
            result = loss_of(given, kl=kl, normalizer=normalizer, backend=backend)
            assert result.loss == 0 and result.logprobs.shape == shape
            assert not any(gradient.any() for gradient in gradients(given, result.loss))
