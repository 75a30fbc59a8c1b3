"""The losses as people train: wrapped, accumulated, checkpointed, compiled, transformed."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import warp_fast
from tests.small_lm import SmallLM, batch, gradients
from tests.test_loss_checks import B, T, arguments, loss_of, served

ROOT = Path(__file__).resolve().parents[1]
SEQUENCES = 6

kinds = pytest.mark.parametrize("kl", ["reward", "reward_to_go", "k2"])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")
def test_two_processes_agree_with_one() -> None:
    """DDP and FSDP2; the checks are in training_worker.py."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [*launcher, "-m", "tests.training_worker"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("every check passed") == 2


def one_step(policy: SmallLM, **options: Any) -> dict[str, Tensor]:
    """Gradients of the whole batch."""
    given = batch(SEQUENCES)
    policy.loss(given, SmallLM(seed=1).logprobs(given), **options).backward()
    return gradients(policy)


@served
@kinds
@pytest.mark.parametrize("normalizer", [6, torch.tensor(6.0)], ids=["number", "tensor"])
def test_micro_batches_add_up(normalizer: Any, kl: str, backend: str) -> None:
    """Of unequal sizes, one of them all masked."""
    options = {"kl": kl, "normalizer": normalizer, "backend": backend}
    given, policy, whole = batch(SEQUENCES), SmallLM(), SmallLM()
    given[3:4].mask.fill_(False)
    anchor_logprobs = SmallLM(seed=1).logprobs(given)
    whole.loss(given, anchor_logprobs, **options).backward()
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 6)):
        policy.loss(given[rows], anchor_logprobs[rows], **options).backward()
    torch.testing.assert_close(gradients(policy), gradients(whole), rtol=1e-5, atol=1e-7)


@served
@kinds
def test_a_checkpointed_step_is_the_step(kl: str, backend: str) -> None:
    """Backbone and loss are run again in the backward pass."""
    options: dict[str, Any] = {"kl": kl, "backend": backend}
    given, policy = batch(SEQUENCES), SmallLM()
    anchor_logprobs = SmallLM(seed=1).logprobs(given)
    loss: Any = checkpoint(
        partial(policy.loss, **options), given, anchor_logprobs, use_reentrant=False
    )
    loss.backward()
    torch.testing.assert_close(gradients(policy), one_step(SmallLM(), **options), rtol=0, atol=0)


@served
def test_a_step_under_autocast(backend: str) -> None:
    """bf16 hidden states beside an fp32 head: the loss is fp32, gradients those of the parts."""
    policy, fine = SmallLM(), one_step(SmallLM(), kl="k2", backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert policy.hidden(batch(1).inputs).dtype == torch.bfloat16
        found = one_step(policy, kl="k2", backend=backend)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        # a few roundings to bf16 along the way
        # a few roundings to bf16 on the way
        assert (gradient - fine[name]).abs().max() <= 2**-6 * fine[name].abs().max(), name


@served
def test_a_compiled_step_is_the_step(backend: str) -> None:
    """Backbone and loss in one graph, and one for batches, normalizers and betas of every size."""
    torch.compiler.reset()
    policy, plain, anchor = SmallLM(), SmallLM(), SmallLM(seed=1)
    compiled = torch.compile(policy.loss, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for sequences in (2, 3, 5, 8, 9, 17):
            given = batch(sequences)
            options = {"normalizer": 1.0 * sequences, "beta": 0.1 * sequences, "backend": backend}
            for module, loss in ((policy, compiled), (plain, plain.loss)):
                module.zero_grad()
                loss(given, anchor.logprobs(given), **options).backward()
            torch.testing.assert_close(gradients(policy), gradients(plain), rtol=1e-5, atol=1e-7)


@served
@pytest.mark.parametrize("kl", ["reward", "k2", "k3", "reverse"])
@pytest.mark.parametrize("form", ["logits", "linear"])
def test_a_beta_that_a_trace_cannot_look_at(form: str, kl: Any, backend: str) -> None:
    """One graph for all; with a beta of 0 that of no KL, which may be infinite."""
    given = arguments(form, B, T)
    if kl != "reverse":
        given = {k: v for k, v in given.items() if not k.startswith("anchor")}
        given["anchor_logprobs"] = -torch.rand(B, T)

    def loss(beta: Tensor | float, given: dict[str, Any]) -> Tensor:
        found: Tensor = loss_of(given, beta=beta, kl=kl, backend=backend).loss
        return found

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaf = given["logits" if form == "logits" else "hidden"]
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for beta in (0.1, 0.7, 0.0):
            if beta == 0 and kl != "reverse":
                given["anchor_logprobs"][0, 0] = -torch.inf
            found, expected = compiled(torch.tensor(beta), given), loss(beta, given)
            torch.testing.assert_close(found, expected)
            slopes = [torch.autograd.grad(x, leaf)[0] for x in (found, expected)]
            torch.testing.assert_close(*slopes)


@served
def test_logits_of_every_size_have_one_graph(backend: str) -> None:
    def loss(logits: Tensor, ids: Tensor, advantages: Tensor, beta: float) -> Tensor:
        of_loss = warp_fast.warp_loss(
            logits, ids, advantages, anchor_logits=logits, beta=beta, backend=backend
        )
        logprobs = warp_fast.token_logprobs(logits, ids, backend=backend)
        total: Tensor = of_loss.loss + logprobs.sum()
        return total

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for tokens in range(3, 10):
            given = torch.randn(tokens % 4 + 2, tokens, 7, requires_grad=True)
            rest = torch.randint(0, 7, given.shape[:2]), torch.randn(len(given)), 0.1 * tokens
            torch.testing.assert_close(compiled(given, *rest), loss(given, *rest))


@served
@pytest.mark.parametrize("form", ["logits", "linear"])
def test_vmap_is_a_loop(form: str, backend: str) -> None:
    given = {k: v.detach() for k, v in arguments(form, B, T).items()}
    name = "logits" if form == "logits" else "hidden"
    many = torch.randn(3, *given[name].shape)

    def loss(states: Tensor) -> Tensor:
        found: Tensor = loss_of({**given, name: states}, backend=backend).loss
        return found

    torch.testing.assert_close(torch.func.vmap(loss)(many), torch.stack([loss(x) for x in many]))


@served
@pytest.mark.parametrize("form", ["logits", "linear"])
def test_other_derivatives_are_refused(form: str, backend: str) -> None:
    """Rather than given as 0, which torch.library does for what an op does not define."""
    given = arguments(form, B, T)
    name = "logits" if form == "logits" else "hidden"

    def loss(states: Tensor) -> Tensor:
        found: Tensor = loss_of({**given, name: states}, backend=backend).loss
        return found

    (slope,) = torch.autograd.grad(loss(given[name]), given[name], create_graph=True)
    with pytest.raises(NotImplementedError, match="a first derivative alone"):
        slope.square().sum().backward()
    states = given[name].detach()
    with pytest.raises(NotImplementedError, match=f"{name} must have no tangent"):
        torch.func.jvp(loss, (states,), (states,))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(loss)(states)
