"""The loss as a function of per-token statistics: one line of math per `kl`, on [N] vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from warp_fast import _loss_checks as checks
from warp_fast._define import define
from warp_fast._loss_checks import EXACT, Terms
from warp_fast.reference import loss as reference
from warp_fast.reference.loss import Stats

# the coefficient of a token depends on the other tokens of its sequence
COUPLED = ("reward", "reward_to_go")

# an op, since torch.compile has no segment_reduce
SEQUENCE_SUMS = define(
    "sequence_sums",
    "(Tensor values, Tensor sequence, SymInt count) -> Tensor",
    reference.sequence_sums_reference,
    lambda values, _, count: values.new_empty(count),
)
# an op, since the number of its steps would tie a trace to a range of sizes
SUMS_TO_GO = define(
    "sums_to_go",
    "(Tensor values, Tensor sequence, SymInt longest) -> Tensor",
    reference.sums_to_go_reference,
    lambda values, *_: torch.empty_like(values),
)


@dataclass(frozen=True)
class Tokens:
    """N tokens of B sequences, padded or packed, as flat vectors.

    Attributes:
        shape: of token_ids as given; [B, T] or [N].
        token_ids: [N] int64, 0 where masked.
        mask: [N] bool.
        sequence: [N] int64, the sequence of each token.
        count: B.
        longest: no sequence has more tokens; T or N.
        on_host: mask and sequence on the CPU, where the caller had them there.
    """

    shape: torch.Size
    token_ids: Tensor
    mask: Tensor
    sequence: Tensor
    count: int
    longest: int
    on_host: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def of(
        token_ids: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        shape: torch.Size,
        device: torch.device,
        name: str,
    ) -> Tokens:
        """Read the layout; raises ValueError or TypeError on what does not fit."""
        checks.token_ids(token_ids, shape, device, name)
        checks.layout(shape, mask, cu_seqlens, device, name)
        given = [x.device for x in (mask, cu_seqlens) if x is not None]
        source = given[0] if given else device
        index = torch.arange(token_ids.numel(), device=source)
        if cu_seqlens is None:
            sequence, count = index // max(1, shape[1]), shape[0]
        else:
            ends = cu_seqlens[1:].long()
            sequence, count = torch.searchsorted(ends, index, right=True), len(ends)
        if mask is None:
            kept = torch.ones_like(index, dtype=torch.bool)
        else:
            kept = mask.reshape(-1) != 0
        if cu_seqlens is not None:  # nobody asks a GPU whether they end at N
            kept, sequence = kept & (index < cu_seqlens[-1]), sequence.clamp(max=max(0, count - 1))
        on_host = (kept, sequence) if source.type == "cpu" else None
        kept, sequence = (checks.sent(x, device) for x in (kept, sequence))
        ids = torch.where(kept, token_ids.reshape(-1).long(), 0)
        return Tokens(shape, ids, kept, sequence, count, shape[-1], on_host)

    def at(self, part: slice | Tensor) -> Tokens:
        """Some of the rows, in their order."""
        ids, mask, sequence = self.token_ids[part], self.mask[part], self.sequence[part]
        return Tokens(ids.shape, ids, mask, sequence, self.count, self.longest)

    def total(self, values: Tensor) -> Tensor:
        """[N]: the sum over the sequence of each token."""
        sums: Tensor = SEQUENCE_SUMS(values, self.sequence, self.count)
        return sums[self.sequence]

    def to_go(self, values: Tensor) -> Tensor:
        """[N]: the sum from each token to the end of its sequence."""
        found: Tensor = SUMS_TO_GO(values, self.sequence, self.longest)
        return found


def objective(tokens: Tokens, stats: Stats, terms: Terms) -> Tensor:
    """Z times the loss of `warp_fast.warp_loss`."""
    logp = stats.logprobs
    difference = (logp - stats.anchor_logprobs).detach()
    total = -_gain(logp, _coefficients(tokens, difference, terms), terms)
    if terms.kl not in COUPLED:
        if isinstance(terms.beta, Tensor):  # nor a derivative of what may be infinite
            stats = Stats(*[torch.where(terms.beta == 0, 0, values) for values in stats])
        total = total + _penalty(terms, divergence(stats, terms.kl))
    return torch.where(tokens.mask, total, 0).sum()


def slopes(tokens: Tokens, stats: Stats, terms: Terms) -> Tensor:
    """[N, 3]: the derivatives of `objective` in logprobs, entropy and kl, 0 where masked."""
    logp = stats.logprobs
    difference = logp - stats.anchor_logprobs
    of_logp = -_gain_slope(logp, _coefficients(tokens, difference, terms), terms)
    if terms.kl == "k2":
        of_logp = of_logp + _penalty(terms, difference)
    elif terms.kl == "k3":
        of_logp = of_logp - _penalty(terms, torch.expm1(-difference))
    of_kl = torch.zeros_like(logp)
    if terms.kl in EXACT:
        of_kl = of_kl + terms.beta
    found = torch.stack([of_logp, torch.zeros_like(logp), of_kl], dim=1)
    return torch.where(tokens.mask[:, None], found, 0)


def slopes_ahead(tokens: Tokens, terms: Terms, dtype: torch.dtype) -> Tensor | None:
    """`slopes` in `dtype`, if they depend on no statistic."""
    if terms.kl not in ("none", *EXACT) or terms.old_logprobs is not None:
        return None
    nothing = terms.advantages.new_zeros(len(tokens.mask), dtype=dtype)
    return slopes(tokens, Stats(*[nothing] * 4), terms)


def exact_kl_of(kl: str) -> str:
    """The KL over the vocabulary that the statistics must hold, or ""."""
    return kl if kl in EXACT else ""


def with_given_anchor(stats: Stats, terms: Terms) -> Stats:
    """The statistics with the log-probs of the anchor that the caller gave, if any."""
    if terms.anchor_logprobs is None:
        return stats
    return stats._replace(anchor_logprobs=terms.anchor_logprobs.to(stats.logprobs.dtype))


def divergence(stats: Stats, kl: str) -> Tensor:
    """The estimate of the KL per token that `kl` names."""
    if kl in EXACT:
        return stats.kl
    difference = stats.logprobs - stats.anchor_logprobs
    if kl == "k2":
        return difference.square() / 2
    if kl == "k3":
        return torch.expm1(-difference) + difference
    return difference if kl in COUPLED else torch.zeros_like(difference)


def normalizer_of(
    tokens: Tokens, given: str | float | Tensor, dtype: torch.dtype
) -> Tensor | float:
    """Z; 1 in the place of 0, for a batch without tokens.

    Numbers stay numbers: a trace would be tied to the value of one that is made a tensor.
    """
    if isinstance(given, Tensor):
        return torch.where(tokens.mask.any(), given.detach().to(dtype), 1)
    if given == "token":
        return tokens.mask.sum().clamp(min=1).to(dtype)
    if given == "sequence":
        return max(1, tokens.count)
    return float(given) or 1.0


def _coefficients(tokens: Tokens, difference: Tensor, terms: Terms) -> Tensor:
    """[N]: c, the advantage with the KL of the reward in it."""
    found = terms.advantages.to(difference.dtype)
    if terms.kl == "reward":
        found = found - _penalty(terms, tokens.total(difference))
    elif terms.kl == "reward_to_go":
        found = found - _penalty(terms, tokens.to_go(difference))
    return torch.where(tokens.mask, found, 0)


def _penalty(terms: Terms, estimate: Tensor) -> Tensor:
    """beta times it; with a beta of 0 the KL is only watched, and may be infinite."""
    if isinstance(terms.beta, Tensor):
        return torch.where(terms.beta == 0, 0, terms.beta * estimate)
    return torch.zeros_like(estimate) if terms.beta == 0 else terms.beta * estimate


def _free_and_clipped(logp: Tensor, coefficients: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """r c where the ratio r counts as it is, and the clipped r c where it does not; 0 elsewhere.

    The derivative of the first in log pi is itself.
    """
    assert terms.old_logprobs is not None
    log_ratio = logp - terms.old_logprobs.to(logp.dtype)
    bounded, cut = torch.zeros_like(coefficients), coefficients == 0
    if terms.clip_range is not None:
        low, high = terms.clip_range
        ratio = log_ratio.detach().exp()
        bounded = torch.where(cut, 0, ratio.clamp(1 - low, 1 + high) * coefficients)
        cut = cut | (ratio * coefficients > bounded)
    # a ratio that is infinite must meet no 0, neither a coefficient nor a gradient
    free = torch.where(cut, 0, log_ratio).exp() * coefficients
    return torch.where(cut, 0, free), torch.where(cut, bounded, 0)


def _gain(logp: Tensor, coefficients: Tensor, terms: Terms) -> Tensor:
    """What the policy gradient ascends: c log pi, or the (clipped) importance ratio times c."""
    if terms.old_logprobs is None:
        # a log-prob of -inf must meet no 0
        return coefficients * torch.where(coefficients == 0, 0, logp)
    free, clipped = _free_and_clipped(logp, coefficients, terms)
    return free + clipped


def _gain_slope(logp: Tensor, coefficients: Tensor, terms: Terms) -> Tensor:
    """The derivative of `_gain` in log pi: 0 where the ratio is clipped."""
    if terms.old_logprobs is None:
        return coefficients
    return _free_and_clipped(logp, coefficients, terms)[0]
