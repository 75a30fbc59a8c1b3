"""The EMA update in plain PyTorch: three storages, one formula."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_NAN = 0x7FC00000  # the one NaN that is stored: rounding could carry other payloads into inf or 0
_CHUNK = 1 << 22  # elements rounded at a time: bounds the int64 scratch of the random bits


def join_float32(high: Tensor, residual: Tensor) -> Tensor:
    """The fp32 values held by split storage: bits = (high << 16) + sign-extended residual."""
    bits = (high.view(torch.int16).to(torch.int32) << 16) + residual.to(torch.int32)
    return bits.view(torch.float32)


def split_float32(value: Tensor) -> tuple[Tensor, Tensor]:
    """Split fp32 into (bf16 high, int16 residual) without loss; high is rounded to nearest.

    Every NaN becomes the one whose high half is NaN too.
    """
    bits = torch.where(value.isnan(), _NAN, value.contiguous().view(torch.int32))
    high = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return high, bits.to(torch.int16)


def interpolate(start: Tensor, end: Tensor, rate: float | Tensor) -> Tensor:
    """start + rate * (end - start), in the form that is exact at rate 0 and at rate 1."""
    rate = torch.as_tensor(rate, dtype=start.dtype, device=start.device)
    early = rate < 0.5
    moved = torch.where(early, start, end) + torch.where(early, rate, rate - 1) * (end - start)
    return torch.where(rate < 1, moved, end)  # at rate 1 even where the difference is infinite


def random_key(seed: int, step: int) -> tuple[int, int]:
    """Two 32-bit keys from (seed, step), by splitmix64."""
    word = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) & _MASK64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK64
    word ^= word >> 31
    return word & _MASK32, word >> 32


def random_bits16(index: Tensor, seed: int, step: int) -> Tensor:
    """16 uniform bits for each global element index (int64): a keyed 32-bit integer hash."""
    key_in, key_out = random_key(seed, step)
    word = ((index & _MASK32) ^ key_in) + (index >> 32) * 0x9E3779B9 & _MASK32
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & _MASK32
    word = ((word ^ (word >> 15)) * 0x735A2D97) & _MASK32
    word ^= word >> 15
    return (word ^ key_out) >> 16


def round_stochastic(value: Tensor, first_index: int, seed: int, step: int) -> Tensor:
    """Round flat fp32 to bf16 up or down with probability equal to the distance; unbiased."""
    index = torch.arange(first_index, first_index + value.numel(), device=value.device)
    bits = value.view(torch.int32).to(torch.int64) & _MASK32
    rounded = torch.where(value.isfinite(), bits + random_bits16(index, seed, step), bits)
    rounded = torch.where(value.isnan(), _NAN, rounded) >> 16
    return rounded.to(torch.int16).view(torch.bfloat16)


def _update_stochastic_(
    ema: Tensor, params: Tensor, rate: float | Tensor, seed: int, step: int, first_index: int
) -> None:
    flat = ema.reshape(-1)
    values = params.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK]
        moved = interpolate(piece.float(), values[start : start + _CHUNK].float(), rate)
        piece.copy_(round_stochastic(moved, first_index + start, seed, step))
    if flat.data_ptr() != ema.data_ptr():
        ema.copy_(flat.view(ema.shape))


def ema_update_reference_(
    ema: list[Tensor],
    params: list[Tensor],
    residual: list[Tensor],
    rate: float,
    device_rate: Tensor | None,
    stochastic: bool,
    seed: int,
    step: int,
    first_index: list[int],
) -> None:
    """ema <- ema + rate * (params - ema), in place; see `warp_fast.ema_update_`."""
    weight = rate if device_rate is None else device_rate
    for i, (average, value) in enumerate(zip(ema, params, strict=True)):
        if residual:
            moved = interpolate(join_float32(average, residual[i]), value.float(), weight)
            high, low = split_float32(moved)
            average.copy_(high)
            residual[i].copy_(low)
        elif stochastic:
            _update_stochastic_(average, value, weight, seed, step, first_index[i])
        else:
            average.copy_(interpolate(average, value.to(average.dtype), weight))
