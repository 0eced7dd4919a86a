"""A matrix as a chain of cores, each with an output and an input mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from tensortrain.cores.algebra import contract, join_pieces
from tensortrain.cores.ranks import RankLike
from tensortrain.cores.scales import Exponents, Scale, guarded, plain_exponent
from tensortrain.cores.scaling import times_pow2, work_dtype
from tensortrain.errors import KindError, ModeIndexError, RankError, ShapeError
from tensortrain.tensor.base import CoreChain, broadcast_batch, check_same_place
from tensortrain.tensor.train import TensorTrain, checked_dims

__all__ = ["TTMatrix", "dense_to_paired", "paired_to_dense", "times_matrix_core", "times_train_core"]


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
        from tensortrain.tensor.decompose import tt_svd  # builds on this type

        options: dict[str, Any] = {"eps": eps, "max_rank": max_rank, "method": method, "batch_dims": batch_dims}
        return tt_svd(w, out_modes=out_modes, in_modes=in_modes, **options).value

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
        value, exponent = guarded([*a, *u, *v], partial(_sandwich, a, u, v), n_batch, factors=3)
        return times_pow2(value, exponent).to(self.dtype)

    def reshape(self, out_modes: Sequence[int], in_modes: Sequence[int], *, eps: float | None = None) -> TTMatrix:
        """The same matrix with other row and column modes of the same products; see ``TensorTrain.reshape``.

        ``A.reshape((2,) * L, (2,) * L)`` gives a quantized matrix.

        Raises:
            ShapeError: The products differ, or no common grouping of rows and columns exists.
        """
        from tensortrain.tensor.regroup import reshaped_matrix  # builds on this type

        return reshaped_matrix(self, out_modes, in_modes, eps)

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
        if isinstance(other, TTMatrix):
            _check_modes("@", self.in_modes, other.out_modes)
            check_same_place("@", self, other)
            pairs = zip(*(x.cores for x in broadcast_batch(self, other)), strict=True)
            return TTMatrix(tuple(times_matrix_core(a, b) for a, b in pairs))
        if isinstance(other, TensorTrain):
            _check_modes("@", self.in_modes, other.shape)
            check_same_place("@", self, other)
            pairs = zip(*(x.cores for x in broadcast_batch(self, other)), strict=True)
            return TensorTrain(tuple(times_train_core(a, x) for a, x in pairs))
        if isinstance(other, Tensor):
            return self._times_dense(other)
        raise KindError(
            f"a matrix multiplies a train, a TTMatrix or a tensor: the right of @ has "
            f"{type(other).__name__}, expected "
            "one of these. Convert it with torch.as_tensor."
        )

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
        state = columns.mT.expand(*self.batch_shape, columns.shape[-1], self.shape[1]).unsqueeze(-1).to(wide)
        cores = [core.to(wide) for core in self.cores]
        y = guarded([state, *cores], partial(_applied, cores, state, self._n_batch), self._n_batch)
        y = y.reshape(*self.batch_shape, columns.shape[-1], self.shape[0]).mT.to(self.dtype)
        return y[..., 0] if x.ndim == 1 else y

    def _merged(self) -> list[Tensor]:
        return [core.flatten(-3, -2) for core in self.cores]

    def _like(self, merged: Sequence[Tensor], center: tuple[int, int] = (0, -1)) -> TTMatrix:
        modes = zip(self.out_modes, self.in_modes, strict=True)
        return TTMatrix(tuple(c.unflatten(-2, pair) for c, pair in zip(merged, modes, strict=True)), center)

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
        return broadcast_batch(self, other)

    def _modes_by_name(self) -> dict[str, tuple[int, ...]]:
        return {"out_modes": self.out_modes, "in_modes": self.in_modes}


def _with_batch(core: Tensor, train: CoreChain, n_batch: int) -> Tensor:
    return core[None] if train._n_batch < n_batch else core


def _sandwich(a: Sequence[Tensor], x: Sequence[Tensor], y: Sequence[Tensor], scale: Scale) -> tuple[Tensor, Exponents]:
    """``x^H A y`` up to a power of two; what is carried has an axis for the bond of x, of A and of y."""
    env = a[0].new_ones((1,) * (a[0].ndim - 1))  # t r u
    waiting: list[Exponents] = [0, 0, 0]
    for k, cores in enumerate(zip(x, a, y, strict=True)):
        for axis in range(-3, 0) if k else ():
            env, step = scale.split(env, axis)
            waiting[axis] = waiting[axis] + step
        weighed = [scale.weigh(core, w) for core, w in zip(cores, waiting, strict=True)]
        u, m, v = (core for core, _ in weighed)
        waiting = [exponent for _, exponent in weighed]
        half = torch.einsum("...tru,...ujv->...trjv", env, v)
        half = torch.einsum("...trjv,...rijs->...tisv", half, m)
        env = torch.einsum("...tin,...tisv->...nsv", u.conj(), half)
    total: Exponents = sum(plain_exponent(exponent) for exponent in waiting)
    return env[..., 0, 0, 0], total[..., 0] if isinstance(total, Tensor) else total


def _applied(cores: Sequence[Tensor], state: Tensor, n_batch: int, scale: Scale) -> Tensor:
    """Cores times columns ``(.., b, N, 1)``: modes are taken from the front, and what is done moves behind."""
    batch, b = state.shape[:n_batch], state.shape[-3]
    waiting: Exponents = 0
    of_columns: Exponents = 0
    for core in cores:
        # b (j_k rest) r to b rest (i_1 .. i_k) s
        state, step = scale.split(state, axis=-3)
        of_columns = plain_exponent(of_columns + step)
        state, step = scale.split(state)
        core, waiting = scale.weigh(core, waiting + step)
        r, _, j, s = core.shape[-4:]
        rest = state.shape[-2] // j
        split = state.reshape(*batch, b, j, rest, r).movedim(-3, -1)  # b rest r j
        weights = core.transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)  # (r j) (i s)
        state = split.flatten(-2, -1).flatten(-3, -2) @ weights  # (b rest) (i s)
        state = state.reshape(*batch, b, -1 if b else 1, s)  # b (rest i) s
    return times_pow2(state, plain_exponent(of_columns + plain_exponent(waiting)))


def times_train_core(a: Tensor, x: Tensor) -> Tensor:
    """``(.., r, i, j, s)`` and ``(.., t, j, u)`` to ``(.., r t, i, s u)``."""
    return torch.einsum("...rijs,...tju->...rtisu", a, x).flatten(-2, -1).flatten(-4, -3)


def times_matrix_core(a: Tensor, b: Tensor) -> Tensor:
    """``(.., r, i, j, s)`` and ``(.., t, j, k, u)`` to ``(.., r t, i, k, s u)``."""
    return torch.einsum("...rijs,...tjku->...rtiksu", a, b).flatten(-2, -1).flatten(-5, -4)


def dense_to_paired(w: Tensor, out_modes: Sequence[int], in_modes: Sequence[int]) -> Tensor:
    """``(.., M, N)`` to ``(.., i_1 j_1, .., i_d j_d)``."""
    d, batch = len(out_modes), w.shape[:-2]
    n = len(batch)
    order = [axis for k in range(d) for axis in (n + k, n + d + k)]
    paired = w.reshape(*batch, *out_modes, *in_modes).permute([*range(n), *order])  # i_1 j_1 .. i_d j_d
    return paired.reshape(*batch, *(i * j for i, j in zip(out_modes, in_modes, strict=True)))


def paired_to_dense(paired: Tensor, out_modes: Sequence[int], in_modes: Sequence[int]) -> Tensor:
    """``(.., i_1 j_1, .., i_d j_d)`` to ``(.., M, N)``."""
    d = len(out_modes)
    batch = paired.shape[: paired.ndim - d]
    n = len(batch)
    split = paired.reshape(*batch, *(m for pair in zip(out_modes, in_modes, strict=True) for m in pair))
    order = [*range(n), *range(n, n + 2 * d, 2), *range(n + 1, n + 2 * d, 2)]
    return split.permute(order).reshape(*batch, math.prod(out_modes), math.prod(in_modes))


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
