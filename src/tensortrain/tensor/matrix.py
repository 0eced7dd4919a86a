"""A matrix as a chain of cores, each with an output and an input mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tensortrain.cores.algebra import contract, join_pieces
from tensortrain.cores.dense import cores_of_dense
from tensortrain.cores.environments import value_parts
from tensortrain.cores.matrix import applied, times_matrix_core, times_matrix_cores, times_train_core
from tensortrain.cores.ranks import RankLike
from tensortrain.cores.regroup import dense_to_paired, paired_to_dense, reshaped_matrix
from tensortrain.cores.scaling import times_pow2, work_dtype
from tensortrain.errors import KindError, ModeIndexError, RankError, ShapeError
from tensortrain.tensor.base import CoreChain, broadcast_batch, check_same_place
from tensortrain.tensor.train import TensorTrain, checked_dims

__all__ = [
    "TTMatrix",
    "dense_to_paired",
    "matched_factors",
    "paired_to_dense",
    "times_matrix_core",
    "times_train_core",
]


@dataclass(frozen=True, eq=False, repr=False)
class TTMatrix(CoreChain):
    r"""A matrix ``W[i, j] = G_1[:, i_1, j_1, :] .. G_d[:, i_d, j_d, :]`` held by its cores. Frozen.

    Rows run through ``(i_1 .. i_d)`` and columns through ``(j_1 .. j_d)`` in C order, first mode slowest.

    Args:
        cores: ``d`` tensors ``(r_{k-1}, i_k, j_k, r_k)`` of one dtype and device, ``r_0 = r_d = 1``; with a batch
            axis in front, ``b`` matrices of the same modes and ranks.
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
        batch_dims: int = 0,
    ) -> TTMatrix:
        """The value of ``tensortrain.tt_svd`` with modes, which also tells the error promised."""
        options: dict[str, Any] = {"eps": eps, "max_rank": max_rank, "method": method, "batch_dims": batch_dims}
        done = cores_of_dense(w, out_modes=out_modes, in_modes=in_modes, **options)
        return cls.from_merged(done.cores, out_modes, in_modes, done.center)

    @classmethod
    def from_merged(
        cls,
        merged: Sequence[Tensor],
        out_modes: Sequence[int],
        in_modes: Sequence[int],
        center: tuple[int, int] = (0, -1),
    ) -> TTMatrix:
        """From cores ``(r, i j, s)`` with both modes joined to one."""
        pairs = zip(map(int, out_modes), map(int, in_modes), strict=True)
        return cls(tuple(core.unflatten(-2, pair) for core, pair in zip(merged, pairs, strict=True)), center)

    @property
    def out_modes(self) -> tuple[int, ...]:
        """Row modes ``(i_1, .., i_d)``."""
        return tuple(core.shape[-3] for core in self.cores)

    @property
    def in_modes(self) -> tuple[int, ...]:
        """Column modes ``(j_1, .., j_d)``."""
        return tuple(core.shape[-2] for core in self.cores)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(M, N)``, the products of the modes."""
        return math.prod(self.out_modes), math.prod(self.in_modes)

    @property
    def T(self) -> TTMatrix:
        """Transpose, without conjugation."""
        return self._map(lambda core: core.transpose(-3, -2))

    @property
    def H(self) -> TTMatrix:
        """Conjugate transpose."""
        return self.T.conj()

    def to_dense(self) -> Tensor:
        """The full matrix, ``(M, N)``.  Cost: O(M N r)."""
        return paired_to_dense(contract(self._merged()), self.out_modes, self.in_modes)

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
        wide = [core.to(work_dtype(core.dtype)) for core in self.cores]  # a sum in half precision may overflow
        if len(dims) == 2:
            return self._number([reduce(core, dim=(-3, -2)) for core in wide])
        return TensorTrain(tuple(reduce(core, dim=-3 + min(dims)).to(self.dtype) for core in wide))

    def _number(self, pieces: Sequence[Tensor]) -> Tensor:
        return join_pieces(pieces, self._n_batch, dtype=self.dtype)[0][..., 0, 0]

    def var(self, dim: int | Sequence[int] | None = None, *, correction: float = 1) -> Tensor | TensorTrain:
        """Variance over rows, columns or all, as ``torch.var``; see ``TensorTrain.var``."""
        dims = checked_dims(dim, 2)
        if len(dims) != 2:
            joined = TensorTrain(tuple(self._merged()))
            d = self.order
            fine = joined.reshape([n for pair in zip(self.out_modes, self.in_modes, strict=True) for n in pair], eps=0)
            return fine.var([2 * k + min(dims) for k in range(d)], correction=correction)
        return self._variance(self.mean(), correction)  # type: ignore[arg-type]

    def trace(self) -> Tensor:
        """Sum of the diagonal, a tensor of ``batch_shape``.  Cost: O(d n r^2).

        Raises:
            ShapeError: The modes are not square.
        """
        self._check_square("a trace")
        wide = [core.to(work_dtype(core.dtype)) for core in self.cores]
        return self._number([torch.diagonal(core, dim1=-3, dim2=-2).sum(-1) for core in wide])

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Sign and natural logarithm of the modulus of the determinant of a Kronecker product (all ranks 1).

        Returns:
            As ``torch.linalg.slogdet``, each of ``batch_shape``; finite where the determinant itself overflows.

        Raises:
            ShapeError: The modes are not square.
            RankError: A rank is above 1: then no formula in the cores exists.
        """
        sign, log = self.cores[0].new_ones(self.batch_shape), self.cores[0].abs().new_zeros(self.batch_shape)
        for factor in self._kronecker_factors("a determinant"):
            s, magnitude = torch.linalg.slogdet(factor)
            power = self.shape[0] // factor.shape[-1]  # det(A (x) B) = det(A)^n_B det(B)^n_A
            sign, log = sign * s**power, log + power * magnitude
        return sign, log

    def det(self) -> Tensor:
        """Determinant of a Kronecker product (all ranks 1), ``batch_shape``; ``slogdet`` cannot overflow."""
        sign, log = self.slogdet()
        return sign * log.exp()

    def inv(self) -> TTMatrix:
        """Inverse of a Kronecker product (all ranks 1), the Kronecker product of the inverses.

        Raises:
            ShapeError: The modes are not square.
            RankError: A rank is above 1: solve a linear system instead.
        """
        inverses = [torch.linalg.inv(factor) for factor in self._kronecker_factors("an inverse")]
        return TTMatrix(tuple(inverse.unsqueeze(-3).unsqueeze(-1) for inverse in inverses))

    def bilinear(self, x: TensorTrain, y: TensorTrain) -> Tensor:
        """``x^H A y`` without forming ``A y``, a tensor of ``batch_shape``.

        Args:
            x: A train of ``out_modes``, conjugated.
            y: A train of ``in_modes``.

        Cost: O(d n r^2 R (r + n R)) flops for trains of rank r and a matrix of rank R.
        """
        _check_modes("bilinear", self.out_modes, x.shape)
        _check_modes("bilinear", self.in_modes, y.shape)
        check_same_place("bilinear", self, x)
        check_same_place("bilinear", self, y)
        wide = work_dtype(self.dtype)
        n_batch = max(train._n_batch for train in (self, x, y))
        a, u, v = ([_with_batch(core.to(wide), train, n_batch) for core in train.cores] for train in (self, x, y))
        return times_pow2(*value_parts((u, a, v))).to(self.dtype)

    def reshape(self, out_modes: Sequence[int], in_modes: Sequence[int], *, eps: float | None = None) -> TTMatrix:
        """The same matrix with other row and column modes of the same products; see ``TensorTrain.reshape``.

        ``A.reshape((2,) * L, (2,) * L)`` gives a quantized matrix.

        Raises:
            ShapeError: The products differ, or no common grouping of rows and columns exists.
        """
        cores, has_split = reshaped_matrix(self.cores, out_modes, in_modes)
        out = TTMatrix(tuple(cores))
        return out.round(eps=eps) if has_split and eps != 0 else out

    def _check_square(self, what: str) -> None:
        if self.out_modes != self.in_modes:
            raise ShapeError(
                f"{what} needs square modes: in_modes has {self.in_modes}, expected {self.out_modes} as out_modes. "
                "Build the matrix with equal modes."
            )

    def _kronecker_factors(self, what: str) -> list[Tensor]:
        self._check_square(what)
        if max(self.ranks) > 1:
            raise RankError(
                f"{what} is known for Kronecker products: ranks has {self.ranks}, expected ones. "
                "Round the matrix, or use to_dense()."
            )
        return [core[..., 0, :, :, 0] for core in self.cores]

    def __getitem__(self, key: Any) -> Tensor | TensorTrain | TTMatrix:
        row, column = self._row_and_column(key)
        cores: list[Tensor] = list(self.cores)
        for axis, at, modes in ((-2, column, self.in_modes), (-3, row, self.out_modes)):
            if at is not None:
                # once the columns are gone, rows are the last mode but one axis
                place = -2 if axis == -3 and column is not None else axis
                cores = [core.select(place, digit) for core, digit in zip(cores, _digits(at, modes), strict=True)]
        if row is not None and column is not None:
            return self._number(cores)
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
        if isinstance(other, Tensor):
            return self._times_dense(other)
        if not isinstance(other, CoreChain):
            raise KindError(
                f"a matrix multiplies a train, a TTMatrix or a tensor: the right of @ has {type(other).__name__}, "
                "expected one of these. Convert it with torch.as_tensor."
            )
        left, right = matched_factors("@", self, other)
        return right._from_paired(times_matrix_cores(left.cores, right._paired()))

    def matmul(self, other: Any) -> TTMatrix | TensorTrain | Tensor:
        """``self @ other``, for code under ``torch.compile``, which does not trace ``@`` between objects."""
        return self.__matmul__(other)

    def __rmatmul__(self, other: Any) -> TTMatrix | TensorTrain | Tensor:
        if isinstance(other, Tensor) and other.ndim == 2:
            product = self.T @ other.mT
            assert isinstance(product, Tensor)
            return product.mT
        return self.T @ other

    def _times_dense(self, x: Tensor) -> Tensor:
        axis = 0 if x.ndim == 1 else x.ndim - 2
        if not 1 <= x.ndim <= 2 + self._n_batch or x.shape[axis] != self.shape[1]:
            raise ShapeError(
                f"the columns of A must match the rows of x: x has shape {tuple(x.shape)}, expected "
                f"({self.shape[1]},) or ({self.shape[1]}, b). Transpose or reshape x."
            )
        check_same_place("@", self, x)
        wide = work_dtype(self.dtype)
        columns = x[:, None] if x.ndim == 1 else x  # .. N b
        rows = columns.mT.expand(*self.batch_shape, columns.shape[-1], self.shape[1]).to(wide)
        y = applied([core.to(wide) for core in self.cores], rows)
        y = y.reshape(*self.batch_shape, columns.shape[-1], self.shape[0]).mT.to(self.dtype)
        return y[..., 0] if x.ndim == 1 else y

    def _merged(self) -> list[Tensor]:
        return [core.flatten(-3, -2) for core in self.cores]

    def _paired(self) -> list[Tensor]:
        return list(self.cores)

    def _from_paired(self, paired: Sequence[Tensor]) -> TTMatrix:
        return TTMatrix(tuple(paired))

    @property
    def _rows(self) -> tuple[int, ...]:
        return self.out_modes

    def _like(self, merged: Sequence[Tensor], center: tuple[int, int] = (0, -1)) -> TTMatrix:
        return TTMatrix.from_merged(merged, self.out_modes, self.in_modes, center)

    def _matched(self, other: TTMatrix) -> tuple[TTMatrix, TTMatrix]:
        for name, mine, theirs in (
            ("out_modes", self.out_modes, other.out_modes),
            ("in_modes", self.in_modes, other.in_modes),
        ):
            if mine != theirs:
                raise ShapeError(
                    f"matrices must have equal modes: the right operand has {name} {theirs}, expected {mine}. Build "
                    "both with the same modes."
                )
        return broadcast_batch(self, other)

    def _modes_by_name(self) -> dict[str, tuple[int, ...]]:
        return {"out_modes": self.out_modes, "in_modes": self.in_modes}


def _with_batch(core: Tensor, train: CoreChain, n_batch: int) -> Tensor:
    return core[None] if train._n_batch < n_batch else core


def matched_factors(operation: str, a: Any, b: Any) -> tuple[TTMatrix, Any]:
    """A matrix and what it multiplies, a train or another one, checked and with the same batch axis."""
    if not isinstance(a, TTMatrix) or not isinstance(b, CoreChain):
        raise KindError(
            f"{operation} multiplies a TTMatrix by a TTMatrix or a train: the operands are {type(a).__name__} and "
            f"{type(b).__name__}, expected TTMatrix and one of both. Use @ for dense tensors."
        )
    _check_modes(operation, a.in_modes, b._rows)
    check_same_place(operation, a, b)
    return broadcast_batch(a, b)


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
            f"a row or column is an integer or a full slice: the index has {entry!r}, expected an int or ':'. Index "
            "the modes through TensorTrain, or use to_dense()."
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
