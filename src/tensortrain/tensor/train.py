"""A tensor as a chain of cores."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tensortrain.errors import ModeIndexError, ShapeError
from tensortrain.tensor import chain
from tensortrain.tensor.base import CoreChain
from tensortrain.tensor.indexing import index_cores
from tensortrain.tensor.ranks import RankLike

__all__ = ["TensorTrain"]


@dataclass(frozen=True, eq=False, repr=False)
class TensorTrain(CoreChain):
    r"""A tensor ``x[a, b, ..] = G_1[:, a, :] G_2[:, b, :] ..`` held by its cores. Frozen.

    Args:
        cores: ``d`` tensors ``(r_{k-1}, n_k, r_k)`` of one dtype and device, ``r_0 = r_d = 1``.
        center: Range ``(lo, hi)`` outside which the cores are known to be orthonormal; leave it out.

    Raises:
        ShapeError: Axes, neighbouring or boundary ranks do not fit.
        DTypeError: Dtypes differ, or are neither floating nor complex.
        DeviceError: Devices differ.

    Operators: ``+ - *`` with a train (elementwise, modes broadcast as in NumPy) or a number; ``/`` by a
    number; ``x[...]`` with integers, slices, ``...``, ``None`` and index lists.

    Example:
        >>> x = TensorTrain([torch.ones(1, 4, 2), torch.ones(2, 5, 1)])
        >>> x.shape, x.ranks, float(x[0, 1]), float(x.sum())
        ((4, 5), (1, 2, 1), 2.0, 40.0)
    """

    _axes: ClassVar[tuple[str, ...]] = ("rank", "mode", "rank")

    @classmethod
    def from_dense(
        cls, x: Tensor, *, eps: float | None = None, max_rank: RankLike | None = None, method: str = "auto"
    ) -> TensorTrain:
        """The value of ``tensortrain.tt_svd``, which also tells the error promised."""
        from tensortrain.tensor.decompose import tt_svd  # builds on this type

        return tt_svd(x, eps=eps, max_rank=max_rank, method=method).value

    @property
    def shape(self) -> tuple[int, ...]:
        """The modes ``(n_1, .., n_d)``."""
        return tuple(core.shape[1] for core in self.cores)

    def to_dense(self) -> Tensor:
        """The full array, of ``shape``.  Cost: O(n^d r) for equal modes."""
        return chain.contract(self.cores)

    def sum(self, dim: int | Sequence[int] | None = None) -> Tensor | TensorTrain:
        """Sum over some modes, or over all.

        Args:
            dim: Modes to sum over, negative ones from the end; ``None`` is all.

        Returns:
            A train of the modes that are left, or a 0-d tensor if none is.

        Raises:
            ModeIndexError: A mode does not exist, or is named twice.
        """
        return self._reduce(dim, mean=False)

    def mean(self, dim: int | Sequence[int] | None = None) -> Tensor | TensorTrain:
        """Mean over some modes, or over all; arguments and result as for ``sum``."""
        return self._reduce(dim, mean=True)

    def _reduce(self, dim: int | Sequence[int] | None, *, mean: bool) -> Tensor | TensorTrain:
        dims = checked_dims(dim, self.order)
        reduce = torch.mean if mean else torch.sum
        pieces = [reduce(core, dim=1) if k in dims else core for k, core in enumerate(self.cores)]
        return _train_or_number(chain.join_pieces(pieces))

    def __getitem__(self, key: Any) -> Tensor | TensorTrain:
        pieces, is_values = index_cores(self.cores, key)
        if is_values:  # lists in every mode: one value for each
            return pieces[0][0, :, 0]
        return _train_or_number(chain.join_pieces(pieces))

    def _merged(self) -> list[Tensor]:
        return list(self.cores)

    def _like(self, merged: Sequence[Tensor], center: tuple[int, int] = (0, -1)) -> TensorTrain:
        return TensorTrain(tuple(merged), center)

    def _matched(self, other: TensorTrain) -> tuple[TensorTrain, TensorTrain]:
        if self.shape == other.shape:
            return self, other
        try:
            shape = torch.broadcast_shapes(self.shape, other.shape)
        except RuntimeError:
            raise ShapeError(
                f"modes must broadcast, last to last: the right operand has {other.shape}, expected a match "
                f"for "
                f"{self.shape}. Sizes must be equal, or one of them 1."
            ) from None
        return _broadcast(self, shape), _broadcast(other, shape)


def checked_dims(dim: int | Sequence[int] | None, order: int) -> frozenset[int]:
    """Mode numbers ``0 .. order - 1`` from the ``dim`` of a reduction."""
    if dim is None:
        return frozenset(range(order))
    given = tuple(dim) if isinstance(dim, Sequence) else (operator.index(dim),)
    for k in given:
        if not -order <= k < order:
            raise ModeIndexError(f"dim must name a mode: dim has {k}, expected {-order} to {order - 1}. Check x.order.")
    dims = frozenset(k % order for k in given)
    if len(dims) < len(given):
        raise ModeIndexError(f"dim must name a mode once: dim has {given}, expected no repeats. Drop the repeats.")
    return dims


def _broadcast(x: TensorTrain, shape: Sequence[int]) -> TensorTrain:
    missing = len(shape) - x.order
    cores = [x.cores[0].new_ones((1, 1, 1))] * missing + list(x.cores)
    return TensorTrain(
        tuple(core.expand(-1, n, -1) if core.shape[1] != n else core for core, n in zip(cores, shape, strict=True))
    )


def _train_or_number(joined: Sequence[Tensor]) -> Tensor | TensorTrain:
    if joined[0].ndim == 2:
        return joined[0][0, 0]
    return TensorTrain(tuple(joined))
