"""The C++ loss kernels where they have a risk of their own: exp, tanh, blocks, tiles, threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import warp_fast
from tests.tolerances import assert_close, largest
from warp_fast._backend import MISSING
from warp_fast.native import _tiles
from warp_fast.native import linear_loss as linear
from warp_fast.native import loss as native
from warp_fast.reference.linear_loss import Heads

pytestmark = pytest.mark.skipif(MISSING["cpp"] is not None, reason=str(MISSING["cpp"]))
FP32, FP64 = torch.float32, torch.float64
KL: list[Any] = ["reward", "reverse", "forward"]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def ulps(found: Tensor, gold: Tensor) -> float:
    """Largest error in units of the last place of the fp32 numbers nearest to gold."""
    near = gold.float().abs()
    unit = torch.nextafter(near, torch.tensor(torch.inf)).double() - near.double()
    return largest((found.double() - gold) / unit)


def probability_beside_0(x: Tensor) -> Tensor:
    """The gradient of a token is minus its probability, e / (1 + e)."""
    logits = torch.stack([torch.zeros_like(x), x], 1).requires_grad_()
    first = torch.zeros(len(x), dtype=torch.long)
    logp = warp_fast.token_logprobs(logits, first, backend="cpp")
    return -torch.autograd.grad(logp.sum(), logits)[0][:, 1]


@pytest.mark.parametrize("low, high", [(-87, 0), (-1, 0), (-1e-3, 0), (-87, -86)])
def test_exp_is_good_to_2_ulp(low: float, high: float) -> None:
    """And one for the rounding of the probability."""
    x = torch.linspace(low, high, 200_001)
    assert ulps(probability_beside_0(x), torch.sigmoid(x.double())) <= 3


def test_exp_below_the_normal_numbers_is_0() -> None:
    x = torch.cat([torch.linspace(-120, -87.01, 1001), torch.tensor([-1e4, -3e38, -torch.inf])])
    assert not probability_beside_0(x).any()


@pytest.mark.parametrize("low, high", [(1e-6, 1e-3), (1e-3, 1), (0.5, 0.75), (1, 20)])
@pytest.mark.parametrize("sign", [1, -1])
def test_tanh_is_good_to_3_ulp(sign: int, low: float, high: float) -> None:
    """A cold softcap of 1 beside a 0: the log-probability of the lesser is minus the score."""
    x = torch.linspace(low, high, 200_001) * sign
    logits = torch.stack([x, torch.zeros_like(x)], 1)
    lesser = torch.full((len(x),), int(sign > 0))
    cold = 2.0**-30
    logp = warp_fast.token_logprobs(logits, lesser, softcap=1, temperature=cold, backend="cpp")
    assert ulps(-logp, x.double().tanh().abs() / cold) <= 3


def outputs(form: str, kl: Any, leaves: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Per-token values and the gradients of all of them together."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    function: Any = warp_fast.warp_loss if form == "logits" else warp_fast.linear_warp_loss
    names = ["logits"] if form == "logits" else ["hidden", "weight"]
    anchor = {f"anchor_{k}": v.detach() * 0.9 for k, v in zip(names, leaves, strict=True)}
    rows, vocabulary = len(leaves[0]), leaves[-1].shape[1 if form == "logits" else 0]
    result = function(
        *leaves, torch.arange(rows) * 37 % vocabulary, torch.ones(1), **anchor, kl=kl,
        cu_seqlens=torch.tensor([0, rows]), temperature=0.8, return_entropy=True, **options,
    )  # fmt: skip
    found = {name: value.detach() for name, value in result._asdict().items()}
    total = result.loss + result.entropy.sum() + result.kl.sum()
    gradients = torch.autograd.grad(total, leaves)
    return found | dict(zip(names, gradients, strict=True))


def near_reference(form: str, kl: Any, leaves: list[Tensor], **options: Any) -> None:
    ours = outputs(form, kl, leaves, backend="cpp", **options)
    plain = outputs(form, kl, leaves, backend="reference", **options)
    gold = outputs(form, kl, [x.double() for x in leaves], backend="reference", **options)
    scale = 1 + max(largest(gold[name]) for name in ("loss", "logprobs", "kl"))
    for name, value in ours.items():
        relative = scale if gold[name].dim() < 2 else None
        assert_close(name, value, gold[name], plain[name], relative)


def inputs(form: str, rows: int, vocabulary: int) -> list[Tensor]:
    if form == "logits":
        return [torch.randn(rows, vocabulary) * 3]
    return [torch.randn(rows, 5), torch.randn(vocabulary, 5)]


both = pytest.mark.parametrize("form", ["logits", "linear"])


@both
@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("vocabulary", [1, 7, 15, 511, 512, 513, 1025])
def test_vocabularies_around_the_block(vocabulary: int, kl: Any, form: str) -> None:
    near_reference(form, kl, inputs(form, 6, vocabulary), softcap=5.0)


@both
@pytest.mark.parametrize("kl", KL)
def test_one_row_of_the_vocabulary_of_gemma(kl: Any, form: str) -> None:
    near_reference(form, kl, inputs(form, 1, 256_128))


@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("columns, rows", [(1, 1), (3, 2), (7, 5), (64, 1), (600, 4), (1000, 9)])
def test_tiles_of_any_size(
    monkeypatch: pytest.MonkeyPatch, columns: int, rows: int, kl: Any
) -> None:
    monkeypatch.setattr(_tiles, "_COLUMNS", columns)
    monkeypatch.setattr(_tiles, "_TILE", rows * columns)
    near_reference("linear", kl, inputs("linear", 9, 40 if columns < 10 else 1000))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_a_16_bit_weight_is_summed_in_fp32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Over many pieces of rows: rounded once, at the end."""
    hidden, weight = (x.to(dtype) for x in inputs("linear", 300, 20))
    whole = outputs("linear", "none", [hidden, weight], backend="cpp")
    monkeypatch.setattr(_tiles, "_TILE", 20)
    pieces = outputs("linear", "none", [hidden, weight], backend="cpp")
    torch.testing.assert_close(pieces["weight"], whole["weight"], rtol=2.0**-7, atol=1e-6)
    exact = outputs("linear", "none", [hidden.double(), weight.double()], backend="cpp")
    assert_close("weight", pieces["weight"], exact["weight"], exact["weight"])


@pytest.mark.parametrize("low", [-torch.inf, -1e4, 0])
@pytest.mark.parametrize("where", [0, 511, 512, 1500])
def test_maximum_in_any_block(where: int, low: float) -> None:
    """Sums follow a maximum that rises late, from nothing and from little."""
    logits = torch.randn(2, 1600)
    logits[0, :where] = low
    logits[:, where] = 5
    ids = torch.tensor([where, where])
    found = warp_fast.token_logprobs(logits, ids, return_entropy=True, backend="cpp")
    logp = torch.log_softmax(logits.double(), -1)
    entropy = torch.special.entr(logp.exp()).sum(-1)
    for value, gold in zip(found, (logp[:, where], entropy), strict=True):
        assert_close("value", value, gold, gold, 10)


@both
@pytest.mark.parametrize("kl", KL)
def test_bits_do_not_depend_on_other_rows(kl: Any, form: str, threads: None) -> None:
    leaves = inputs(form, 64, 3000)
    found = outputs(form, kl, leaves, backend="cpp")
    torch.set_num_threads(1)
    expected = outputs(form, kl, leaves, backend="cpp")
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kl", KL)
def test_rows_and_columns_apart_in_memory(kl: Any) -> None:
    logits = torch.randn(12, 1400)
    expected = outputs("logits", kl, [logits[1::2, 100:1100].clone()], backend="cpp")
    for view in (logits[1::2, 100:1100], logits[1::2, 100:1100].T.contiguous().T):
        found = outputs("logits", kl, [view], backend="cpp")
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name


@both
def test_float64_is_the_reference(form: str) -> None:
    leaves = [leaf.double() for leaf in inputs(form, 5, 9)]
    found = outputs(form, "reverse", leaves, backend="cpp")
    for name, value in outputs(form, "reverse", leaves, backend="reference").items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("exact_kl", ["", "reverse", "forward"])
def test_gradient_without_the_state_makes_it(exact_kl: str) -> None:
    logits, anchor, upstream = torch.randn(6, 700), torch.randn(6, 700), torch.randn(6, 3)
    hidden, weight = inputs("linear", 6, 700)
    ids, mask = torch.arange(6), torch.ones(6, dtype=torch.bool)
    head = (1.5, 4.0, exact_kl)
    state = native.token_stats_cpp(logits, ids, mask, anchor, *head, True)[-1]
    arguments = (upstream, logits, ids, anchor, *head)
    given = native.token_stats_backward_cpp(*arguments, state)
    assert torch.equal(native.token_stats_backward_cpp(*arguments), given)
    heads = Heads(hidden, weight, hidden * 0.9, weight, *head[:2])
    state = linear.linear_token_stats_cpp(heads, ids, mask, exact_kl, True)[-1]
    backward: Any = linear.linear_token_stats_backward_cpp
    every = (upstream, heads, ids, exact_kl, (True, True))
    for part, whole in zip(backward(*every), backward(*every, state), strict=True):
        assert torch.equal(part, whole)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("kl", KL)
def test_tokens_of_almost_all_probability_keep_their_digits(kl: Any, softcap: Any) -> None:
    """1 - p is 1e-2 to 1e-6, of which a sum with the sampled token keeps a few digits alone."""
    rows = torch.arange(32)
    ids, logits = torch.randint(0, 20_000, (32,)), torch.randn(32, 20_000)
    logits[rows, ids] = torch.linspace(15, 25, 32)
    anchor = logits + 0.01 * torch.randn_like(logits)
    found = []
    for dtype in (FP64, FP32):
        leaf = logits.to(dtype).requires_grad_()
        backend: Any = "reference" if dtype == FP64 else "cpp"
        options: dict[str, Any] = {"kl": kl, "softcap": softcap, "backend": backend}
        loss = warp_fast.warp_loss(
            leaf[None], ids[None], leaf.new_ones(1), anchor_logits=anchor.to(dtype)[None], **options
        )
        (slope,) = torch.autograd.grad(loss.loss, leaf)
        apart = (loss.logprobs - loss.anchor_logprobs).detach()
        found.append((loss.logprobs.detach(), slope, slope[rows, ids], apart, loss.kl.detach()))
    for gold, ours, allowed in zip(*found, [1e-5, 1e-5, 1e-5, 1e-3, 1e-3], strict=True):
        assert (ours - gold).norm() <= allowed * gold.norm()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["logits", "linear"])
def test_the_default_dtype_of_torch_changes_nothing(form: str, default: torch.dtype) -> None:
    leaves = [leaf.float() for leaf in inputs(form, 9, 40)]
    before = outputs(form, "reverse", leaves)
    torch.set_default_dtype(default)
    try:
        after = outputs(form, "reverse", leaves)
    finally:
        torch.set_default_dtype(FP32)
    for name, value in before.items():
        assert after[name].dtype == value.dtype and torch.equal(after[name], value), name


AT_THE_END_OF_A_PAGE = """
import ctypes, mmap, torch
from warp_fast.native.loss import Head

page = mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page)
state = torch.frombuffer(memory, dtype=torch.float64, offset=page - 192, count=24).view(3, 8)
state.zero_()[:, ::4] = -torch.inf
behind = ctypes.c_void_p(state.data_ptr() + 192)
assert ctypes.CDLL(None).mprotect(behind, ctypes.c_size_t(page), 0) == 0
Head(1.0, None, "").stats(torch.randn(3, 40), None, torch.tensor([1, 2, 3]), state[:, 4:], False)
assert state[:, 4:6].isfinite().all()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page as Linux does")
def test_sums_of_an_anchor_read_nothing_behind_them() -> None:
    """They are the second half of a row; a side behind it would be in another row, or nowhere."""
    done = subprocess.run([sys.executable, "-c", AT_THE_END_OF_A_PAGE], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
