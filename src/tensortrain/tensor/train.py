"""A tensor as a chain of cores."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tensortrain.cores.algebra import add_cores, broadcast_cores, contract, join_pieces
from tensortrain.cores.dense import cores_of_dense
from tensortrain.cores.indexing import index_cores
from tensortrain.cores.ranks import RankLike
from tensortrain.cores.regroup import permuted, reshaped
from tensortrain.cores.scales import Exponents
from tensortrain.cores.scaling import work_dtype
from tensortrain.cores.setting import Region, region_of
from tensortrain.errors import ModeIndexError, ShapeError
from tensortrain.tensor.base import CoreChain, broadcast_batch, check_same_kind, unbiasing

__all__ = ["At", "TensorTrain"]


@dataclass(frozen=True, eq=False, repr=False)
class TensorTrain(CoreChain):
    r"""A tensor ``x[a, b, ..] = G_1[:, a, :] G_2[:, b, :] ..`` held by its cores. Frozen.

    Args:
        cores: ``d`` tensors ``(r_{k-1}, n_k, r_k)`` of one dtype and device, ``r_0 = r_d = 1``. With a batch axis
            in front, ``(b, r_{k-1}, n_k, r_k)``, it is ``b`` trains of the same modes and ranks; every operation
            then works on each of them, ``shape`` leaves the batch out, and ``to_dense`` puts it first.
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
        cls,
        x: Tensor,
        *,
        eps: float | None = None,
        max_rank: RankLike | None = None,
        method: str = "auto",
        batch_dims: int = 0,
    ) -> TensorTrain:
        """The value of ``tensortrain.tt_svd``, which also tells the error promised."""
        done = cores_of_dense(x, eps=eps, max_rank=max_rank, method=method, batch_dims=batch_dims)
        return cls(done.cores, done.center)

    @property
    def shape(self) -> tuple[int, ...]:
        """The modes ``(n_1, .., n_d)``."""
        return tuple(core.shape[-2] for core in self.cores)

    def to_dense(self) -> Tensor:
        """The full array, of ``shape``, behind the batch axis if there is one.  Cost: O(n^d r) for equal modes."""
        return contract(self.cores)

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

    def var(self, dim: int | Sequence[int] | None = None, *, correction: float = 1) -> Tensor | TensorTrain:
        """Variance over some modes, or over all, as ``torch.var``.

        Args:
            dim: As for ``sum``.
            correction: Subtracted from the number of entries; 1 is the unbiased estimate, 0 the plain mean. Where
                nothing is left of that number there is no variance: NaN, or as in torch infinity.

        Returns:
            A real train of the modes that are left (a complex one with real entries for complex trains), or a real
            tensor of ``batch_shape``. Ranks are those of a square: round the result.
        """
        dims = sorted(checked_dims(dim, self.order))
        count = math.prod(self.shape[k] for k in dims)
        mean = self.mean(dims)
        if isinstance(mean, Tensor):
            return self._variance(mean, correction)
        kept = [k for k in range(self.order) if k not in dims]
        centred = self - mean[tuple(slice(None) if k in kept else None for k in range(self.order))]
        return (centred.conj() * centred).mean(dims) * unbiasing(count, correction)

    def _reduce(self, dim: int | Sequence[int] | None, *, mean: bool) -> Tensor | TensorTrain:
        dims = checked_dims(dim, self.order)
        reduce = torch.mean if mean else torch.sum
        wide = [core.to(work_dtype(core.dtype)) for core in self.cores]  # a sum in half precision may overflow
        pieces = [reduce(core, dim=-2) if k in dims else core for k, core in enumerate(wide)]
        return self._joined(pieces)

    def mode_product(self, matrix: Tensor, dim: int) -> TensorTrain:
        """Multiply a matrix into one mode: entries ``sum_n matrix[m, n] x[.., n, ..]``; a vector removes the mode.

        Args:
            matrix: ``(m, n_dim)``, ``(n_dim,)`` for a sum with weights, or with a batch axis in front of a matrix.
            dim: The mode; negative counts from the end.

        Raises:
            ShapeError: The last axis of the matrix is not the mode.
            ModeIndexError: There is no such mode.

        Cost: O(m n r^2) flops. The canonical form is kept for what lies beyond ``dim``.
        """
        (k,) = checked_dims(dim, self.order)
        n_axes = matrix.ndim
        if not 1 <= n_axes <= 2 + self._n_batch or matrix.shape[-1] != self.shape[k]:
            raise ShapeError(
                f"a mode product needs a matrix with columns for the mode: matrix has shape {tuple(matrix.shape)}, "
                f"expected (m, {self.shape[k]}) or ({self.shape[k]},). Transpose it, or name another mode."
            )
        cores = list(self.cores)
        if n_axes == 1:
            cores[k] = torch.einsum("n,...rns->...rs", matrix, cores[k])
            return self._joined(cores)  # type: ignore[return-value]
        cores[k] = torch.einsum("...mn,...rns->...rms", matrix, cores[k])
        lo, hi = self.center
        return TensorTrain(tuple(cores), (min(lo, k), max(hi, k)))

    def reshape(self, *shape: int | Sequence[int], eps: float | None = None) -> TensorTrain:
        """The same entries in C order under other modes: modes are merged and split.

        Args:
            shape: New modes with the same product, one of them may be -1. ``(2,) * L`` gives a quantized train.
            eps: Where modes are split, ranks grow and are rounded to what this tolerance needs; the default is
                exact to the dtype. 0 keeps every split as it is, without arithmetic.

        Raises:
            ShapeError: The products differ.

        Cost: merging multiplies neighbouring cores, O(N r^2) for a merged mode N; splitting rounds.

        Example:
            >>> x = TensorTrain([torch.ones(1, 4, 1), torch.ones(1, 6, 1)])
            >>> x.reshape(2, 4, 3).shape, x.reshape(-1).shape
            ((2, 4, 3), (24,))
        """
        cores, has_split = reshaped(self.cores, _one_sequence(shape))
        out = TensorTrain(tuple(cores))
        return out.round(eps=eps) if has_split and eps != 0 else out

    def permute(self, *dims: int | Sequence[int], eps: float | None = None) -> TensorTrain:
        """The modes in another order, as ``torch.permute``.

        Args:
            dims: Number of the old mode for each place.
            eps: Largest relative Frobenius error; the default is exact to the dtype. Ranks may grow a lot.

        Raises:
            ModeIndexError: ``dims`` is no permutation of the modes.

        Cost: one SVD of a pair of cores for each swap of neighbours that the order needs.
        """
        cores, center = permuted(self.cores, self.center, _one_sequence(dims), eps)
        return self if cores is self.cores else TensorTrain(tuple(cores), center)

    def points(self, indices: Tensor) -> Tensor:
        """Entries at many multi-indices at once; differentiable.

        Args:
            indices: ``(.., d)`` of integers; negative ones count from the end.

        Returns:
            ``(*batch_shape, ..)``.

        Raises:
            ShapeError: The last axis is not the order.
            ModeIndexError: An index lies outside its mode.

        Cost: O(n d r^2) flops for n points.
        """
        indices = torch.as_tensor(indices)
        if indices.ndim < 1 or indices.shape[-1] != self.order:
            raise ShapeError(
                f"points need an index for every mode: indices has shape {tuple(indices.shape)}, expected "
                f"(.., {self.order}). Put the modes last."
            )
        return self[tuple(indices.unbind(-1))]  # type: ignore[return-value]

    @property
    def at(self) -> At:
        """``x.at[index].set(value)`` and ``x.at[index].add(value)`` give a new train; ``x`` stays as it is.

        The index is as for ``x[index]``. The value is a number, a train of the shape of ``x[index]``, or a tensor
        that broadcasts to it. Ranks grow by those of the value, and of what is replaced.

        Example:
            >>> x = TensorTrain([torch.zeros(1, 2, 1), torch.zeros(1, 2, 1)])
            >>> x.at[0].set(3.0).to_dense().tolist()
            [[3.0, 3.0], [0.0, 0.0]]
        """
        return At(self)

    def __getitem__(self, key: Any) -> Tensor | TensorTrain:
        found = index_cores(self.cores, key, self._n_batch)
        if found.values_shape is not None:  # lists in every mode: one value for each
            return found.pieces[0][..., 0, :, 0].reshape(*self.batch_shape, *found.values_shape)
        return self._joined(found.pieces, found.waiting)

    def _joined(self, pieces: Sequence[Tensor], waiting: Mapping[int, Exponents] | None = None) -> Tensor | TensorTrain:
        """A train of the cores among the pieces, or the number that they multiply to; see ``join_pieces``."""
        joined = join_pieces(pieces, self._n_batch, dtype=self.dtype, waiting=waiting)
        if joined[0].ndim == self._n_batch + 2:
            return joined[0][..., 0, 0]
        return TensorTrain(tuple(joined))

    def _merged(self) -> list[Tensor]:
        return list(self.cores)

    def _paired(self) -> list[Tensor]:
        return [core.unsqueeze(-2) for core in self.cores]

    def _from_paired(self, paired: Sequence[Tensor]) -> TensorTrain:
        return TensorTrain(tuple(core.squeeze(-2) for core in paired))

    @property
    def _rows(self) -> tuple[int, ...]:
        return self.shape

    def _like(self, merged: Sequence[Tensor], center: tuple[int, int] = (0, -1)) -> TensorTrain:
        return TensorTrain(tuple(merged), center)

    def _matched(self, other: TensorTrain) -> tuple[TensorTrain, TensorTrain]:
        left, right = broadcast_batch(self, other)
        if left.shape == right.shape:
            return left, right
        try:
            shape = torch.broadcast_shapes(left.shape, right.shape)
        except RuntimeError:
            raise ShapeError(
                f"modes must broadcast, last to last: the right operand has {right.shape}, expected a match for "
                f"{left.shape}. Sizes must be equal, or one of them 1."
            ) from None
        return tuple(TensorTrain(tuple(broadcast_cores(x.cores, shape))) for x in (left, right))  # type: ignore[return-value]


@dataclass(frozen=True)
class At:
    """``x.at``: waits for an index."""

    train: TensorTrain

    def __getitem__(self, key: Any) -> Place:
        return Place(self.train, key if isinstance(key, tuple) else (key,))


@dataclass(frozen=True)
class Place:
    """``x.at[index]``: waits for ``set`` or ``add``."""

    train: TensorTrain
    key: tuple[Any, ...]

    def set(self, value: Any) -> TensorTrain:
        """A train with these entries replaced.

        Args:
            value: A number, a train of the shape of ``x[index]``, or a tensor that broadcasts to it.

        Raises:
            ShapeError: The value does not fit the region.
            ModeIndexError, KindError: As for ``x[index]``.
        """
        region = region_of(self.key, self.train.shape, self.train.device)
        return TensorTrain(tuple(add_cores(region.without(self.train.cores), self._filled(region, value))))

    def add(self, value: Any) -> TensorTrain:
        """A train with the value added to these entries; arguments as for ``set``."""
        region = region_of(self.key, self.train.shape, self.train.device)
        return TensorTrain(tuple(add_cores(self.train.cores, self._filled(region, value))))

    def _filled(self, region: Region, value: Any) -> list[Tensor]:
        """Zeros, with the value in the region."""
        if not isinstance(value, CoreChain):
            return region.filled(value, self.train.cores[0])
        check_same_kind("set", self.train, value)
        return region.filled_by_train(broadcast_batch(self.train, value)[1].cores)


def _one_sequence(given: tuple[int | Sequence[int], ...]) -> Sequence[int]:
    """``f(2, 3)`` and ``f((2, 3))`` mean the same."""
    return given[0] if len(given) == 1 and not isinstance(given[0], int) else given  # type: ignore[return-value]


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
