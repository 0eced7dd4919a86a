"""A point of the manifold: a train together with its left- and its right-orthogonal form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensortrain.cores.canonical import left_qr, right_qr
from tensortrain.cores.scaling import split_pow2
from tensortrain.errors import DTypeError, KindError, NonFiniteError, RankError, ShapeError
from tensortrain.tensor.base import CoreChain

__all__ = ["Point", "embed_cores"]

_DTYPES = (torch.float64, torch.float32, torch.complex128, torch.complex64)


@dataclass(frozen=True, eq=False, repr=False)
class Point:
    r"""A train ``X`` with orthonormal bases on both sides of every bond. Frozen; made by ``Point.of``.

    For bonds ``k = 1 .. d - 1``, up to the factor ``2**exponent``, ``X = U_1 .. U_k S_k V_{k+1} .. V_d``.
    Whatever geometry needs of ``X`` is here, so a point that is used often is made once and passed as ``at=``.

    Attributes:
        base: The train as it was given; a copy without gradient, where its cores require one.
        left: ``U_1 .. U_{d-1}``, left-orthogonal ``(r, n, s)``.
        right: ``V_2 .. V_d``, right-orthogonal ``(r, n, s)``.
        bonds: ``S_1 .. S_{d-1}``, lower triangular ``(r_k, r_k)``; their singular values are those of the unfoldings.
        last: ``(r_{d-1}, n_d, 1)``: ``X = U_1 .. U_{d-1} last``.
        exponent: Power of two taken out of ``bonds`` and ``last``, 0-d.
        carries: ``(R_k, e_k)`` with ``G_1 .. G_k = U_1 .. U_k R_k 2**e_k`` for the given cores ``G``.
    """

    base: CoreChain
    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    bonds: tuple[Tensor, ...]
    last: Tensor
    exponent: Tensor
    carries: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    @torch.no_grad()
    def of(cls, x: CoreChain | Point) -> Point:
        """The point at a train, or the point itself.

        Args:
            x: Order d, ranks ``r_0 .. r_d``.

        Raises:
            KindError: ``x`` is no train.
            DTypeError: ``x`` is in half precision.
            NonFiniteError: A core holds NaN or Inf.
            RankError: An unfolding of ``x`` has a lower rank than the train: no tangent space there.

        Cost: O(d n r^3) flops, and one host sync for the check of the ranks.
        """
        if isinstance(x, Point):
            return x
        cores = _checked_cores(x)
        left, carries, last, exponent = _left_sweep(cores)
        right, bonds = _right_sweep(left, last)
        _check_ranks(x.ranks, bonds)
        frozen = x.detach().clone() if any(core.requires_grad for core in x.cores) else x  # parameters will move on
        return cls(frozen, left, right, bonds, last, exponent, carries)

    @property
    def order(self) -> int:
        """Number of cores."""
        return len(self.left) + 1

    @property
    def dimension(self) -> int:
        """Dimension of the tangent space: ``sum r_{k-1} n_k r_k - sum r_k^2``."""
        return self.base.n_params - sum(r * r for r in self.base.ranks[1:-1])

    def __repr__(self) -> str:
        return f"Point({self.base!r})"

    def embed(self, deltas: Sequence[Tensor]) -> list[Tensor]:
        """Cores of ``embed_cores`` at this point."""
        return embed_cores(self.left, self.right, deltas)


def embed_cores(left: Sequence[Tensor], right: Sequence[Tensor], deltas: Sequence[Tensor]) -> list[Tensor]:
    """Cores, of ranks ``2 r``, of the sum over k of ``U_1 .. U_{k-1} delta_k V_{k+1} .. V_d``."""
    if len(deltas) == 1:
        return [deltas[0]]
    first = torch.cat((deltas[0], left[0]), dim=2)
    middle = map(_block, right, deltas[1:-1], left[1:])
    return [first, *middle, torch.cat((right[-1], deltas[-1]), dim=0)]


def _block(right: Tensor, delta: Tensor, left: Tensor) -> Tensor:
    """``[[V, 0], [delta, U]]``: the upper row has the delta behind it."""
    zero = right.new_zeros((right.shape[0], left.shape[1], left.shape[2]))
    return torch.cat((torch.cat((right, zero), dim=2), torch.cat((delta, left), dim=2)), dim=0)


def _left_sweep(
    cores: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], tuple[tuple[Tensor, Tensor], ...], Tensor, Tensor]:
    left, carries = [], []
    state, exponent = split_pow2(cores[0])
    for core in cores[1:]:
        q, carry = left_qr(state)
        left.append(q)
        carries.append((carry, exponent))
        state, step = split_pow2(torch.tensordot(carry, core, dims=1))
        exponent = exponent + step
    return tuple(left), tuple(carries), state, exponent


def _right_sweep(left: Sequence[Tensor], last: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    right, bonds = [], []
    state = last
    for core in reversed(left):
        q, bond = right_qr(state)  # the norm of a bond is that of `last`: all else is orthonormal
        right.append(q)
        bonds.append(bond)
        state = torch.tensordot(core, bond, dims=1)
    return tuple(right[::-1]), tuple(bonds[::-1])


def _checked_cores(x: CoreChain) -> list[Tensor]:
    if not isinstance(x, CoreChain):
        raise KindError(
            f"a point of the manifold is a train: found {type(x).__name__}, expected TensorTrain or TTMatrix. "
            "Decompose a dense tensor with tensortrain.tt_svd."
        )
    if x.dtype not in _DTYPES:
        raise DTypeError(
            f"geometry needs at least single precision: x has {x.dtype}, expected one of "
            f"{', '.join(map(str, _DTYPES))}. Cast it with x.to(torch.float32)."
        )
    cores = [core.detach() for core in x._merged()]
    if any(core.ndim != 3 for core in cores):
        raise ShapeError(
            f"a point is one train: x has cores of shape {tuple(x.cores[0].shape)}, expected no batch axis. "
            "Treat the members of a batch one by one."
        )
    finite = torch.stack([torch.isfinite(core).all() for core in cores]).tolist()  # one sync for all cores
    if not all(finite):
        raise NonFiniteError(
            f"a point must be finite: cores[{finite.index(False)}] has NaN or Inf, expected none. "
            "Lower the step size, or find where they come from."
        )
    return cores


def _check_ranks(ranks: Sequence[int], bonds: Sequence[Tensor]) -> None:
    """Every unfolding has full rank, as far as the dtype can tell."""
    if not bonds:
        return
    spectra = [torch.linalg.svdvals(bond) for bond in bonds]
    # Rounding of 2 d factorizations leaves singular values of about this size where there should be none.
    unit = 8 * torch.finfo(bonds[0].dtype).eps * (len(bonds) + 1) ** 0.5
    counts = torch.stack([(s > unit * s[0]).sum() for s in spectra]).tolist()  # one sync for all bonds
    for k, (rank, found) in enumerate(zip(ranks[1:-1], counts, strict=True), start=1):
        if found < rank:
            raise RankError(
                f"the ranks of a point must be those of its tensor: bond {k} has rank {rank} but the unfolding "
                f"there has numerical rank {found}, expected {rank} (the tangent space is undefined). Lower the ranks "
                "with x.round(eps=1e-10) or, for float32, x.round(eps=1e-5); or add noise with tensortrain.randn."
            )
