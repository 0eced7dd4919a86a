"""Which rotary pairs of queries and keys to keep: what goes is cut in both, and nothing can make up for it.

Rotary positions turn numbers of a head two by two, so that a score is a sum over pairs. Without a set R of pairs the
keys change by their numbers there, and the model's output by ``1/2 sum_{i, j in R} F_ij K_ij``, ``K`` the second moment
of the keys and ``F`` that of the gradients that come to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from tensortrain.formats.head_narrowing import HeadSteps

__all__ = ["Pairing", "kept_pairs", "pair_steps", "pairs_of"]

Pairing: TypeAlias = Literal["halves", "neighbours"]  # i with i + d/2, or 2i with 2i + 1
_ROUNDS = 64


def pairs_of(size: int, pairing: Pairing) -> Tensor:
    """Numbers of a head by pair, ``(size / 2, 2)``."""
    numbers = torch.arange(size)
    return numbers.reshape(2, -1).T if pairing == "halves" else numbers.reshape(-1, 2)


def pair_steps(keys: Sequence[Tensor], gradients: Sequence[Tensor], pairing: Pairing) -> HeadSteps:
    """Take pairs out of heads until each has one left, each time those that cost least beside what is gone.

    Args:
        keys: Second moment of each head's keys, ``(d, d)``.
        gradients: Of the gradients with respect to them, ``(d, d)``.

    Cost: O(d^2) flops a head.
    Source: MoDeGPT, arXiv:2408.09632, type II, with the gradients' moment in place of the queries'.
    """
    found = [_order(key, gradient, pairing) for key, gradient in zip(keys, gradients, strict=True)]
    n_pairs, n_groups = len(found[0][0]), len(found)
    sizes = [n_pairs] * n_groups
    rises = [[costs[k + 1] - costs[k] for k in range(n_pairs - 1)] for _, costs in found]
    at_once = max(1, -(-n_groups * (n_pairs - 1) // _ROUNDS))
    widths, losses, lost, n_gone = [tuple(2 * n for n in sizes)], [0.0], 0.0, 0
    while any(n > 1 for n in sizes):
        head = min((g for g in range(n_groups) if sizes[g] > 1), key=lambda g: rises[g][n_pairs - sizes[g]])
        lost, n_gone = lost + rises[head][n_pairs - sizes[head]], n_gone + 1
        sizes[head] -= 1
        if n_gone % at_once == 0 or all(n == 1 for n in sizes):
            widths.append(tuple(2 * n for n in sizes))
            losses.append(lost)
    return HeadSteps(tuple(widths), tuple(losses), sum(costs[-1] for _, costs in found))


def kept_pairs(key: Tensor, gradient: Tensor, pairing: Pairing, width: int) -> list[int]:
    """The numbers of a head that remain, rising; arguments as ``pair_steps``."""
    order, _ = _order(key, gradient, pairing)
    pairs = pairs_of(len(key), pairing)
    return sorted(pairs[order[len(order) - width // 2 :]].flatten().tolist())


def _order(key: Tensor, gradient: Tensor, pairing: Pairing) -> tuple[list[int], list[float]]:
    """Pairs as they go, and what is lost once the first k are gone."""
    pairs = pairs_of(len(key), pairing)
    products = (key.double() * gradient.double()).cpu()
    blocks = products[pairs[:, None, :, None], pairs[None, :, None, :]].sum(dim=(2, 3))
    costs, order, lost = blocks.diagonal().clone(), list[int](), [0.0]
    for _ in range(len(pairs)):
        free = costs.clone()
        free[order] = torch.inf
        k = int(free.argmin())
        order.append(k)
        lost.append(lost[-1] + 0.5 * float(costs[k]))
        costs += blocks[k] + blocks[:, k]
    return order, lost
