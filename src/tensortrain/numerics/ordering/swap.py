"""Orders that are improved step by step: of likenesses, and of a train by exchanging its neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tensortrain.cores.canonical import Gauged
from tensortrain.cores.ranks import count_params
from tensortrain.cores.regroup import swap_neighbours
from tensortrain.cores.tolerance import checked_eps, compute_dtype
from tensortrain.errors import ShapeError
from tensortrain.numerics.ordering.fiedler import fiedler_order
from tensortrain.numerics.ordering.greedy import greedy_order
from tensortrain.tensor import TensorTrain

__all__ = ["improved_order", "swapped_train"]

_GAIN = 1e-12  # of the cost: less is rounding
_MOST_GROWTH = 2.0  # of the parameters, on the way of a site to a better place


def improved_order(likeness: Tensor) -> list[int]:
    """Exchange two sites, or move one, as long as ``sum I_ij |place_i - place_j|`` falls; from two starts.

    Args:
        likeness: ``(d, d)`` symmetric, not negative, zero on the diagonal.
    """
    found = [_descended(likeness, start(likeness)) for start in (fiedler_order, greedy_order)]
    return min(found, key=lambda order: float(_cost(likeness, order)))


def _cost(likeness: Tensor, order: Sequence[int]) -> Tensor:
    placed = likeness[order][:, order]
    return (placed * _distances(placed)).sum() / 2


def _distances(placed: Tensor) -> Tensor:
    places = torch.arange(len(placed), dtype=placed.dtype)
    return (places[:, None] - places).abs()


def _descended(likeness: Tensor, order: list[int]) -> list[int]:
    if len(order) < 3:
        return order
    while True:
        placed = likeness[order][:, order]
        gains = torch.stack((_of_exchanges(placed), _of_moves(placed)))
        best = int(gains.argmin())
        if gains.flatten()[best] >= -_GAIN * _cost(likeness, order):
            return order
        kind, pair = divmod(best, len(order) ** 2)
        a, b = divmod(pair, len(order))
        order = list(order)
        if kind == 0:
            order[a], order[b] = order[b], order[a]
        else:
            order.insert(b, order.pop(a))


def _of_exchanges(placed: Tensor) -> Tensor:
    """By how much the cost rises when the sites at places a and b change places, ``(d, d)``."""
    distances = _distances(placed)
    mixed = placed @ distances
    own = mixed.diagonal()
    return mixed + mixed.T - own[:, None] - own + 2 * placed * distances


def _of_moves(placed: Tensor) -> Tensor:
    """By how much the cost rises when the site at place a moves to place b, ``(d, d)``.

    Bonds between a and b are then crossed by what crossed the next one, but for what the site itself shares.
    """
    d = len(placed)
    before = torch.cat((placed.new_zeros(d, 1), placed.cumsum(1)), dim=1)  # of site a with the first k
    whole = before[:, -1:]
    crossing = (whole - 2 * before[torch.arange(d), torch.arange(d)][:, None]).flatten()
    crossing = torch.cat((placed.new_zeros(1), crossing.cumsum(0)))  # of the first k with the rest
    # To the right: bond k (k sites before it) has the first k + 1 sites but a, for k = a + 1 .. b.
    right = crossing[1:] - whole + 2 * before[:, 1:] - crossing[:-1]  # d k
    # To the left: it has the first k - 1 sites and a, for k = b + 1 .. a.
    left = crossing[:-1] + whole - 2 * before[:, :-1] - crossing[1:]  # d k - 1
    places = torch.arange(d)
    is_after, is_before = places > places[:, None], places < places[:, None]
    to_right = right.where(is_after, 0.0).cumsum(1).where(is_after, 0.0)
    to_left = left.where(is_before, 0.0).flip(1).cumsum(1).flip(1).where(is_before, 0.0)
    return to_right + to_left


def swapped_train(x: TensorTrain, eps: float | None) -> list[int]:
    """Exchange neighbouring cores while this saves parameters, then move single sites through the chain.

    A site is taken through all places, as long as the train does not grow to twice its size, and stays at the best.

    Args:
        x: A single train.
        eps: What a swap may cut, a share of the norm.

    Raises:
        ShapeError: It is a batch.
    """
    if x.batch_shape:
        raise ShapeError(
            f"an order is that of one train: x is a batch of {tuple(x.batch_shape)}, expected a single train. Take one "
            "after the other."
        )
    x = x.round(eps=eps)
    wide = [core.to(compute_dtype(x.dtype)) for core in x.cores]
    state = _Chain(Gauged.of(wide), list(range(x.order)), checked_eps(eps, x.dtype, x.order))
    while True:
        size = state.size
        state = _exchanged(state)
        for site in list(state.order):
            state = _sifted(state, site)
        if state.size >= size:
            return state.order


@dataclass(frozen=True)
class _Chain:
    """A train on its way, and which old site stands at each place."""

    train: Gauged
    order: list[int]
    tol: float

    @property
    def size(self) -> int:
        cores = self.train.cores
        return count_params([core.shape[1] for core in cores], [1, *(core.shape[2] for core in cores)])

    def swapped(self, k: int) -> _Chain:
        """With the sites at places k and k + 1 exchanged."""
        train = replace(self.train, cores=list(self.train.cores))
        swap_neighbours(train, k, self.tol)
        order = list(self.order)
        order[k], order[k + 1] = order[k + 1], order[k]
        return _Chain(train, order, self.tol)


def _exchanged(state: _Chain) -> _Chain:
    """There and back, until no swap of neighbours saves parameters."""
    last = len(state.order) - 1
    while True:
        size = state.size
        for k in (*range(last), *reversed(range(last))):
            tried = state.swapped(k)
            state = tried if tried.size < state.size else state
        if state.size >= size:
            return state


def _sifted(state: _Chain, site: int) -> _Chain:
    """With one site at the best place that it reaches."""
    start, last = state.order.index(site), len(state.order) - 1
    best = state
    for places in (range(start, last), reversed(range(start))):
        found = _best_on_the_way(state, places)
        best = found if found.size < best.size else best
    return best


def _best_on_the_way(state: _Chain, places: Iterable[int]) -> _Chain:
    best, most = state, _MOST_GROWTH * state.size
    for k in places:
        state = state.swapped(k)
        best = state if state.size < best.size else best
        if state.size > most:
            break
    return best
