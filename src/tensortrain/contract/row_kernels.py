"""Rows of a TT table by the kernels: from the cores as they are, or from merged ones that lie ready between calls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import log, prod

import torch
from torch import Tensor

from tensortrain.contract.cost import CostModel
from tensortrain.contract.grouped import can_group
from tensortrain.contract.merge import merge_cores, run_numel
from tensortrain.contract.shape import ChainShape
from tensortrain.system.native import library

__all__ = [
    "Groups",
    "bags_of_cores",
    "distinct_ids",
    "kept_groups",
    "kept_rows_s",
    "kernel_rows",
    "merged_shapes",
    "packed_tables",
    "picked_rows_s",
    "range_of",
    "rows_of_cores",
    "rows_of_packed",
    "serve_rows",
]

Groups = tuple[tuple[int, int], ...]
_PLAIN = (Tensor, torch.nn.Parameter)  # subclasses see every operation

_LANES_BYTES = 32  # of a vector: slices are filled up to whole ones
_SMALL_RATE = 1.1  # of the rate of large products that the kernels' small ones reach, with vectors of 64 bytes
_MANY_IDS = 1 << 16
_NODE_S = 2e-8  # to find the digits of one prefix and to start its product
_PICK_S = 1e-9  # to find one row of a table
_SORT_S = 8e-9  # to put one id in its place


# -- which cores are merged -----------------------------------------------------------------------------


def kept_groups(chain: ChainShape, dtype: torch.dtype, max_bytes: int, model: CostModel) -> Groups:
    """The merges for tables that lie ready between calls: least time per row, tables of at most so many bytes."""
    most = min(max_bytes, chain.dense_numel * dtype.itemsize // 2)
    return _best_groups(chain, _MANY_IDS, dtype, most, model)


@lru_cache(maxsize=1024)
def _best_groups(chain: ChainShape, n_ids: int, dtype: torch.dtype, max_bytes: int, model: CostModel) -> Groups:
    best: list[tuple[float, Groups]] = [(0.0, ())]
    for stop in range(1, chain.order + 1):
        found = []
        for start in range(stop):
            if stop - start > 1 and run_numel(chain, start, stop) * dtype.itemsize > max_bytes:
                continue
            if (start, stop) == (0, chain.order) and chain.order > 1:
                continue  # the dense table, which may not be built here
            rows_s = _rows_s(chain, start, stop, n_ids, dtype, model)
            found.append((best[start][0] + rows_s, (*best[start][1], (start, stop))))
        best.append(min(found))
    return best[-1][1]


def _rows_s(chain: ChainShape, start: int, stop: int, n_ids: int, dtype: torch.dtype, model: CostModel) -> float:
    """Multiply the states before a group by its slices, once for every distinct prefix."""
    if start == 0:
        return 0.0
    n = min(n_ids, prod(chain.in_modes[:stop]))
    rank, lead = chain.ranks[start], prod(chain.out_modes[:start])
    width = _whole_lanes(prod(chain.out_modes[start:stop]) * chain.ranks[stop], dtype)
    products = 2.0 * lead * rank * width / (_SMALL_RATE * model.gemm_flops_s * model._dtype_rate(dtype))
    n_bytes = (lead * rank + rank * width) * dtype.itemsize
    return n * (products + n_bytes / model.cache_bandwidth_bytes_s + _NODE_S)


# -- predicted times ------------------------------------------------------------------------------------


def distinct_ids(n_ids: int, n_rows: int) -> int:
    """About how many of so many ids differ where the k-th row is asked for with probability 1/k, as words of a text."""
    harmonic = log(n_rows) + 0.58
    surely = n_ids / harmonic  # rows up to here are met about once or more often
    rest = log(max(1.0, n_rows / max(surely, 1.0)))
    return max(1, min(n_ids, n_rows, round(surely * (1 + rest))))


def picked_rows_s(n_ids: int, row_bytes: int, model: CostModel) -> float:
    """Copy rows of a dense table, which lie all over it; without the call."""
    n_bytes = 2.0 * n_ids * row_bytes
    rate = model.cache_bandwidth_bytes_s if n_bytes <= 4 * model.cache_bytes else model.bandwidth_bytes_s
    return n_ids * _PICK_S + n_bytes / rate


def kept_rows_s(chain: ChainShape, groups: Groups, n_ids: int, dtype: torch.dtype, model: CostModel) -> float:
    """Rows by the kernels, from merged cores that lie ready; without the call."""
    seconds = n_ids * _SORT_S + picked_rows_s(n_ids, chain.out_features * dtype.itemsize, model)
    for start, stop in groups:
        n_prefixes = prod(chain.in_modes[:stop])
        seconds += _rows_s(chain, start, stop, distinct_ids(n_ids, n_prefixes), dtype, model)
    return seconds


def _whole_lanes(n: int, dtype: torch.dtype) -> int:
    lanes = max(1, _LANES_BYTES // dtype.itemsize)
    return -(-n // lanes) * lanes


# -- rows -----------------------------------------------------------------------------------------------


def range_of(ids: Tensor) -> tuple[int, int] | None:
    """Least and greatest id in one pass; ``None`` where the kernels do not read them."""
    kernels = library()
    found: tuple[int, int] | None = None if kernels is None else kernels.range_of_ids(ids)
    return found


def kernel_rows(ids: Tensor, cores: Sequence[Tensor], chain: ChainShape, max_bytes: int) -> Tensor | None:
    """Rows of known ids, differentiable in the cores; ``None`` where the kernels do not serve them.

    Nothing is merged: common leading digits are multiplied once, and slices that no id asks for are not looked at.
    """
    return rows_of_cores(ids, cores, max_bytes) if serve_rows(ids, cores[0]) and chain.order > 1 else None


def rows_of_cores(ids: Tensor, cores: Sequence[Tensor], max_bytes: int) -> Tensor | None:
    """The same of ids and cores that ``serve_rows``; cores of a chain, or the two matrices of a table of low rank."""
    if not all(type(core) in _PLAIN for core in cores):
        return None
    rows: Tensor | None = library().look_up_cores(ids, list(cores), max_bytes)  # type: ignore[union-attr]
    return rows


def bags_of_cores(
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    cores: Sequence[Tensor],
    *,
    has_end: bool,
    is_mean: bool,
    padding_idx: int | None,
    max_bytes: int,
) -> Tensor | None:
    """Sums or means of rows over bags of known ids, differentiable in cores and weights; ``None`` where not served."""
    if not all(type(one) in _PLAIN for one in (*cores, *(() if weights is None else (weights,)))):
        return None
    options = has_end, is_mean, -1 if padding_idx is None else padding_idx
    bags: Tensor | None = library().bag_cores(  # type: ignore[union-attr]
        ids, offsets, weights, options, list(cores), max_bytes
    )
    return bags


def packed_tables(cores: Sequence[Tensor], groups: Groups) -> tuple[Tensor, ...]:
    """Cores merged and laid out for ``rows_of_packed``."""
    tables = library().pack_cores(merge_cores(cores, groups))  # type: ignore[union-attr]
    assert tables is not None
    return tuple(tables)


def rows_of_packed(
    ids: Tensor, tables: Sequence[Tensor], chain: ChainShape, groups: Groups, max_bytes: int = 2**26
) -> Tensor | None:
    """Rows of known ids ``(n,)`` from tables that lie ready; ``None`` where the kernels do not serve them."""
    shapes = merged_shapes(chain, groups)
    rows: Tensor | None = library().look_up(ids, list(tables), shapes, max_bytes)  # type: ignore[union-attr]
    return rows


@lru_cache(maxsize=1024)
def merged_shapes(chain: ChainShape, groups: Groups) -> list[list[int]]:
    outs, ins, ranks = chain.out_modes, chain.in_modes, chain.ranks
    return [[ranks[a], prod(outs[a:b]), prod(ins[a:b]), ranks[b]] for a, b in groups]


def serve_rows(ids: Tensor, core: Tensor) -> bool:
    """Whether the kernels may be asked for rows of cores of this kind."""
    if library() is None or not can_group() or not ids.is_cpu or ids.numel() == 0:
        return False
    return core.is_cpu and core.dtype in (torch.float32, torch.float64)
