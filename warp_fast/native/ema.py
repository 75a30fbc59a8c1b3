"""The EMA update of warp_fast._C, on CPU and on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from warp_fast import _table
from warp_fast._table import FULL, SPLIT, STOCHASTIC
from warp_fast.native._addresses import addresses, codes, extension, sizes
from warp_fast.reference.ema import random_key

_tables = _table.TableCache()


def ema_update_cpp_(
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
    """ema <- ema + rate * (params - ema), in place; see `warp_fast.ema_update_`.

    Strided tensors go through a copy.
    """
    written = [tensor.contiguous() for tensor in [*ema, *residual]]
    averages, remainders = written[: len(ema)], written[len(ema) :]
    values = [tensor.contiguous() for tensor in params]
    extension().ema_update(
        addresses(averages),
        addresses(values),
        addresses(remainders),
        sizes(averages),
        codes(averages),
        codes(values),
        first_index,
        SPLIT if residual else STOCHASTIC if stochastic else FULL,
        rate if device_rate is None else device_rate.item(),
        *random_key(seed, step),
        torch.get_num_threads(),
    )
    _table.copied_back([*ema, *residual], written)


def ema_update_cuda_(
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
    """ema <- ema + rate * (params - ema), in place; see `warp_fast.ema_update_`.

    One launch per combination of dtypes and alignment; strided tensors go through a copy.
    """
    module = extension()
    written = [tensor.contiguous() for tensor in [*ema, *residual]]
    averages, remainders = written[: len(ema)], written[len(ema) :]
    columns = [averages, [x.contiguous() for x in params]] + ([remainders] if residual else [])
    with _table.on_device(ema[0]):
        for launch in _table.ema_launches(_tables, columns, module.EMA_BLOCK, first_index):
            module.ema_update_cuda(
                launch.table.data_ptr(),
                launch.block_entry.data_ptr(),
                launch.block_entry.numel(),
                SPLIT if residual else STOCHASTIC if stochastic else FULL,
                launch.codes[0],
                launch.codes[1],
                launch.aligned,
                rate,
                0 if device_rate is None else device_rate.data_ptr(),
                _table.CODE[torch.float64 if device_rate is None else device_rate.dtype],
                *random_key(seed, step),
                torch.cuda.current_stream().cuda_stream,
            )
    _table.copied_back([*ema, *residual], written)
