"""SLERP in warp_fast._C: both passes on CPU and on CUDA, and the solve between them on CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from warp_fast import _table
from warp_fast._backend import MISSING
from warp_fast.native._addresses import addresses, codes, extension, sizes

_HUGE = 8 << 20  # bytes; less has no use for pages of 2 MiB
_tables = _table.TableCache()


def _by_tensor(columns: list[list[Tensor]]) -> list[Tensor]:
    """All columns of the first tensor, then all of the second, and so on."""
    return [tensor for row in zip(*columns, strict=True) for tensor in row]


def fresh_like(tensor: Tensor) -> Tensor:
    """torch.empty_like, in huge pages where it is large and the extension is there."""
    new = torch.empty_like(tensor)
    # a traced, fake or sharded tensor has no memory of its own
    real = not torch.compiler.is_compiling() and type(new) is Tensor
    if real and new.is_cpu and new.nbytes >= _HUGE and MISSING["cpp"] is None:
        extension().advise_huge_pages(new.data_ptr(), new.nbytes)
    return new


def gram_cpp(init: list[Tensor], policies: list[Tensor], segment: list[int], count: int) -> Tensor:
    """G[s, i, j] = sum over the tensors of segment s of <delta_i, delta_j>; see `gram_reference`.

    Summed over chunks of fixed size in a fixed order, whatever the number of threads.
    """
    runs = len(policies) // len(init)
    gram = torch.zeros(count, runs, runs, dtype=torch.float64)
    listed = _by_tensor(_table.by_column([*init, *policies], len(init)))
    extension().gram(
        addresses(listed),
        codes(listed),
        sizes(init),
        segment,
        runs,
        gram.data_ptr(),
        torch.get_num_threads(),
    )
    return gram


def slerp_coefficients_cpp(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of slerp_M, and where the linear rule was taken; see the reference.

    Shapes: gram [S, M, M] fp64. Returns [S, M] fp64 and [S] bool.
    """
    segments, policies = gram.shape[:2]
    gram = gram.contiguous()
    coefficients = gram.new_empty((segments, policies))
    linear = gram.new_empty(segments, dtype=torch.bool)
    extension().slerp_coefficients(
        gram.data_ptr(), segments, policies, coefficients.data_ptr(), linear.data_ptr()
    )
    return coefficients, linear


def slerp_apply_cpp_(
    out: list[Tensor],
    init: list[Tensor],
    policies: list[Tensor],
    coefficients: Tensor,
    segment: list[int],
) -> None:
    """out_k = init + sum_m coefficients[k, s, m] * (policy_m - init); see the reference.

    Strided outputs go through a copy. Large outputs are written around the cache.
    """
    written = [tensor.contiguous() for tensor in out]
    listed = _by_tensor(_table.by_column([*init, *policies, *written], len(init)))
    weights = coefficients.double().contiguous()
    rows, segments, runs = weights.shape
    extension().slerp_apply(
        addresses(listed),
        codes(listed),
        sizes(init),
        segment,
        runs,
        rows,
        segments,
        weights.data_ptr(),
        torch.get_num_threads(),
    )
    _table.copied_back(out, written)


def gram_cuda(init: list[Tensor], policies: list[Tensor], segment: list[int], count: int) -> Tensor:
    """G[s, i, j] = sum over the tensors of segment s of <delta_i, delta_j>; see `gram_reference`.

    One launch per combination of dtypes and alignment, and one that sums the chunks.
    """
    module = extension()
    runs = len(policies) // len(init)
    columns = _table.by_column([*init, *policies], len(init))

    def build() -> tuple[list[_table.Launch], Tensor, int]:
        return _table.gram_launches(columns, module.GRAM_CHUNK, segment, count)

    with _table.on_device(init[0]):
        launches, bounds, rows = _tables.get(columns, (tuple(segment), count), build)
        partial = init[0].new_empty((rows, runs * (runs + 1) // 2), dtype=torch.float64)
        gram = init[0].new_empty((count, runs, runs), dtype=torch.float64)
        stream = torch.cuda.current_stream().cuda_stream
        for launch in launches:
            module.gram_cuda(
                launch.table.data_ptr(),
                launch.block_entry.data_ptr(),
                launch.block_entry.numel(),
                runs,
                _table.packed(launch.codes),
                launch.aligned,
                partial.data_ptr(),
                stream,
            )
        module.gram_sum_cuda(
            partial.data_ptr(), bounds.data_ptr(), gram.data_ptr(), count, runs, stream
        )
    return gram


def slerp_apply_cuda_(
    out: list[Tensor],
    init: list[Tensor],
    policies: list[Tensor],
    coefficients: Tensor,
    segment: list[int],
) -> None:
    """out_k = init + sum_m coefficients[k, s, m] * (policy_m - init); see the reference.

    One launch per combination of dtypes and alignment. Rows whose outputs differ in dtype take a
    pass each; strided outputs go through a copy.
    """
    module = extension()
    written = [tensor.contiguous() for tensor in out]
    read = _table.by_column([*init, *policies], len(init))
    results = _table.by_column(written, len(init))
    with _table.on_device(init[0]):
        passes = _table.apply_launches(_tables, read, results, module.APPLY_BLOCK, segment)
        weights = coefficients.to(init[0].device, torch.float64)
        for rows, launches in passes:
            _apply_cuda(launches, _table.chosen(weights, rows))
    _table.copied_back(out, written)


def _apply_cuda(launches: list[_table.Launch], weights: Tensor) -> None:
    rows, segments, runs = weights.shape
    for launch in launches:
        extension().slerp_apply_cuda(
            launch.table.data_ptr(),
            launch.block_entry.data_ptr(),
            launch.block_entry.numel(),
            runs,
            rows,
            segments,
            _table.packed(launch.codes[: 1 + runs]),
            launch.codes[1 + runs],
            launch.aligned,
            weights.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
