"""Rows of a TT table by number: an embedding whose table is never built."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tensortrain.contract.cost import CostModel, cost_model
from tensortrain.contract.grouped import can_group, grouped_product
from tensortrain.contract.merge import merge_cores, merge_order, run_numel
from tensortrain.contract.row_kernels import distinct_ids, kernel_rows, picked_rows_s, range_of
from tensortrain.contract.shape import ChainShape
from tensortrain.errors import DTypeError, ModeIndexError, ShapeError
from tensortrain.system.tracing import is_traced

__all__ = ["chain_lookup", "lookup_groups", "lookup_s"]

# What is copied in the time that a small product of its own takes.
_BYTES_PER_CALL = 5e4
# Small operations of one lookup that is not by the kernels.
_CALLS = 50
# Fewer distinct ids than this are multiplied sooner than their common digits are found.
_MIN_SHARED = 256


def chain_lookup(
    ids: Tensor,
    cores: Sequence[Tensor],
    in_modes: Sequence[int],
    *,
    deduplicate: bool = True,
    max_bytes: int = 2**26,
) -> Tensor:
    """Return rows of the transposed TT-matrix, that is, of a table ``(N, M)``.

    Equal ids are computed once, and so are equal leading digits where that halves the work. Neighbouring
    cores are merged where the number of ids pays for it. Ids are taken in chunks so that intermediate
    results stay below ``max_bytes``; with gradients, chunks are computed again in the backward pass.

    Args:
        ids: Integers of any shape in ``[0, N)``, ``N`` the product of ``in_modes``; the digits of an id
            in that mixed radix, first slowest, index the input modes.
        cores: Cores ``(r, i, j, s)``.
        in_modes: Input mode sizes of the cores (the vocabulary).
        deduplicate: Whether to look for equal ids; off, nothing waits for the device.
        max_bytes: Bound on intermediate results and on merged tables.

    Returns:
        Tensor: ``(*ids.shape, M)``, ``M`` the product of the output modes.

    Raises:
        DTypeError: ``ids`` are not integers.
        ModeIndexError: An id is negative or not below ``N``.
        ShapeError: ``in_modes`` are not those of the cores.

    Cost: about ``2 M r`` flops for each distinct id.
    Source: Khrulkov et al., arXiv:1901.10787; sharing of prefixes after TT-Rec, arXiv:2101.11714.

    Example:
        >>> cores = [torch.randn(1, 2, 5, 3), torch.randn(3, 4, 6, 1)]
        >>> chain_lookup(torch.tensor([[0, 29, 29]]), cores, (5, 6)).shape
        torch.Size([1, 3, 8])
    """
    chain = ChainShape.of(cores)
    _check_lookup(ids, chain, tuple(in_modes))
    flat, inverse = ids.reshape(-1).long(), None
    if is_traced():
        # A traced program must not depend on the number of ids, so it takes ids and cores as they are.
        rows = _rows(flat, _tables(cores, [(k, k + 1) for k in range(chain.order)]), share=False)
        return rows.reshape(*ids.shape, chain.out_features)
    by_kernels = _by_kernels(flat, cores, chain, max_bytes)
    if by_kernels is not None:
        return by_kernels.reshape(*ids.shape, chain.out_features)
    if deduplicate:
        flat, inverse = torch.unique(flat, return_inverse=True)
        _check_range(flat, chain.in_features)
    rows = _planned_rows(flat, cores, chain, is_sorted=inverse is not None, max_bytes=max_bytes)
    if inverse is not None:
        rows = rows.index_select(0, inverse.reshape(-1))
    return rows.reshape(*ids.shape, chain.out_features)


def _by_kernels(ids: Tensor, cores: Sequence[Tensor], chain: ChainShape, max_bytes: int) -> Tensor | None:
    extent = range_of(ids)
    if extent is None:
        return None
    _check_extent(*extent, chain.in_features)
    return kernel_rows(ids, cores, chain, max_bytes)


def _planned_rows(
    ids: Tensor, cores: Sequence[Tensor], chain: ChainShape, *, is_sorted: bool, max_bytes: int
) -> Tensor:
    """Merge cores as the number of ids deserves, then multiply slices chunk by chunk."""
    training = torch.is_grad_enabled() and any(core.requires_grad for core in cores)
    model, n_ids = cost_model(cores[0].device), _power_of_two(ids.shape[0])
    on_cpu = not cores[0].is_cuda
    groups = lookup_groups(chain, n_ids, cores[0].dtype, training, max_bytes, model, on_cpu)
    # Rows gather faster from contiguous slices, which pays once there are as many rows as slices.
    tables = [t.contiguous() if t.shape[0] <= ids.shape[0] else t for t in _tables(cores, groups)]
    return _rows_in_chunks(ids, tables, is_sorted and ids.shape[0] >= _MIN_SHARED, max_bytes, training)


def _tables(cores: Sequence[Tensor], groups: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Merged cores as tables of slices ``(j, r, i, s)``."""
    return [core.permute(2, 0, 1, 3) for core in merge_cores(cores, groups)]


def lookup_s(chain: ChainShape, n_ids: int, dtype: torch.dtype, model: CostModel, *, on_cpu: bool = True) -> float:
    """Predicted seconds of ``chain_lookup`` by operations of torch, without gradients."""
    n = distinct_ids(n_ids, chain.in_features)
    groups = lookup_groups(chain, _power_of_two(n), dtype, False, 2**26, model, on_cpu)
    seconds = sum(_group_s(chain, *group, n, dtype, False, model, on_cpu) for group in groups)
    n_bytes = n_ids * chain.out_features * dtype.itemsize
    return seconds + _CALLS * model.overhead_s + picked_rows_s(n_ids, n_bytes // max(1, n_ids), model)


@lru_cache(maxsize=1024)
def lookup_groups(
    chain: ChainShape,
    n_ids: int,
    dtype: torch.dtype,
    training: bool,
    max_bytes: int,
    model: CostModel,
    on_cpu: bool = True,
) -> tuple[tuple[int, int], ...]:
    """Return the merges with which ``n_ids`` rows are predicted to take least time.

    A merged group is a table of partial products for all its ids: costly once, then one gather.

    Args:
        chain: The shapes; input modes are the vocabulary.
        n_ids: Distinct ids.
        dtype: Of the cores.
        training: Whether merges are differentiated too.
        max_bytes: Bound on one merged table.
        model: Constants.
        on_cpu: Whether prefixes with the same digit can be multiplied together.

    Example:
        >>> chain = ChainShape((4, 4, 4), (4, 4, 4), (1, 16, 16, 1))
        >>> lookup_groups(chain, 1 << 20, torch.float32, False, 2**26, CostModel.reference())
        ((0, 3),)
    """
    best: list[tuple[float, tuple[tuple[int, int], ...]]] = [(0.0, ())]
    for stop in range(1, chain.order + 1):
        candidates = []
        for start in range(stop):
            if stop - start > 1 and run_numel(chain, start, stop) * dtype.itemsize > max_bytes:
                continue
            seconds = _group_s(chain, start, stop, n_ids, dtype, training, model, on_cpu)
            candidates.append((best[start][0] + seconds, (*best[start][1], (start, stop))))
        best.append(min(candidates))
    return best[-1][1]


def _group_s(
    chain: ChainShape,
    start: int,
    stop: int,
    n_ids: int,
    dtype: torch.dtype,
    training: bool,
    model: CostModel,
    on_cpu: bool,
) -> float:
    """Merge one group, gather its slices, and multiply them on."""
    passes = 3 if training else 1
    seconds = model.copy_s(2 * run_numel(chain, start, stop) * dtype.itemsize)
    for merge in merge_order(chain.core_shapes[start:stop]):
        seconds += model.gemm_s(merge.m, merge.n, merge.k, dtype=dtype)
        seconds += model.copy_s(2 * merge.m * merge.n * dtype.itemsize)
    # Ids that share all digits up to here share the work: there are no more prefixes than this.
    n_rows = min(n_ids, prod(chain.in_modes[:stop]))
    rank, width = chain.ranks[start], prod(chain.out_modes[start:stop]) * chain.ranks[stop]
    lead, n_slices, slice_bytes = (
        prod(chain.out_modes[:start]),
        prod(chain.in_modes[start:stop]),
        rank * width * dtype.itemsize,
    )
    if start > 0 and on_cpu and _pays_to_group(n_rows, n_slices, slice_bytes):
        each = -(-n_rows // n_slices)
        seconds += n_slices * model.gemm_s(each * lead, width, rank, dtype=dtype)
        return passes * (seconds + model.copy_s(2 * n_rows * lead * rank * dtype.itemsize))
    seconds += model.copy_s(2 * n_rows * slice_bytes)
    if start > 0:
        # In a batch of such small products neither side is the one that BLAS likes thin.
        seconds += min(model.gemm_s(m, n, rank, batch=n_rows, dtype=dtype) for m, n in ((lead, width), (width, lead)))
    return passes * seconds


def _rows_in_chunks(ids: Tensor, tables: Sequence[Tensor], share: bool, max_bytes: int, training: bool) -> Tensor:
    size = max(1, max_bytes // _row_bytes(tables))
    if ids.shape[0] <= size:
        return _rows(ids, tables, share)
    chunks = ids.split(size)
    if not training:
        return torch.cat([_rows(chunk, tables, share) for chunk in chunks])
    again = [checkpoint(_rows, c, tables, share, use_reentrant=False, preserve_rng_state=False) for c in chunks]
    return torch.cat(again)


def _row_bytes(tables: Sequence[Tensor]) -> int:
    """Most bytes for one id at one step: state, slice and product."""
    most, lead = 1, 1
    for table in tables:
        _, r, i, s = table.shape
        most = max(most, lead * r + r * i * s + lead * i * s)
        lead *= i
    return most * tables[0].element_size()


def _rows(ids: Tensor, tables: Sequence[Tensor], share: bool) -> Tensor:
    """Multiply, for each id, the slices that its digits pick: ``(n, M)``."""
    levels = _prefixes(ids, [table.shape[0] for table in tables], share)
    (digits, _), first = levels[0], tables[0]
    state = first.index_select(0, digits).flatten(0, 1)  # n, output modes so far, r
    places: Tensor | None = None  # where each prefix stands in the state, if not in order
    for (digits, parents), table in zip(levels[1:], tables[1:], strict=True):
        j, r, i, s = table.shape
        if places is not None:
            parents = places if parents is None else places.index_select(0, parents)
        if _is_worth_grouping(digits.shape[0], table):
            order = digits.argsort(stable=True)
            parents = order if parents is None else parents.index_select(0, order)
            counts = torch.bincount(digits, minlength=j).tolist()
            state = grouped_product(state.index_select(0, parents), table.reshape(j, r, i * s), counts)
            places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        else:
            state = state if parents is None else state.index_select(0, parents)
            state, places = torch.bmm(state, table.index_select(0, digits).reshape(-1, r, i * s)), None
        state = state.unflatten(-1, (i, s)).flatten(1, 2)
    state = state.squeeze(-1)
    return state if places is None else state.index_select(0, places)


def _is_worth_grouping(n: int, table: Tensor) -> bool:
    """Whether a product for every entry of the table costs less than a copy of its slice for every prefix."""
    if table.is_cuda or not can_group():
        return False
    return _pays_to_group(n, table.shape[0], table[0].numel() * table.element_size())


def _pays_to_group(n: int, n_slices: int, slice_bytes: int) -> bool:
    return n * slice_bytes > n_slices * _BYTES_PER_CALL


def _prefixes(ids: Tensor, modes: Sequence[int], share: bool) -> list[tuple[Tensor, Tensor | None]]:
    """For each mode, the digit of every distinct prefix, and where its parent stands in the level before.

    Parents are None where every prefix keeps its place: sharing is left out unless it halves the work.
    """
    levels: list[tuple[Tensor, Tensor | None]] = []
    for mode in reversed(modes[1:]):
        parents = torch.div(ids, mode, rounding_mode="floor")
        digits, places = ids - parents * mode, None
        if share:
            distinct, inverse = torch.unique_consecutive(parents, return_inverse=True)
            if 2 * distinct.shape[0] <= parents.shape[0]:
                parents, places = distinct, inverse
        levels.append((digits, places))
        ids = parents
    levels.append((ids, None))
    return levels[::-1]


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _check_lookup(ids: Tensor, chain: ChainShape, in_modes: tuple[int, ...]) -> None:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise DTypeError(
            f"ids must be integers: ids has dtype {ids.dtype}, expected torch.int64 or smaller. "
            "Convert them with ids.long()."
        )
    if in_modes != chain.in_modes:
        raise ShapeError(
            f"in_modes must be the input modes of the cores: in_modes has {in_modes}, "
            f"expected {chain.in_modes}. Take them from the third size of each core."
        )


def _check_range(distinct: Tensor, n_rows: int) -> None:
    """``distinct`` is sorted, so its ends tell; deduplication has waited for the device already."""
    if distinct.shape[0] == 0:
        return
    _check_extent(int(distinct[0]), int(distinct[-1]), n_rows)


def _check_extent(lowest: int, highest: int, n_rows: int) -> None:
    if lowest < 0 or highest >= n_rows:
        raise ModeIndexError(
            f"ids must be rows of the table: ids has values from {lowest} to {highest}, "
            f"expected 0 to {n_rows - 1}. Check the vocabulary that made the ids."
        )
