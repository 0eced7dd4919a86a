"""What a TensorTrain and a TTMatrix share: frozen cores, exact algebra, canonical form."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from tensortrain.errors import DeviceError, DTypeError, KindError, ModeIndexError, ShapeError
from tensortrain.tensor import chain
from tensortrain.tensor.ranks import RankLike
from tensortrain.tensor.scaling import spread_pow2, times_pow2, work_dtype

__all__ = ["DTYPES", "CoreChain", "as_scalar", "check_same_kind", "check_same_place", "place_pow2"]

Self = TypeVar("Self", bound="CoreChain")
Scalar = int | float | complex | Tensor

DTYPES = (torch.float64, torch.float32, torch.complex128, torch.complex64, torch.bfloat16, torch.float16)


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
        cores = _checked_cores(self.cores, self._axes)
        object.__setattr__(self, "cores", cores)
        object.__setattr__(self, "center", _checked_center(self.center, len(cores)))

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
    def _matched(self: Self, other: Self) -> tuple[Self, Self]:
        """Both operands with equal modes, broadcast where the kind allows it."""

    # -- what it is ---------------------------------------------------------------------------------

    @property
    def order(self) -> int:
        """Number of cores."""
        return len(self.cores)

    @property
    def ranks(self) -> tuple[int, ...]:
        """All ranks, length ``order + 1``, 1 at both ends."""
        return (*(core.shape[0] for core in self.cores), self.cores[-1].shape[-1])

    @property
    def n_params(self) -> int:
        """Number of stored entries."""
        return sum(core.numel() for core in self.cores)

    @property
    def numel(self) -> int:
        """Number of entries of the dense array, a Python int that cannot overflow."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.cores[0].dtype

    @property
    def device(self) -> torch.device:
        return self.cores[0].device

    def __repr__(self) -> str:
        modes = ", ".join(f"{name}={_brief(sizes)}" for name, sizes in self._modes_by_name().items())
        where = "" if self.device.type == "cpu" else f", device={str(self.device)!r}"
        return (
            f"{type(self).__name__}({modes}, ranks={_brief(self.ranks)}, n_params={self.n_params}, "
            f"dtype={self.dtype}{where})"
        )

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
        """Frobenius norm, a real 0-d tensor.

        Computed by orthogonalization, so the norm of a difference is exact to rounding of its cores, where
        the root of an inner product would stop at 1e-8. Overflows only where the norm itself does.

        Cost: O(d n r^3) flops; O(n r^2) when ``center`` is a single core.
        """
        return times_pow2(*self._norm_parts()).to(self.cores[0].abs().dtype)

    def log_norm(self) -> Tensor:
        """Natural logarithm of the Frobenius norm, a real 0-d tensor; finite where ``norm()`` overflows."""
        mantissa, exponent = self._norm_parts()
        return (mantissa.log() + exponent * math.log(2.0)).to(self.cores[0].abs().dtype)

    def normalize(self: Self) -> Self:
        """The same direction with Frobenius norm 1; the zero tensor is returned as it is."""
        mantissa, exponent = self._norm_parts()
        if not bool(mantissa > 0):
            return self
        cores, _ = self._wide_cores()
        cores[self.center[0]] = cores[self.center[0]] / mantissa
        scaled = [core.to(self.dtype) for core in spread_pow2(cores, -int(exponent))]
        return self._like(scaled)

    def _norm_parts(self) -> tuple[Tensor, Tensor]:
        cores, center = self._wide_cores()
        return chain.norm_parts(cores, center)

    def _wide_cores(self) -> tuple[list[Tensor], tuple[int, int]]:
        """Merged cores in a dtype that LAPACK knows."""
        wide = work_dtype(self.dtype)
        # Cores of half precision are orthonormal to 1e-2 only: not good enough to skip a step.
        center = self.center if wide == self.dtype else (0, self.order - 1)
        return [core.to(wide) for core in self._merged()], center

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
        cores, exponent = chain.orthogonalize_cores(cores, center, k)
        placed, single = place_pow2(cores, int(exponent), k, self.dtype)  # one sync: where the norm can go
        return self._like([core.to(self.dtype) for core in placed], (k, k) if single else (0, -1))

    def round(self: Self, eps: float | None = None, max_rank: RankLike | None = None) -> Self:
        """Lower the ranks; the value of ``round_tt``, which also tells the error promised."""
        from tensortrain.tensor.rounding import round_tt  # builds on this type

        return round_tt(self, eps=eps, max_rank=max_rank).value

    # -- algebra ------------------------------------------------------------------------------------

    def __neg__(self: Self) -> Self:
        return self * -1

    def __add__(self: Self, other: Any) -> Self:
        scalar = as_scalar(other)
        if scalar is None:
            check_same_kind("+", self, other)
            left, right = self._matched(other)
        else:
            left = self._promoted(scalar)
            merged = left._merged()
            right = left._like(chain.constant_cores([core.shape[1] for core in merged], scalar, merged[0]))
        return left._like(chain.add_cores(left._merged(), right._merged()))

    def __radd__(self: Self, other: Any) -> Self:
        return self + other

    def __sub__(self: Self, other: Any) -> Self:
        if as_scalar(other) is None:
            check_same_kind("-", self, other)
        return self + -other

    def __rsub__(self: Self, other: Any) -> Self:
        return -self + other

    def __mul__(self: Self, other: Any) -> Self:
        scalar = as_scalar(other)
        if scalar is not None:
            return self._scaled(lambda core: core * scalar, scalar)
        check_same_kind("*", self, other)
        left, right = self._matched(other)
        return left._like(chain.hadamard_cores(left._merged(), right._merged()))

    def __rmul__(self: Self, other: Any) -> Self:
        return self * other

    def __truediv__(self: Self, other: Any) -> Self:
        scalar = as_scalar(other)
        if scalar is None:
            raise KindError(
                f"a train divides by a number only: the right of / has {type(other).__name__}, expected a "
                f"number. "
                "Approximate the quotient with tensortrain.cross."
            )
        return self._scaled(lambda core: core / scalar, scalar)

    def _scaled(self: Self, scale: Callable[[Tensor], Tensor], scalar: Scalar) -> Self:
        promoted = self._promoted(scalar)
        cores = list(promoted.cores)
        at = self.center[0]  # the core that need not be orthonormal
        cores[at] = scale(cores[at])
        return type(self)(tuple(cores), self.center)

    def _promoted(self: Self, scalar: Scalar) -> Self:
        """In the dtype that torch gives the product with this scalar (complex, where the scalar is)."""
        dtype = torch.result_type(self.cores[0], scalar)
        return self if dtype == self.dtype else self.to(dtype)


def place_pow2(cores: Sequence[Tensor], exponent: int, at: int, dtype: torch.dtype) -> tuple[list[Tensor], bool]:
    """Multiply by ``2**exponent``: core ``at`` where ``dtype`` can hold that, else every core alike.

    Returns:
        The cores, and whether core ``at`` took it all.
    """
    top = math.floor(math.log2(torch.finfo(dtype).max)) - 2
    if -top // 2 <= exponent <= top:
        placed = list(cores)
        placed[at] = times_pow2(placed[at], exponent)
        return placed, True
    return spread_pow2(cores, exponent), False


def as_scalar(value: Any) -> Scalar | None:
    """The value as a number or 0-d tensor, or ``None`` if it is something else."""
    if isinstance(value, Tensor):
        return value if value.ndim == 0 else None
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, numbers.Number) else None  # type: ignore[return-value]


def check_same_kind(operation: str, left: CoreChain, right: Any) -> None:
    """Operands of one kind, dtype and device."""
    if type(left) is not type(right):
        raise KindError(
            f"operands of {operation} must be of one kind: the right one has {type(right).__name__}, "
            f"expected "
            f"{type(left).__name__} or a number. Convert it with from_dense, or the left one with to_dense()."
        )
    check_same_place(operation, left, right)


def check_same_place(operation: str, left: CoreChain | Tensor, right: CoreChain | Tensor) -> None:
    """Operands of one dtype and device."""
    if left.dtype != right.dtype:
        raise DTypeError(
            f"operands of {operation} must share a dtype: the right one has {right.dtype}, expected "
            f"{left.dtype}. "
            "Cast one with .to(dtype)."
        )
    if left.device != right.device:
        raise DeviceError(
            f"operands of {operation} must share a device: the right one has {right.device}, expected "
            f"{left.device}. Move one with .to(device)."
        )


def _checked_cores(cores: Any, axes: Sequence[str]) -> tuple[Tensor, ...]:
    if isinstance(cores, Tensor) or not hasattr(cores, "__iter__"):
        raise KindError(
            f"cores must be a sequence of tensors: cores has {type(cores).__name__}, expected a list. "
            "Pass [core], or decompose a dense tensor with from_dense."
        )
    out = tuple(cores)
    if not out:
        raise ShapeError("a train must have a core: cores has length 0, expected at least 1. Pass one core or more.")
    for k, core in enumerate(out):
        _check_core(core, k, axes)
    _check_ranks(out)
    _check_uniform(out)
    return out


def _check_core(core: Any, k: int, axes: Sequence[str]) -> None:
    if not isinstance(core, Tensor):
        raise KindError(
            f"every core must be a tensor: cores[{k}] has {type(core).__name__}, expected torch.Tensor. "
            "Convert it with torch.as_tensor."
        )
    if core.ndim != len(axes):
        raise ShapeError(
            f"every core must have {len(axes)} axes ({', '.join(axes)}): cores[{k}] has shape "
            f"{tuple(core.shape)}, "
            f"expected {len(axes)} axes. Keep boundary ranks as axes of size 1."
        )
    if core.shape[0] < 1 or core.shape[-1] < 1:
        raise ShapeError(
            f"ranks must be at least 1: cores[{k}] has shape {tuple(core.shape)}, expected positive first "
            f"and last "
            "sizes. Use zero cores of rank 1 for the zero tensor."
        )
    if core.dtype not in DTYPES:
        raise DTypeError(
            f"cores must be of a floating or complex dtype: cores[{k}] has {core.dtype}, expected one of "
            f"{', '.join(str(dtype) for dtype in DTYPES)}. Cast it with .to(torch.float64)."
        )


def _check_ranks(cores: Sequence[Tensor]) -> None:
    for end, size, k in (("start", cores[0].shape[0], 0), ("end", cores[-1].shape[-1], len(cores) - 1)):
        if size != 1:
            raise ShapeError(
                f"boundary ranks must be 1: cores[{k}] has {size} at the {end} of the train "
                f"(shape {tuple(cores[k].shape)}), expected 1. Sum over that axis, or keep it as a mode."
            )
    for k in range(len(cores) - 1):
        left, right = cores[k], cores[k + 1]
        if left.shape[-1] != right.shape[0]:
            raise ShapeError(
                f"neighbouring cores must share a rank: cores[{k}] has last size {left.shape[-1]} but "
                f"cores[{k + 1}] "
                f"starts with {right.shape[0]} (shapes {tuple(left.shape)} and {tuple(right.shape)}), "
                f"expected "
                "equal sizes. Build consistent cores with tensortrain.randn(shape, rank)."
            )


def _check_uniform(cores: Sequence[Tensor]) -> None:
    for k, core in enumerate(cores):
        if core.dtype != cores[0].dtype:
            raise DTypeError(
                f"cores must share a dtype: cores[{k}] has {core.dtype}, expected {cores[0].dtype} as "
                f"cores[0]. "
                "Cast all with .to(dtype)."
            )
        if core.device != cores[0].device:
            raise DeviceError(
                f"cores must share a device: cores[{k}] has {core.device}, expected {cores[0].device} as "
                f"cores[0]. "
                "Move all with .to(device)."
            )


def _checked_center(center: tuple[int, int], order: int) -> tuple[int, int]:
    lo, hi = int(center[0]), int(center[1])
    hi = order - 1 if hi == -1 else hi
    if not 0 <= lo <= hi < order:
        raise ShapeError(
            f"the center must be a range of cores: center has {tuple(center)}, expected 0 <= lo <= hi <= "
            f"{order - 1}. "
            "Leave it out if the canonical form is unknown."
        )
    return lo, hi


def _brief(sizes: Sequence[int], most: int = 10) -> str:
    """A tuple of sizes that stays on one line."""
    if len(sizes) <= most:
        return str(tuple(sizes))
    head, tail = ", ".join(map(str, sizes[:4])), ", ".join(map(str, sizes[-2:]))
    return f"({head}, .. {len(sizes)} in all .., {tail})"
