"""Rows of a TT table by the kernels: which cores are merged for them, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensortrain.contract.cost import CostModel, cost_model
from tensortrain.contract.grouped import can_group, is_batched
from tensortrain.contract.merge import merge_cores, merge_order, run_numel
from tensortrain.contract.shape import ChainShape
from tensortrain.system.native import library

__all__ = [
    "Groups",
    "kept_groups",
    "kernel_rows",
    "packed_tables",
    "range_of",
    "row_groups",
    "rows_of_packed",
    "serve_rows",
]

Groups = tuple[tuple[int, int], ...]

_LANES_BYTES = 32  # of a vector: slices are filled up to whole ones
_SMALL_RATE = 0.6  # of the rate of large products that the kernels' small ones reach
_CACHED_BYTES = 2**20  # what stays in the cache of a core
_NODE_S = 4e-8  # to find the digits of one prefix and to start its product


# -- which cores are merged -----------------------------------------------------------------------------


def kept_groups(chain: ChainShape, dtype: torch.dtype, max_bytes: int, model: CostModel) -> Groups:
    """The merges for tables that lie ready between calls: least time per row, tables of at most so many bytes."""
    most = min(max_bytes, chain.dense_numel * dtype.itemsize // 2)
    return _best_groups(chain, 1 << 16, dtype, False, True, most, model)


def row_groups(
    chain: ChainShape, n_ids: int, dtype: torch.dtype, training: bool, max_bytes: int, model: CostModel
) -> Groups:
    """The merges with which ``n_ids`` rows are predicted to take least time when every call merges anew."""
    return _best_groups(chain, _power_of_two(n_ids), dtype, training, False, max_bytes, model)


@lru_cache(maxsize=1024)
def _best_groups(
    chain: ChainShape, n_ids: int, dtype: torch.dtype, training: bool, kept: bool, max_bytes: int, model: CostModel
) -> Groups:
    best: list[tuple[float, Groups]] = [(0.0, ())]
    for stop in range(1, chain.order + 1):
        found = []
        for start in range(stop):
            if stop - start > 1 and run_numel(chain, start, stop) * dtype.itemsize > max_bytes:
                continue
            if kept and (start, stop) == (0, chain.order) and chain.order > 1:
                continue  # the dense table, which may not be built here
            made_s = 0.0 if kept else _table_s(chain, start, stop, dtype, training, model)
            rows_s = _rows_s(chain, start, stop, n_ids, dtype, training, model)
            found.append((best[start][0] + made_s + rows_s, (*best[start][1], (start, stop))))
        best.append(min(found))
    return best[-1][1]


def _table_s(chain: ChainShape, start: int, stop: int, dtype: torch.dtype, training: bool, model: CostModel) -> float:
    """Merge one group and lay it out; in training its gradient goes the same way back."""
    # Where a group is not the first, its outputs lie apart: copies of more than the cache holds go from line to line.
    n_bytes = run_numel(chain, start, stop) * dtype.itemsize
    slower = 1 if start == 0 or n_bytes <= _CACHED_BYTES else 5
    seconds = 0.0
    for merge in merge_order(chain.core_shapes[start:stop]):
        products = model.gemm_s(merge.m, merge.n, merge.k, dtype=dtype)
        copies = slower * model.copy_s(2 * merge.m * merge.n * dtype.itemsize)
        seconds += (3 if training else 1) * products + (2 if training else 1) * copies
    return seconds + (4 if training else slower) * model.copy_s(2 * n_bytes)


def _rows_s(
    chain: ChainShape, start: int, stop: int, n_ids: int, dtype: torch.dtype, training: bool, model: CostModel
) -> float:
    """Multiply the states before a group by its slices, once for every distinct prefix."""
    if start == 0:
        return 0.0
    n = min(n_ids, prod(chain.in_modes[:stop]))
    rank, lead = chain.ranks[start], prod(chain.out_modes[:start])
    width = _whole_lanes(prod(chain.out_modes[start:stop]) * chain.ranks[stop], dtype)
    products = 2.0 * lead * rank * width / (_SMALL_RATE * model.gemm_flops_s * model._dtype_rate(dtype))
    n_bytes = (lead * rank + rank * width) * dtype.itemsize
    passes = 1 if not training else 3 if stop == chain.order else 6  # states in between are made again
    return passes * n * (products + n_bytes / model.cache_bandwidth_bytes_s + _NODE_S)


def _whole_lanes(n: int, dtype: torch.dtype) -> int:
    lanes = max(1, _LANES_BYTES // dtype.itemsize)
    return -(-n // lanes) * lanes


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


# -- rows -----------------------------------------------------------------------------------------------


def range_of(ids: Tensor) -> tuple[int, int] | None:
    """Least and greatest id in one pass; ``None`` where the kernels do not read them."""
    kernels = library()
    found: tuple[int, int] | None = None if kernels is None else kernels.range_of_ids(ids)
    return found


def kernel_rows(ids: Tensor, cores: Sequence[Tensor], chain: ChainShape, max_bytes: int) -> Tensor | None:
    """Rows of known ids ``(n,)``, differentiable in the cores; ``None`` where the kernels do not serve them."""
    if not serve_rows(ids, cores[0]) or chain.order < 2:
        return None
    training = torch.is_grad_enabled() and any(core.requires_grad for core in cores)
    model = cost_model(cores[0].device)
    groups = row_groups(chain, ids.shape[0], cores[0].dtype, training, max_bytes, model)
    merged = merge_cores(cores, groups)
    if len(merged) == 1:
        return F.embedding(ids, merged[0][0, :, :, 0].t().contiguous())
    tables = library().pack_cores([core.detach() for core in merged])  # type: ignore[union-attr]
    if tables is None:
        return None
    if training:
        found: Tensor = _Rows.apply(ids, max_bytes, tuple(tables), *merged)
        return found
    rows: Tensor | None = library().look_up(ids, tables, _shapes(merged), max_bytes)  # type: ignore[union-attr]
    return rows


def packed_tables(cores: Sequence[Tensor], groups: Groups) -> tuple[Tensor, ...]:
    """Cores merged and laid out for ``rows_of_packed``."""
    tables = library().pack_cores(merge_cores(cores, groups))  # type: ignore[union-attr]
    assert tables is not None
    return tuple(tables)


def rows_of_packed(
    ids: Tensor, tables: Sequence[Tensor], chain: ChainShape, groups: Groups, max_bytes: int = 2**26
) -> Tensor | None:
    """Rows of known ids ``(n,)`` from tables that lie ready; ``None`` where the kernels do not serve them."""
    shapes = _merged_shapes(chain, groups)
    rows: Tensor | None = library().look_up(ids, list(tables), shapes, max_bytes)  # type: ignore[union-attr]
    return rows


@lru_cache(maxsize=1024)
def _merged_shapes(chain: ChainShape, groups: Groups) -> list[list[int]]:
    outs, ins, ranks = chain.out_modes, chain.in_modes, chain.ranks
    return [[ranks[a], prod(outs[a:b]), prod(ins[a:b]), ranks[b]] for a, b in groups]


def _shapes(cores: Sequence[Tensor]) -> list[list[int]]:
    return [list(core.shape) for core in cores]


def serve_rows(ids: Tensor, core: Tensor) -> bool:
    """Whether the kernels may be asked for rows of cores of this kind."""
    if library() is None or not can_group() or not ids.is_cpu or ids.numel() == 0:
        return False
    return core.is_cpu and core.dtype in (torch.float32, torch.float64)


class _Rows(torch.autograd.Function):
    """Rows by the kernels; gradients that have gradients go through torch's own operations."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, max_bytes: int, tables: tuple[Tensor, ...], *cores: Tensor) -> Tensor:
        ctx.save_for_backward(ids, *cores, *tables)
        ctx.max_bytes = max_bytes
        rows: Tensor = library().look_up(ids, list(tables), _shapes(cores), max_bytes)  # type: ignore[union-attr]
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, *saved = ctx.saved_tensors
        cores, tables = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        needed = ctx.needs_input_grad[3:]
        found = None
        kernels = library()
        if kernels is not None and not torch.is_grad_enabled() and not is_batched(grad):
            found = kernels.look_up_backward(ids, tables, _shapes(cores), grad, ctx.max_bytes)
        if found is None:
            found = _recorded_gradients(ids, cores, needed, grad)
        return None, None, None, *(one if want else None for one, want in zip(found, needed, strict=True))


def _recorded_gradients(
    ids: Tensor, cores: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [core if again else core.detach().requires_grad_() for core in cores]
        rows = recorded_rows(ids, inputs)
    wanted = [one for one, want in zip(inputs, needed, strict=True) if want]
    found = iter(torch.autograd.grad(rows, wanted, grad, create_graph=again))
    return [next(found) if want else None for want in needed]


def recorded_rows(ids: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """The same rows by operations of torch, slice by slice."""
    digits, rest = [], ids
    for core in reversed(cores):
        digits.append(rest % core.shape[2])
        rest = torch.div(rest, core.shape[2], rounding_mode="floor")
    state = cores[0].new_ones(ids.shape[0], 1, 1)
    for core, digit in zip(cores, reversed(digits), strict=True):
        r, i, _, s = core.shape
        picked = core.permute(2, 0, 1, 3).index_select(0, digit).reshape(-1, r, i * s)
        state = torch.bmm(state, picked).unflatten(-1, (i, s)).flatten(1, 2)
    return state.squeeze(-1)
