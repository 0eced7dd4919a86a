"""How strongly two groups of inputs hang together: ranks of matricizations, exactly, and what a tree can hold."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from tensortrain.cores.scaling import work_dtype
from tensortrain.errors import DataError, KindError, ModeIndexError
from tensortrain.models.checks import check_finite, whole

__all__ = ["check_prime", "min_cut_rank", "modular_rank", "separation_rank"]

_LARGEST_MODULUS = 2**31  # products of two residues must fit into int64
_PANEL = 32  # rows that are eliminated at once


def separation_rank(grid: Tensor, rows: Sequence[int], *, modulus: int | None = None) -> int:
    """The rank of a tensor read as a matrix: the least number of products of functions of either side.

    Args:
        grid: An axis for every input.
        rows: Numbers of the modes on one side.
        modulus: A prime below 2**31: the entries are residues and the rank is exact. Without one, the numerical rank
            in floating point, which is not to be trusted where singular values spread over many decades.

    Returns:
        int: from 0 to the smaller side.

    Raises:
        ModeIndexError: A mode that is not there, or is named twice.
        DataError: The entries are no residues where a modulus is given.

    Cost: O(m n min(m, n)) for sides m and n.
    Source: Levine et al., arXiv:1710.09431, section 4 (start-end separation rank).

    Example:
        >>> separation_rank(torch.eye(4).reshape(2, 2, 2, 2), (0, 1))
        4
    """
    if not isinstance(grid, Tensor):
        raise KindError(f"a rank is that of a tensor: grid is a {type(grid).__name__}. Pass torch.as_tensor(grid).")
    side = [int(row) for row in rows]
    if len(set(side)) != len(side) or any(not 0 <= row < grid.ndim for row in side):
        raise ModeIndexError(
            f"rows must be different modes of the tensor: they are {tuple(rows)}, expected numbers from 0 to "
            f"{grid.ndim - 1}. Name one side of the cut."
        )
    others = [mode for mode in range(grid.ndim) if mode not in side]
    n_rows = 1
    for row in side:
        n_rows *= grid.shape[row]
    matrix = grid.permute(*side, *others).reshape(n_rows, -1)
    if modulus is None:
        matrix = matrix if matrix.is_floating_point() or matrix.is_complex() else matrix.double()
        check_finite(matrix, "grid", "Draw residues and pass a modulus, where numbers leave the range")
        return int(torch.linalg.matrix_rank(matrix.to(work_dtype(matrix.dtype))))
    return modular_rank(matrix, modulus)


def modular_rank(matrix: Tensor, modulus: int) -> int:
    """The rank of a matrix of residues ``(m, n)`` int64 modulo a prime, by elimination.

    Raises:
        DataError: The matrix is not of whole numbers, or the modulus out of range.
    """
    if matrix.is_floating_point() or matrix.is_complex():
        raise DataError(
            f"an exact rank needs whole numbers: the entries are {matrix.dtype}. Pass residues, or leave modulus out."
        )
    check_prime(modulus)
    rest = matrix.long() % modulus
    rest = rest if rest.shape[0] <= rest.shape[1] else rest.T
    rank = 0
    while rest.shape[0]:
        solved, columns = _reduced(rest[:_PANEL], modulus)
        rank += len(columns)
        kept = torch.ones(rest.shape[1], dtype=torch.bool, device=rest.device)
        kept[columns] = False
        below = rest[_PANEL:]
        rest = (below[:, kept] - _times(below[:, columns], solved[:, kept], modulus)) % modulus
    return rank


def check_prime(modulus: int) -> None:
    """Refuse a modulus in which some numbers have no inverse, or whose products leave int64.

    Raises:
        DataError: It is no prime below 2**31.
    """
    number = whole(modulus)
    if (
        number is None
        or not 2 <= number < _LARGEST_MODULUS
        or any(number % k == 0 for k in range(2, isqrt(number) + 1))
    ):
        raise DataError(f"a modulus must be a prime below 2**31: it is {modulus!r}. Pass 2**31 - 1, for instance.")


def _reduced(rows: Tensor, modulus: int) -> tuple[Tensor, list[int]]:
    """Rows that span the same and are an identity in some columns, with these columns."""
    rows, columns, used = rows.clone(), [], []
    for k in range(rows.shape[0]):
        places = rows[k].nonzero()
        if len(places):
            column = int(places[0])
            rows[k] = rows[k] * pow(int(rows[k, column]), -1, modulus) % modulus
            factors = rows[:, column].clone()
            factors[k] = 0
            rows = (rows - factors[:, None] * rows[k]) % modulus
            columns.append(column)
            used.append(k)
    return rows[used], columns


def _times(a: Tensor, b: Tensor, modulus: int) -> Tensor:
    """A product of residues over at most ``_PANEL`` numbers, in two halves of 16 bits: below 2**53 floats are exact."""
    high, low = ((part.double() @ b.double()).long() % modulus for part in (a >> 16, a & 0xFFFF))
    return ((high << 16) + low) % modulus


def min_cut_rank(tree: Any, leaves: Sequence[int]) -> int:
    """The largest rank that a tree of dense tensors can have between two groups of its sites.

    It is the smallest product of bonds whose removal parts the groups; generic tensors reach it.

    Args:
        tree: A node is ``(bond to the parent, child, ..)``, a leaf ``(size, site number)``; the root's bond is 1.
        leaves: Site numbers of one group.

    Returns:
        int: the bound.

    Raises:
        ModeIndexError: A site that the tree lacks.
        KindError: The tree is not of nodes and leaves.

    Cost: O(number of nodes): the best cut with a node on either side, from the leaves up.
    Source: Cui et al., J. Math. Phys. 57, 062206 (2016); Levine et al., arXiv:1704.01552.

    Example:
        >>> pair = (3, (2, 0), (2, 1)), (3, (2, 2), (2, 3))
        >>> min_cut_rank((1, *pair), (0, 1)), min_cut_rank((1, *pair), (0, 2))
        (3, 4)
    """
    sites = _sites_of(tree)
    if len(set(sites)) < len(sites):
        raise KindError(f"sites of a tree must be different: its leaves have {sites}. Number them from 0.")
    missing = sorted(set(leaves) - set(sites))
    if missing:
        raise ModeIndexError(
            f"leaves must be sites of the tree: {missing} are not, expected numbers among {sorted(sites)}. Check them."
        )
    return min(_best_cuts(tree, set(leaves)))


def _is_leaf(node: Any) -> bool:
    return len(node) == 2 and isinstance(node[1], int)


def _checked(node: Any) -> Any:
    if not isinstance(node, tuple) or len(node) < 2 or not isinstance(node[0], int) or node[0] < 1:
        raise KindError(
            f"a tree must be nested tuples: a node is {node!r:.60}, expected (bond, child, ..) or (size, site number), "
            "sizes of 1 or more. The root has bond 1."
        )
    return node


def _sites_of(node: Any) -> list[int]:
    if _is_leaf(_checked(node)):
        return [node[1]]
    return [site for child in node[1:] for site in _sites_of(child)]


def _best_cuts(node: Any, group: set[int]) -> tuple[int, int]:
    """The cheapest cut below a node that leaves it on the side of the group, and on the other one."""
    with_group = without = 1
    if _is_leaf(node):  # the tensor of a leaf is its bond: the outer index lies on a side of its own
        big = node[0]
        return (1, big) if node[1] in group else (big, 1)
    for child in node[1:]:
        here, there = _best_cuts(child, group)
        if _is_leaf(child):
            with_group, without = with_group * here, without * there
        else:
            with_group *= min(here, there * child[0])
            without *= min(there, here * child[0])
    return with_group, without
