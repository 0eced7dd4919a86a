"""A matrix as a chain of cores, each with an output and an input mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tensortrain.errors import KindError, ModeIndexError, ShapeError
from tensortrain.tensor import chain
from tensortrain.tensor.base import CoreChain, check_same_place
from tensortrain.tensor.ranks import RankLike
from tensortrain.tensor.train import TensorTrain, checked_dims

__all__ = ["TTMatrix", "dense_to_paired", "paired_to_dense"]


@dataclass(frozen=True, eq=False, repr=False)
class TTMatrix(CoreChain):
    r"""A matrix ``W[i, j] = G_1[:, i_1, j_1, :] .. G_d[:, i_d, j_d, :]`` held by its cores. Frozen.

    Rows run through ``(i_1 .. i_d)`` and columns through ``(j_1 .. j_d)`` in C order, first mode slowest.

    Args:
        cores: ``d`` tensors ``(r_{k-1}, i_k, j_k, r_k)`` of one dtype and device, ``r_0 = r_d = 1``.
        center: Range ``(lo, hi)`` outside which the cores are known to be orthonormal; leave it out.

    Raises:
        ShapeError: Axes, neighbouring or boundary ranks do not fit.
        DTypeError: Dtypes differ, or are neither floating nor complex.
        DeviceError: Devices differ.

    Operators: ``+ - *`` with a matrix of the same modes (elementwise) or a number; ``/`` by a number;
    ``A @ x`` with a train, a TTMatrix, a dense vector ``(N,)`` or matrix ``(N, b)``; ``A[i, j]``, ``A[i]``
    and ``A[:, j]`` with flat row and column numbers.

    Example:
        >>> a = TTMatrix([torch.ones(1, 2, 3, 2), torch.ones(2, 4, 5, 1)])
        >>> a.shape, (a @ torch.ones(15)).shape, a.T.out_modes
        ((8, 15), torch.Size([8]), (3, 5))
    """

    _axes: ClassVar[tuple[str, ...]] = ("rank", "out mode", "in mode", "rank")

    @classmethod
    def from_dense(
        cls,
        w: Tensor,
        out_modes: Sequence[int],
        in_modes: Sequence[int],
        *,
        eps: float | None = None,
        max_rank: RankLike | None = None,
        method: str = "auto",
    ) -> TTMatrix:
        """The value of ``tensortrain.tt_svd`` with modes, which also tells the error promised."""
        from tensortrain.tensor.decompose import tt_svd  # builds on this type

        found = tt_svd(w, eps=eps, max_rank=max_rank, method=method, out_modes=out_modes, in_modes=in_modes)
        return found.value

    @property
    def out_modes(self) -> tuple[int, ...]:
        """Row modes ``(i_1, .., i_d)``."""
        return tuple(core.shape[1] for core in self.cores)

    @property
    def in_modes(self) -> tuple[int, ...]:
        """Column modes ``(j_1, .., j_d)``."""
        return tuple(core.shape[2] for core in self.cores)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(M, N)``, the products of the modes."""
        return math.prod(self.out_modes), math.prod(self.in_modes)

    @property
    def T(self) -> TTMatrix:
        """Transpose, without conjugation."""
        return self._map(lambda core: core.transpose(1, 2))

    @property
    def H(self) -> TTMatrix:
        """Conjugate transpose."""
        return self.T.conj()

    def to_dense(self) -> Tensor:
        """The full matrix, ``(M, N)``.  Cost: O(M N r)."""
        return paired_to_dense(chain.contract(self._merged()), self.out_modes, self.in_modes)

    def sum(self, dim: int | Sequence[int] | None = None) -> Tensor | TensorTrain:
        """Sum over rows (``dim=0``: a train of ``in_modes``), columns (1: of ``out_modes``), or all."""
        return self._reduce(dim, mean=False)

    def mean(self, dim: int | Sequence[int] | None = None) -> Tensor | TensorTrain:
        """Mean over rows, columns or all; arguments and result as for ``sum``."""
        return self._reduce(dim, mean=True)

    def _reduce(self, dim: int | Sequence[int] | None, *, mean: bool) -> Tensor | TensorTrain:
        dims = checked_dims(dim, 2)
        reduce = torch.mean if mean else torch.sum
        if not dims:
            raise KindError("dim must name an axis: dim has none, expected 0, 1 or both. Use the matrix as it is.")
        if len(dims) == 2:
            return chain.join_pieces([reduce(core, dim=(1, 2)) for core in self.cores])[0][0, 0]
        axis = 1 + min(dims)
        return TensorTrain(tuple(reduce(core, dim=axis) for core in self.cores))

    def __getitem__(self, key: Any) -> Tensor | TensorTrain | TTMatrix:
        row, column = self._row_and_column(key)
        cores: list[Tensor] = list(self.cores)
        for axis, at, modes in ((2, column, self.in_modes), (1, row, self.out_modes)):
            if at is not None:
                cores = [core.select(axis, digit) for core, digit in zip(cores, _digits(at, modes), strict=True)]
        if row is not None and column is not None:
            return chain.join_pieces(cores)[0][0, 0]
        return TTMatrix(tuple(cores)) if row is None and column is None else TensorTrain(tuple(cores))

    def _row_and_column(self, key: Any) -> tuple[int | None, int | None]:
        entries = key if isinstance(key, tuple) else (key,)
        if len(entries) > 2:
            raise ModeIndexError(
                f"a matrix has two indices: the index has {len(entries)} entries, expected at most 2. "
                "Pass A[row, column]."
            )
        found = [_row_index(entry, size) for entry, size in zip(entries, self.shape, strict=False)]
        return (*found, None, None)[:2]  # type: ignore[return-value]

    def __matmul__(self, other: Any) -> TTMatrix | TensorTrain | Tensor:
        if isinstance(other, TTMatrix):
            _check_modes("@", self.in_modes, other.out_modes)
            check_same_place("@", self, other)
            pairs = zip(self.cores, other.cores, strict=True)
            # r i j s, t j k u -> (r t) i k (s u)
            cores = [torch.einsum("rijs,tjku->rtiksu", a, b).flatten(4, 5).flatten(0, 1) for a, b in pairs]
            return TTMatrix(tuple(cores))
        if isinstance(other, TensorTrain):
            _check_modes("@", self.in_modes, other.shape)
            check_same_place("@", self, other)
            pairs = zip(self.cores, other.cores, strict=True)
            return TensorTrain(
                tuple(torch.einsum("rijs,tju->rtisu", a, x).flatten(3, 4).flatten(0, 1) for a, x in pairs)
            )
        if isinstance(other, Tensor):
            return self._times_dense(other)
        raise KindError(
            f"a matrix multiplies a train, a TTMatrix or a tensor: the right of @ has "
            f"{type(other).__name__}, expected "
            "one of these. Convert it with torch.as_tensor."
        )

    def __rmatmul__(self, other: Any) -> TTMatrix | TensorTrain | Tensor:
        if isinstance(other, Tensor) and other.ndim == 2:
            product = self.T @ other.mT
            assert isinstance(product, Tensor)
            return product.mT
        return self.T @ other

    def _times_dense(self, x: Tensor) -> Tensor:
        if x.ndim not in (1, 2) or x.shape[0] != self.shape[1]:
            raise ShapeError(
                f"the columns of A must match the rows of x: x has shape {tuple(x.shape)}, expected "
                f"({self.shape[1]},) or ({self.shape[1]}, b). Transpose or reshape x."
            )
        check_same_place("@", self, x)
        b = 1 if x.ndim == 1 else x.shape[1]
        state = x.reshape(self.shape[1], b).T.reshape(b, *self.in_modes, 1)  # b j_1 .. j_d r
        for core in self.cores:
            state = torch.tensordot(state, core, dims=([1, state.ndim - 1], [2, 0]))  # b j_{k+1} .. i_1 .. i_k s
        y = state.reshape(b, self.shape[0])
        return y[0] if x.ndim == 1 else y.T

    def _merged(self) -> list[Tensor]:
        return [core.flatten(1, 2) for core in self.cores]

    def _like(self, merged: Sequence[Tensor], center: tuple[int, int] = (0, -1)) -> TTMatrix:
        modes = zip(self.out_modes, self.in_modes, strict=True)
        return TTMatrix(tuple(c.unflatten(1, pair) for c, pair in zip(merged, modes, strict=True)), center)

    def _matched(self, other: TTMatrix) -> tuple[TTMatrix, TTMatrix]:
        for name, mine, theirs in (
            ("out_modes", self.out_modes, other.out_modes),
            ("in_modes", self.in_modes, other.in_modes),
        ):
            if mine != theirs:
                raise ShapeError(
                    f"matrices must have equal modes: the right operand has {name} {theirs}, expected "
                    f"{mine}. "
                    "Build both with the same modes."
                )
        return self, other

    def _modes_by_name(self) -> dict[str, tuple[int, ...]]:
        return {"out_modes": self.out_modes, "in_modes": self.in_modes}


def dense_to_paired(w: Tensor, out_modes: Sequence[int], in_modes: Sequence[int]) -> Tensor:
    """``(M, N)`` to ``(i_1 j_1, .., i_d j_d)``."""
    d = len(out_modes)
    order = [axis for k in range(d) for axis in (k, d + k)]
    paired = w.reshape(*out_modes, *in_modes).permute(order)  # i_1 j_1 .. i_d j_d
    return paired.reshape([i * j for i, j in zip(out_modes, in_modes, strict=True)])


def paired_to_dense(paired: Tensor, out_modes: Sequence[int], in_modes: Sequence[int]) -> Tensor:
    """``(i_1 j_1, .., i_d j_d)`` to ``(M, N)``."""
    d = len(out_modes)
    split = paired.reshape([n for pair in zip(out_modes, in_modes, strict=True) for n in pair])
    return split.permute([*range(0, 2 * d, 2), *range(1, 2 * d, 2)]).reshape(math.prod(out_modes), math.prod(in_modes))


def _check_modes(operation: str, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    if left != right:
        raise ShapeError(
            f"operands of {operation} must share modes: the right one has {right}, expected {left} "
            "(the in_modes of the left one). Build both with the same modes."
        )


def _row_index(entry: Any, size: int) -> int | None:
    """A row or column number, or ``None`` for all of them."""
    if isinstance(entry, slice) and entry == slice(None):
        return None
    if isinstance(entry, bool) or not hasattr(entry, "__index__"):
        raise KindError(
            f"a row or column is an integer or a full slice: the index has {entry!r}, expected an int or "
            f"':'. "
            "Index the modes through TensorTrain, or use to_dense()."
        )
    at = entry.__index__()
    if not -size <= at < size:
        raise ModeIndexError(
            f"an index must lie in its axis: the index has {at}, expected {-size} to {size - 1}. Check A.shape."
        )
    return at % size


def _digits(at: int, modes: Sequence[int]) -> list[int]:
    """C-order digits of a flat index."""
    digits = []
    for n in reversed(modes):
        at, digit = divmod(at, n)
        digits.append(digit)
    return digits[::-1]
