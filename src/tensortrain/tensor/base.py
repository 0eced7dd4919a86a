"""What a TensorTrain and a TTMatrix share: frozen cores, exact algebra, canonical form."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from tensortrain.cores.algebra import add_cores, constant_cores, deviation_parts, dot_parts, hadamard_cores
from tensortrain.cores.canonical import norm_parts, orthogonalize_cores, singular_values_at
from tensortrain.cores.ranks import RankLike
from tensortrain.cores.rounding import round_cores
from tensortrain.cores.scaling import place_pow2, spread_pow2, times_pow2, work_dtype
from tensortrain.cores.tolerance import Finished
from tensortrain.cores.unfold import over_core
from tensortrain.cores.validation import DTYPES, checked_center, checked_cores
from tensortrain.errors import DeviceError, DTypeError, KindError, ModeIndexError, ShapeError
from tensortrain.tensor.approximation import Approximation
from tensortrain.tensor.diagram import draw_chain

__all__ = [
    "DTYPES",
    "CoreChain",
    "as_scalar",
    "broadcast_batch",
    "check_same_kind",
    "check_same_place",
    "checked_chain",
    "unbiasing",
]

Self = TypeVar("Self", bound="CoreChain")
Scalar = int | float | complex | Tensor


@dataclass(frozen=True, eq=False, repr=False)
class CoreChain(ABC):
    """A frozen list of cores; see ``TensorTrain`` and ``TTMatrix``.

    ``center`` is the range ``(lo, hi)`` outside which the cores are known to be orthonormal: left-orthogonal
    before ``lo``, right-orthogonal after ``hi``. Left out, nothing is known.
    """

    cores: tuple[Tensor, ...]
    center: tuple[int, int] = (0, -1)  # -1: the last core

    _axes: ClassVar[tuple[str, ...]]
    __array_ufunc__: ClassVar[None] = None  # numpy scalars leave the arithmetic to us

    def __post_init__(self) -> None:
        cores = checked_cores(self.cores, self._axes)
        object.__setattr__(self, "cores", cores)
        object.__setattr__(self, "center", checked_center(self.center, len(cores)))

    # -- what a subclass says about its axes --------------------------------------------------------

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of ``to_dense()``."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The full array, of ``shape``."""

    @abstractmethod
    def _merged(self) -> list[Tensor]:
        """Cores with all modes joined to one: ``(r, n, s)``."""

    @abstractmethod
    def _like(self: Self, merged: Sequence[Tensor], center: tuple[int, int] = (0, -1)) -> Self:
        """The same kind with the same modes, from cores ``(r, n, s)``."""

    @abstractmethod
    def _paired(self) -> list[Tensor]:
        """Cores with an output and an input mode: ``(r, i, j, s)``, ``j = 1`` for a train."""

    @abstractmethod
    def _from_paired(self: Self, paired: Sequence[Tensor]) -> Self:
        """The same kind from cores ``(r, i, j, s)``, whose modes may be others."""

    @property
    @abstractmethod
    def _rows(self) -> tuple[int, ...]:
        """Modes that the ``in_modes`` of a matrix on the left must equal."""

    @abstractmethod
    def _matched(self: Self, other: Self) -> tuple[Self, Self]:
        """Both operands with equal modes, broadcast where the kind allows it."""

    # -- what it is ---------------------------------------------------------------------------------

    @property
    def batch_shape(self) -> torch.Size:
        """Sizes of the batch axes in front: ``()`` for a single train, ``(b,)`` for a batch."""
        return self.cores[0].shape[: self.cores[0].ndim - len(self._axes)]

    @property
    def _n_batch(self) -> int:
        return self.cores[0].ndim - len(self._axes)

    @property
    def order(self) -> int:
        """Number of cores."""
        return len(self.cores)

    @property
    def ranks(self) -> tuple[int, ...]:
        """All ranks, length ``order + 1``, 1 at both ends."""
        return (*(core.shape[-len(self._axes)] for core in self.cores), self.cores[-1].shape[-1])

    @property
    def n_params(self) -> int:
        """Number of stored entries, of all members of a batch."""
        return sum(core.numel() for core in self.cores)

    @property
    def numel(self) -> int:
        """Number of entries of the dense array (of one member of a batch), a Python int that cannot overflow."""
        return math.prod(self.shape)

    @property
    def compression(self) -> float:
        """Dense entries per stored entry; above 1 the train is the smaller one, ``inf`` beyond a float."""
        entries = self.numel * math.prod(self.batch_shape)
        digits = entries.bit_length() - self.n_params.bit_length()
        return math.inf if digits > 1022 else entries / max(1, self.n_params)

    @property
    def dtype(self) -> torch.dtype:
        return self.cores[0].dtype

    @property
    def device(self) -> torch.device:
        return self.cores[0].device

    def __repr__(self) -> str:
        modes = ", ".join(f"{name}={_brief(sizes)}" for name, sizes in self._modes_by_name().items())
        where = "" if self.device.type == "cpu" else f", device={str(self.device)!r}"
        batch = f", batch_shape={tuple(self.batch_shape)}" if self._n_batch else ""
        return (
            f"{type(self).__name__}({modes}, ranks={_brief(self.ranks)}{batch}, n_params={self.n_params}, "
            f"compression={_ratio(self.compression, self)}, dtype={self.dtype}{where})"
        )

    def diagram(self) -> str:
        """The chain in the graphical notation of tensor networks: a dot for a core, a line for an index.

        Example:
            >>> from tensortrain.tensor import ones
            >>> print(ones((4, 5)).diagram())
            ●─1─●
            │   │
            4   5
        """
        legs = [tuple(core.shape[1 + self._n_batch : -1]) for core in self.cores]
        return draw_chain(self.ranks, legs)

    def _modes_by_name(self) -> dict[str, tuple[int, ...]]:
        return {"shape": self.shape}

    # -- the same tensor elsewhere ------------------------------------------------------------------

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast every core, with the arguments of ``torch.Tensor.to``."""
        return self._map(lambda core: core.to(*args, **kwargs))

    def detach(self: Self) -> Self:
        """The same cores, cut from the autograd graph."""
        return self._map(Tensor.detach)

    def clone(self: Self) -> Self:
        """A copy of every core."""
        return self._map(Tensor.clone)

    def conj(self: Self) -> Self:
        """Complex conjugate."""
        return self._map(Tensor.conj)

    def _map(self: Self, f: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(tuple(f(core) for core in self.cores), self.center)

    # -- size ---------------------------------------------------------------------------------------

    def norm(self) -> Tensor:
        """Frobenius norm, a real tensor of ``batch_shape``: 0-d for a single train.

        Computed by orthogonalization, so the norm of a difference is exact to rounding of its cores, where
        the root of an inner product would stop at 1e-8. Overflows only where the norm itself does.

        Cost: O(d n r^3) flops; O(n r^2) when ``center`` is a single core.
        """
        return times_pow2(*self._norm_parts()).to(self.cores[0].abs().dtype)

    def log_norm(self) -> Tensor:
        """Natural logarithm of the Frobenius norm, real, ``batch_shape``; finite where ``norm()`` overflows."""
        mantissa, exponent = self._norm_parts()
        return (mantissa.log() + exponent.to(mantissa.dtype) * math.log(2.0)).to(self.cores[0].abs().dtype)

    def normalize(self: Self) -> Self:
        """The same direction with Frobenius norm 1; the zero tensor stays as it is."""
        mantissa, exponent = self._norm_parts()
        is_zero = mantissa == 0
        mantissa, exponent = mantissa.where(~is_zero, 1.0), exponent.where(~is_zero, 0)
        cores, center = self._wide_cores()
        at = center[0]
        cores[at] = cores[at] / over_core(mantissa)
        if center[0] == center[1] and self.dtype == cores[0].dtype:  # the norm sits in one core, and stays there
            cores[at] = times_pow2(cores[at], -exponent)
            return self._like(cores, center)
        return self._like([core.to(self.dtype) for core in spread_pow2(cores, -exponent)])

    def _norm_parts(self) -> tuple[Tensor, Tensor]:
        cores, center = self._wide_cores()
        return norm_parts(cores, center)

    def _variance(self: Self, mean: Tensor, correction: float) -> Tensor:
        factor = unbiasing(self.numel, correction)
        real = self.cores[0].abs().dtype
        cores = [core.detach() for core in self._wide_cores()[0]]
        root, exponent = deviation_parts(cores)
        value = times_pow2(root.square() * factor, 2 * exponent).to(real)
        if torch.is_grad_enabled() and any(core.requires_grad for core in self.cores):
            # The derivative of a QR does not exist for cores of deficient rank, that of the squares does.
            centred, _ = (self - mean)._wide_cores()
            square, doubled = dot_parts(centred, centred)
            square = square.real if square.is_complex() else square
            size = self.numel.bit_length()
            square = times_pow2(square * (factor / float(Fraction(self.numel, 1 << size))), doubled - size).to(real)
            value = value + (square - square.detach())
        return value

    def _wide_cores(self) -> tuple[list[Tensor], tuple[int, int]]:
        """Merged cores in a dtype that LAPACK knows."""
        wide = work_dtype(self.dtype)
        # Cores of half precision are orthonormal to 1e-2 only: not good enough to skip a step.
        center = self.center if wide == self.dtype else (0, self.order - 1)
        merged = self._merged()
        return merged if wide == self.dtype else [core.to(wide) for core in merged], center

    # -- canonical form -----------------------------------------------------------------------------

    def orthogonalize(self: Self, k: int) -> Self:
        """The same tensor with every core but core ``k`` orthonormal.

        Args:
            k: Core that keeps the norm; negative counts from the end.

        Returns:
            A train with ``center == (k, k)``, unless its norm does not fit one core: then every core carries
            an equal power of two, and ``center`` is unknown.

        Raises:
            ModeIndexError: There is no core ``k``.

        Cost: O(d n r^3) flops, less by what ``center`` already says.
        """
        if not -self.order <= k < self.order:
            raise ModeIndexError(
                f"the center must be a core: k has {k}, expected {-self.order} to {self.order - 1}. "
                "Pass the number of a core."
            )
        k %= self.order
        cores, center = self._wide_cores()
        cores, exponent = orthogonalize_cores(cores, center, k)
        placed, single = place_pow2(cores, exponent, k, self.dtype)
        return self._like([core.to(self.dtype) for core in placed], (k, k) if single else (0, -1))

    def singular_values(self, bond: int) -> Tensor:
        """Singular values of the unfolding at a bond, descending.

        Args:
            bond: Number of cores to its left, ``1 .. order - 1``; the values are as many as ``ranks[bond]`` at most.

        Returns:
            Real, ``(*batch_shape, t)``.

        Raises:
            ModeIndexError: There is no such bond.

        Cost: O(d n r^3) flops, less by what ``center`` already says.
        """
        values, exponent = self._bond_spectrum(bond)
        return times_pow2(values, exponent).to(self.cores[0].abs().dtype)

    def entropy(self, bond: int) -> Tensor:
        r"""Von Neumann entropy across a bond, in nats: ``-sum p log p`` with ``p = s^2 / sum s^2``.

        Args:
            bond: Number of cores to its left, ``1 .. order - 1``.

        Returns:
            Real, ``batch_shape``, between 0 and ``log(ranks[bond])``; 0 for the zero tensor.

        Raises:
            ModeIndexError: There is no such bond.

        Example:
            >>> from tensortrain.tensor import ones
            >>> float(ones((2, 2)).entropy(1))
            0.0
        """
        values, _ = self._bond_spectrum(bond)
        weights = values.square()
        total = weights.sum(-1, keepdim=True)
        weights = weights / total.where(total > 0, 1.0)
        return torch.special.entr(weights).sum(-1).clamp_min(0.0).to(self.cores[0].abs().dtype)

    def _bond_spectrum(self, bond: int) -> tuple[Tensor, Tensor]:
        if not 1 <= bond < self.order:
            raise ModeIndexError(
                f"a bond lies between two cores: bond has {bond}, expected 1 to {self.order - 1} (the number of cores "
                "to its left). Pass one of these."
            )
        return singular_values_at(*self._wide_cores(), bond)

    def round(self: Self, eps: float | None = None, max_rank: RankLike | None = None) -> Self:
        """Lower the ranks; the value of ``round_tt``, which also tells the error promised."""
        return self._approximated(round_cores(self._merged(), self.center, eps=eps, max_rank=max_rank)).value

    def _approximated(self: Self, done: Finished) -> Approximation[Self]:
        """The same kind with the same modes, from what an inner algorithm stored."""
        return Approximation(self._like(done.cores, done.center), done.bound, done.info)

    # -- algebra ------------------------------------------------------------------------------------

    def __neg__(self: Self) -> Self:
        return self * -1

    def __add__(self: Self, other: Any) -> Self:
        scalar = as_scalar(other, self.batch_shape)
        if scalar is None:
            check_same_kind("+", self, other)
            left, right = self._matched(other)
        else:
            left = self._promoted(scalar)
            merged = left._merged()
            right = left._like(constant_cores([core.shape[-2] for core in merged], scalar, merged[0]))
        return left._like(add_cores(left._merged(), right._merged()))

    def __radd__(self: Self, other: Any) -> Self:
        return self + other

    def __sub__(self: Self, other: Any) -> Self:
        if as_scalar(other, self.batch_shape) is None:
            check_same_kind("-", self, other)
        return self + -other

    def __rsub__(self: Self, other: Any) -> Self:
        return -self + other

    def __mul__(self: Self, other: Any) -> Self:
        scalar = as_scalar(other, self.batch_shape)
        if scalar is not None:
            if not isinstance(scalar, Tensor) and scalar == 0:
                return self._promoted(scalar)._zeros()
            return self._scaled(lambda core: core * over_core(scalar), scalar)
        check_same_kind("*", self, other)
        left, right = self._matched(other)
        return left._like(hadamard_cores(left._merged(), right._merged()))

    def __rmul__(self: Self, other: Any) -> Self:
        return self * other

    def __truediv__(self: Self, other: Any) -> Self:
        scalar = as_scalar(other, self.batch_shape)
        if scalar is None:
            raise KindError(
                f"a train divides by a number only: the right of / has {type(other).__name__}, expected a number. "
                "Approximate the quotient with tensortrain.cross."
            )
        return self._scaled(lambda core: core / over_core(scalar), scalar)

    def _scaled(self: Self, scale: Callable[[Tensor], Tensor], scalar: Scalar) -> Self:
        promoted = self._promoted(scalar)
        cores = list(promoted.cores)
        at = self.center[0]  # the core that need not be orthonormal
        cores[at] = scale(cores[at])
        return type(self)(tuple(cores), self.center)

    def _zeros(self: Self) -> Self:
        """The zero tensor of the same modes, of rank 1."""
        return self._like([core.new_zeros((*self.batch_shape, 1, core.shape[-2], 1)) for core in self._merged()])

    def _promoted(self: Self, scalar: Scalar) -> Self:
        """In the dtype that torch gives the product with this scalar (complex, where the scalar is)."""
        is_complex = scalar.is_complex() if isinstance(scalar, Tensor) else isinstance(scalar, complex)
        dtype = self.dtype.to_complex() if is_complex else self.dtype
        if isinstance(scalar, Tensor) and scalar.ndim:
            dtype = torch.promote_types(dtype, scalar.dtype)
        return self if dtype == self.dtype else self.to(dtype)


def unbiasing(count: int, correction: float) -> float:
    """What a mean square is multiplied by for ``count - correction`` to be its divisor; counts may exceed a float."""
    divisor = Fraction(count) - Fraction(correction)
    if divisor > 0:
        return float(count / divisor)
    return math.inf if count > 1 else math.nan  # as torch divides by zero


def as_scalar(value: Any, batch_shape: Sequence[int] = ()) -> Scalar | None:
    """The value as a number, a 0-d tensor or a tensor of ``batch_shape``; ``None`` if it is something else."""
    if isinstance(value, Tensor):
        return value if value.ndim == 0 or tuple(value.shape) == tuple(batch_shape) else None
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, numbers.Number) else None  # type: ignore[return-value]


def broadcast_batch(left: CoreChain, right: CoreChain) -> tuple[Any, Any]:
    """Both trains with the same batch axis; sizes 1 and n broadcast, and so does a train without one."""
    if left.batch_shape == right.batch_shape:
        return left, right
    try:
        batch = torch.broadcast_shapes(left.batch_shape, right.batch_shape)
    except RuntimeError:
        raise ShapeError(
            f"batches must broadcast: the right operand has batch_shape {tuple(right.batch_shape)}, expected "
            f"{tuple(left.batch_shape)}. Sizes must be equal, or one of them 1."
        ) from None
    return tuple(x if x.batch_shape == batch else _expanded(x, batch) for x in (left, right))  # type: ignore[return-value]


def _expanded(x: Self, batch: Sequence[int]) -> Self:
    return x._map(lambda core: core.expand(*batch, *core.shape[core.ndim - len(x._axes) :]))


def checked_chain(operation: str, value: Any, name: str = "x") -> CoreChain:
    """The value as a train or a matrix: what has no cores is refused here."""
    if not isinstance(value, CoreChain):
        raise KindError(
            f"{operation} works on trains: {name} has {type(value).__name__}, expected TensorTrain or TTMatrix. "
            "Decompose a dense tensor with tensortrain.tt_svd."
        )
    return value


def check_same_kind(operation: str, left: CoreChain, right: Any) -> None:
    """Operands of one kind, dtype and device."""
    if type(left) is not type(right):
        raise KindError(
            f"operands of {operation} must be of one kind: the right one has {type(right).__name__}, expected "
            f"{type(left).__name__} or a number. Convert it with from_dense, or the left one with to_dense()."
        )
    check_same_place(operation, left, right)


def check_same_place(operation: str, left: CoreChain | Tensor, right: CoreChain | Tensor) -> None:
    """Operands of one dtype and device."""
    if left.dtype != right.dtype:
        raise DTypeError(
            f"operands of {operation} must share a dtype: the right one has {right.dtype}, expected {left.dtype}. Cast "
            "one with .to(dtype)."
        )
    if left.device != right.device:
        raise DeviceError(
            f"operands of {operation} must share a device: the right one has {right.device}, expected "
            f"{left.device}. Move one with .to(device)."
        )


def _brief(sizes: Sequence[int], most: int = 10) -> str:
    """A tuple of sizes that stays on one line."""
    if len(sizes) <= most:
        return str(tuple(sizes))
    head, tail = ", ".join(map(str, sizes[:4])), ", ".join(map(str, sizes[-2:]))
    return f"({head}, .. {len(sizes)} in all .., {tail})"


def _ratio(value: float, x: CoreChain) -> str:
    if math.isinf(value):
        return f"10^{math.floor((x.numel.bit_length() - x.n_params.bit_length()) * math.log10(2))}x"
    return f"{value:.3g}x"
