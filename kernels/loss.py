"""The statistics of sampled tokens and their gradient in Triton, from rows of logits.

Each row is cut into pieces of a fixed length, one program each: a few rows of a large vocabulary
use the whole GPU, and a row at one alignment gives the same bits in any batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from warp_fast._loss_rows import EXACT_CODES, Found, check_ids, layout, with_unit_stride
from warp_fast._table import CODE, copied_back, on_device
from warp_fast.kernels._rows import (
    FIELDS,
    gradient_kernel,
    row_kernel,
    sums_kernel,
)
from warp_fast.kernels._scale import scale_kernel, scaled_kernel
from warp_fast.reference.loss import compute_dtype

_WARPS = 4
# bytes of an element -> vectors of 8 elements at a time
_VECTORS = {2: 32 * _WARPS, 4: 32 * _WARPS, 8: 16 * _WARPS}
_BLOCK = 2048  # elements that a program scales
_PIECE = 1 << 15  # elements of a program: 8 programs for a row of 256k


class Rows(NamedTuple):
    """What all launches share: logits of policy and anchor, token_ids and kept [N]."""

    logits: Tensor
    anchor: Tensor | None
    token_ids: Tensor
    kept: Tensor
    temperature: float
    softcap: float | None
    exact_kl: str

    @staticmethod
    def of(
        logits: Tensor,
        anchor: Tensor | None,
        token_ids: Tensor,
        kept: Tensor,
        head: tuple[float, float | None, str],
    ) -> Rows:
        """Copy what the kernels cannot address: rows that are not contiguous."""
        return Rows(
            with_unit_stride(logits),
            None if anchor is None else with_unit_stride(anchor),
            token_ids.contiguous(),
            kept.contiguous().view(torch.uint8),
            *head,
        )

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.token_ids), self.logits.shape[-1]

    @property
    def pieces(self) -> int:
        return triton.cdiv(self.logits.shape[-1], _PIECE)

    def arguments(
        self, *out: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[float, float]]:
        """(tensors, run and where rows lie, factors inside and outside the tanh) for the kernels.

        out: matrices of as many rows, whose layout comes after those of policy and anchor.
        """
        anchor = self.logits if self.anchor is None else self.anchor
        cap = 1.0 if self.softcap is None else self.softcap
        return (
            (self.logits, anchor, self.token_ids, self.kept),
            _shared_layout(self.logits, anchor, *out),
            (1.0 / cap, cap / self.temperature),
        )

    def tiles(self, places: tuple[int, ...]) -> dict[str, int]:
        """places: as `arguments` gives them."""
        matrices = [x for x in (self.logits, self.anchor) if x is not None]
        return _tiles(max(x.element_size() for x in matrices), places, self.shape[1])

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "PIECES": self.pieces,
            "SOFTCAP": self.softcap is not None,
            "EXACT": EXACT_CODES[self.exact_kl],
            "WIDE": dtype == torch.float64,
            # a score must be the same number in every kernel
            "enable_fp_fusion": False,
        }


def _tiles(widest: int, places: tuple[int, ...], size: int) -> dict[str, int]:
    """widest: bytes of the largest element."""
    # as the 16 that triton looks for; a vocabulary is often padded to a multiple of 8
    in_eights = all(number % 8 == 0 for number in (*places[1:], size))
    return {
        "PIECE": _PIECE,
        "VECTORS": _VECTORS[widest],
        "EIGHTS": in_eights,
        "num_warps": _WARPS,
    }


def _shared_layout(*matrices: Tensor) -> tuple[int, ...]:
    """The run that the matrices share, then stride and jump of each."""
    layouts = [layout(x) for x in matrices]
    # in a matrix of two dimensions the jump is 0 and any run will do
    run = max(run for _, run, _ in layouts)
    return run, *[number for stride, _, jump in layouts for number in (stride, jump)]


class Odds(NamedTuple):
    """The gradient of the log-prob of row n is factors[n] * values[n].

    values: [N, V], p_v / p_token times the slope of the score; in the column of the token
        -(1 - p_token) / p_token times it. They need no normalizer, so that the pass over the logits
        that finds it can write them.
    factors: [N], -p_token; 0 in a row that is not kept.
    """

    values: Tensor
    factors: Tensor


def row_statistics(rows: Rows, out: Found, entropy: bool, odds: Odds | None = None) -> None:
    """Write the statistics and the state of each kept row, 0 for the others, and the odds."""
    count, size = rows.shape
    if not count:
        return
    tensors, places, factors = rows.arguments()
    sums = out.logprobs.new_empty((count, rows.pieces, FIELDS.value))
    constants = rows.constants(out.logprobs.dtype)
    constants |= {"ANCHOR": rows.anchor is not None, "ENTROPY": entropy}
    constants |= {"ODDS": -1 if odds is None else CODE[odds.values.dtype]}
    made = (sums, sums) if odds is None else odds
    with on_device(rows.logits):
        sums_kernel[(count * rows.pieces,)](
            *tensors, sums, made[0], *places, size, *factors, **rows.tiles(places), **constants
        )
        row_kernel[(count,)](
            *tensors,
            sums,
            *out,
            *made,
            *places,
            size,
            *factors,
            PADDED=triton.next_power_of_2(rows.pieces),
            num_warps=1,
            **constants,
        )
    if odds is not None:
        # rows whose odds do not fit, and 0 in those of NaN, which may turn out to have no gradient;
        # asking whether there are any would wait for the GPU
        far = torch.where(odds.factors > 0, 1, torch.where(odds.factors.isnan(), 0, 2))
        of_logprobs = out.logprobs.new_zeros((count, 3))
        of_logprobs[:, 0] = 1
        far_rows = rows._replace(kept=far.to(torch.uint8))
        row_gradient(far_rows, out.state, of_logprobs, odds.values)


def row_gradient(rows: Rows, state: Tensor, upstream: Tensor, out: Tensor) -> None:
    """Write dlogits to `out`, which may be the logits themselves: 0 in rows that are not kept."""
    count, size = rows.shape
    if not count:
        return
    tensors, places, factors = rows.arguments(out)
    with on_device(rows.logits):
        gradient_kernel[(count * rows.pieces,)](
            upstream,
            *tensors,
            state,
            out,
            *places,
            size,
            *factors,
            CODE=CODE[out.dtype],
            **rows.tiles(places),
            **rows.constants(upstream.dtype),
        )


def check_on_host(token_ids: Tensor, kept: Tensor, vocabulary: int) -> None:
    """Refuse ids outside the vocabulary where that waits for no GPU; there they give NaN."""
    if not token_ids.is_cuda:
        check_ids(token_ids, kept.nonzero()[:, 0], vocabulary)


def token_stats_triton(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    anchor_logits: Tensor | None,
    temperature: float,
    softcap: float | None,
    exact_kl: str,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`token_stats_reference` and the state for the gradient, without waiting for the GPU.

    Traffic: reads each kept row of both once.
    """
    check_on_host(token_ids, mask, logits.shape[-1])
    out = Found.empty(logits, len(token_ids), compute_dtype(logits, anchor_logits))
    head = (temperature, softcap, exact_kl)
    row_statistics(Rows.of(logits, anchor_logits, token_ids, mask, head), out, entropy)
    return out


def token_stats_backward_triton(
    upstream: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    anchor_logits: Tensor | None,
    temperature: float,
    softcap: float | None,
    exact_kl: str,
    state: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`token_stats_backward_reference`, without waiting for the GPU.

    state: as the forward pass found it, with entropy if that has a gradient; else found again.
    Traffic: reads logits (and for an exact KL the anchor) and writes as much, once; of a row whose
        upstream is 0 only the writing.
    """
    dlogits = torch.empty_like(logits) if out is None else out
    written = with_unit_stride(dlogits)
    anchor = anchor_logits if exact_kl else None
    head, kept = (temperature, softcap, exact_kl), (upstream != 0).any(1)
    if state is None:
        state = token_stats_triton(logits, token_ids, kept, anchor, *head, True)[4]
    rows = Rows.of(logits, anchor, token_ids, kept, head)
    row_gradient(rows, state.contiguous(), upstream.contiguous(), written)
    copied_back([dlogits], [written])
    return dlogits


def scaled_triton(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """values * factor, a number on the device, rounded once to dtype.

    Traffic: reads values and writes the result, once.
    """
    values = values.contiguous()
    out, size = torch.empty_like(values, dtype=dtype), values.numel()
    if size:
        with on_device(values):
            scaled_kernel[(triton.cdiv(size, _BLOCK),)](
                values,
                out,
                factor,
                size,
                CODE=CODE[dtype],
                BLOCK=_BLOCK,
                num_warps=_WARPS,
                enable_fp_fusion=False,
            )
    return out


def scale_triton_(values: Tensor, factor: Tensor) -> None:
    """values *= factor, rows of them, in place, without waiting for the GPU.

    Traffic: none where the factor is 1, else reads and writes the values.
    """
    count, size = values.shape[:-1].numel(), values.shape[-1]
    rows = with_unit_stride(values)
    pieces, places = triton.cdiv(size, _PIECE), _shared_layout(rows)
    if count:
        with on_device(values):
            scale_kernel[(count * pieces,)](
                rows,
                factor,
                *places,
                size,
                PIECES=pieces,
                CODE=CODE[rows.dtype],
                enable_fp_fusion=False,
                **_tiles(rows.element_size(), places, size),
            )
    copied_back([values], [rows])
