"""Contract neighbouring cores: some of them (``merge_cores``) or all (``chain_to_dense``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from tensortrain.contract.grouped import can_group, is_batched
from tensortrain.contract.shape import ChainShape
from tensortrain.errors import ShapeError
from tensortrain.system.native import library
from tensortrain.system.tracing import constant_when_traced, sizes_of

__all__ = ["Merge", "chain_to_dense", "merge_cores", "merge_order", "merge_steps"]

CoreShape = tuple[int, int, int, int]
_PLAIN = (Tensor, torch.nn.Parameter)  # subclasses see every operation


@dataclass(frozen=True)
class Merge:
    """One product of two neighbours: ``m x k`` by ``k x n``, then a copy that sorts the modes."""

    start: int
    middle: int
    stop: int
    m: int
    n: int
    k: int


@constant_when_traced  # shapes in, shapes out: a compiler need not look inside
def merge_order(shapes: tuple[CoreShape, ...]) -> tuple[Merge, ...]:
    """Return the products, in order, that contract a run of cores with the fewest flops.

    Args:
        shapes: Core shapes ``(r, i, j, s)``, neighbours sharing a rank.

    Cost: O(d^3) integer operations.  Source: the matrix-chain recurrence.

    Example:
        >>> [(step.start, step.stop) for step in merge_order(((1, 4, 4, 2), (2, 4, 4, 2), (2, 4, 4, 1)))]
        [(1, 3), (0, 3)]
    """
    return _merge_order(shapes)


@lru_cache(maxsize=4096)
def _merge_order(shapes: tuple[CoreShape, ...]) -> tuple[Merge, ...]:
    entries = [0]  # running products make the modes of any run a quotient
    for _, i, j, _ in shapes:
        entries.append((entries[-1] or 1) * i * j)
    entries[0] = 1
    best: dict[tuple[int, int], tuple[int, tuple[Merge, ...]]] = {(k, k + 1): (0, ()) for k in range(len(shapes))}
    for length in range(2, len(shapes) + 1):
        for start in range(len(shapes) - length + 1):
            stop = start + length
            candidates = (
                _merged(best, _product(shapes, entries, start, middle, stop)) for middle in range(start + 1, stop)
            )
            best[start, stop] = min(candidates, key=lambda entry: entry[0])
    return best[0, len(shapes)][1]


def _product(shapes: tuple[CoreShape, ...], entries: list[int], start: int, middle: int, stop: int) -> Merge:
    m = shapes[start][0] * entries[middle] // entries[start]
    n = entries[stop] // entries[middle] * shapes[stop - 1][3]
    return Merge(start, middle, stop, m, n, shapes[middle][0])


def _merged(best: dict[tuple[int, int], tuple[int, tuple[Merge, ...]]], step: Merge) -> tuple[int, tuple[Merge, ...]]:
    left_flops, left = best[step.start, step.middle]
    right_flops, right = best[step.middle, step.stop]
    return left_flops + right_flops + 2 * step.m * step.n * step.k, (*left, *right, step)


def merge_cores(cores: Sequence[Tensor], groups: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Contract the neighbours inside each group; the product stays the same TT-matrix.

    Args:
        cores: Cores ``(r, i, j, s)``.
        groups: Ranges ``(start, stop)`` that follow each other and cover all cores.

    Returns:
        list[Tensor]: One core per group, its modes the products of the group's modes. A group of one
        core is that core itself.

    Raises:
        ShapeError: The groups leave out a core or overlap.

    Cost: the fewest flops of any order of pairwise products.

    Example:
        >>> cores = [torch.randn(1, 2, 3, 4), torch.randn(4, 2, 3, 4), torch.randn(4, 2, 3, 1)]
        >>> [tuple(core.shape) for core in merge_cores(cores, ((0, 2), (2, 3)))]
        [(1, 4, 9, 4), (4, 2, 3, 1)]
    """
    _check_groups(groups, len(cores))
    return [_merge_run(cores[start:stop]) for start, stop in groups]


def chain_to_dense(cores: Sequence[Tensor]) -> Tensor:
    """Return the dense weight ``(M, N)`` of a TT-matrix, differentiably.

    Args:
        cores: Cores ``(r, i, j, s)``, boundary ranks 1.

    Cost: the fewest flops of any order of pairwise products, about ``2 r M N``.

    Example:
        >>> chain_to_dense([torch.ones(1, 2, 3, 4), torch.ones(4, 2, 2, 1)]).shape
        torch.Size([4, 6])
    """
    chain = ChainShape.of(cores)
    return _merge_run(cores).reshape(chain.out_features, chain.in_features)


def _merge_run(cores: Sequence[Tensor]) -> Tensor:
    if len(cores) > 1 and can_group() and all(map(_is_served, cores)):
        merged = _merged_in_place(cores)
        if merged is not None:
            return merged
    return _recorded_run(cores)


def _is_served(core: Tensor) -> bool:
    """Whether the kernels merge such a core: what they leave to torch is better recorded there."""
    return type(core) in _PLAIN and core.is_cpu and core.dtype in (torch.float32, torch.float64)


def _recorded_run(cores: Sequence[Tensor]) -> Tensor:
    """A run by operations of torch."""
    shapes = tuple(_shape_of(core) for core in cores)
    runs: dict[tuple[int, int], Tensor] = {(k, k + 1): core for k, core in enumerate(cores)}
    for step in merge_order(shapes):
        left = runs.pop((step.start, step.middle))
        right = runs.pop((step.middle, step.stop))
        runs[step.start, step.stop] = _merge_pair(left, right)
    return runs[0, len(cores)]


def _merge_pair(left: Tensor, right: Tensor) -> Tensor:
    r, i, j, t = _shape_of(left)
    _, i2, j2, s = _shape_of(right)
    both = left.reshape(r * i * j, t) @ right.reshape(t, i2 * j2 * s)
    both = both.reshape(r, i, j, i2, j2, s).permute(0, 1, 3, 2, 4, 5)  # r i i2 j j2 s
    return both.reshape(r, i * i2, j * j2, s)


# -- by the kernels, which write a product where it shall lie -------------------------------------------


@lru_cache(maxsize=4096)
def merge_steps(shapes: tuple[CoreShape, ...]) -> list[int]:
    """The same order as plain numbers: start, middle and stop of every product; not to be written to."""
    return [at for step in _merge_order(shapes) for at in (step.start, step.middle, step.stop)]


def _merged_in_place(cores: Sequence[Tensor]) -> Tensor | None:
    """A run in one call; ``None`` where the kernels do not serve these cores."""
    kernels = library()
    if kernels is None:
        return None
    steps = merge_steps(tuple(_shape_of(core) for core in cores))
    if torch.is_grad_enabled() and any(core.requires_grad for core in cores):
        found: Tensor = _Merged.apply(steps, *cores)
        return found
    merged: Tensor | None = kernels.merge_run(list(cores), steps)
    return merged


class _Merged(torch.autograd.Function):
    """A run merged by the kernels; gradients that have gradients go through torch's own operations."""

    @staticmethod
    def forward(ctx: Any, steps: list[int], *cores: Tensor) -> Tensor:
        ctx.save_for_backward(*cores)
        ctx.steps = steps
        kernels = library()
        merged: Tensor | None = None if kernels is None else kernels.merge_run(list(cores), steps)
        return _recorded_run(cores) if merged is None else merged

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cores, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        kernels, found = library(), None
        if kernels is not None and not torch.is_grad_enabled() and not is_batched(grad):
            found = kernels.merge_run_backward(cores, ctx.steps, grad, needed)
        if found is None:
            found = _recorded_gradients(cores, needed, grad)
        return None, *found


def _recorded_gradients(cores: Sequence[Tensor], needed: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases: the history of one may hold another one
        inputs = [core.view_as(core) if again else core.detach().requires_grad_() for core in cores]
        merged = _recorded_run(inputs)
    wanted = [one for one, want in zip(inputs, needed, strict=True) if want]
    found = iter(torch.autograd.grad(merged, wanted, grad, create_graph=again))
    return [next(found) if want else None for want in needed]


def _shape_of(core: Tensor) -> CoreShape:
    sizes = sizes_of(core)
    return sizes[0], sizes[1], sizes[2], sizes[3]


def _check_groups(groups: Sequence[tuple[int, int]], order: int) -> None:
    ends = [0, *(stop for _, stop in groups)]
    starts = [*(start for start, _ in groups), order]
    if ends != starts or any(start >= stop for start, stop in groups):
        raise ShapeError(
            f"groups must cover the cores in order: groups has {tuple(groups)}, expected ranges "
            f"(start, stop) from 0 to {order}. Let each group start where the one before it stops."
        )


def run_numel(chain: ChainShape, start: int, stop: int) -> int:
    """Entries of the core that merging ``start .. stop`` gives."""
    modes = prod(chain.out_modes[start:stop]) * prod(chain.in_modes[start:stop])
    return chain.ranks[start] * modes * chain.ranks[stop]
