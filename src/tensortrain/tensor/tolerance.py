"""Tolerances: what counts as exact in a dtype, and how a promised error is made up.

A decomposition computes in float64 and stores in the dtype of its input. Its error has three parts: what was
cut off, what casting the cores lost, and the rounding of the arithmetic. Each is bounded, and the cut gets
only what the other two leave of ``eps``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensortrain.errors import RankError
from tensortrain.tensor.chain import over_core, place_pow2

__all__ = ["Budget", "Sweep", "checked_eps", "compute_dtype", "default_eps", "finish"]

_UNIT = torch.finfo(torch.float64).eps / 2


def default_eps(dtype: torch.dtype, order: int = 1) -> float:
    """The relative tolerance that counts as exact: 1e-12, or ``2 (order + 1)`` roundings of a lower dtype.

    For order 4 this is 1e-12 in float64 and complex128, 1.2e-6 in float32 and complex64, 0.078 in bfloat16.
    """
    return max(1e-12, 2 * (order + 1) * torch.finfo(dtype).eps)


def checked_eps(eps: float | None, dtype: torch.dtype, order: int) -> float:
    """``eps`` as a float, or the default.

    Raises:
        RankError: It does not lie in ``[0, 1)``.
    """
    if eps is None:
        return default_eps(dtype, order)
    if not 0.0 <= eps < 1.0:  # also catches NaN
        raise RankError(
            f"a tolerance must lie in [0, 1): eps has {eps}, expected a relative Frobenius error. "
            "Pass eps=1e-6, for instance."
        )
    return float(eps)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64, or complex128 for complex data."""
    return torch.complex128 if dtype.is_complex else torch.float64


@dataclass(frozen=True)
class Budget:
    """How much of ``eps`` may be cut off.

    Attributes:
        cut: Relative error that all cuts together may make.
        arithmetic: Relative error counted for the float64 arithmetic of the decomposition.
    """

    cut: float
    arithmetic: float

    @classmethod
    def of(
        cls,
        eps: float,
        dtype: torch.dtype,
        sizes: Sequence[int],
        caps: Sequence[int],
        amplification: float = 1.0,
    ) -> Budget:
        """Budget for a decomposition.

        Args:
            eps: Tolerance asked for.
            dtype: Storage dtype.
            sizes: Smaller sides of the matrices factorized, length ``order + 1`` with the ends.
            caps: Largest ranks, same length.
            amplification: By how much errors of the cores grow, relative to the norm of the whole.
        """
        # Roundings at different bonds do not conspire, so their squares add. Sweeps over random tensors
        # erred by 26 units at sides of 64, 77 at 256 and 124 at 512: less than half of this.
        units = math.hypot(*(max(16.0, 12.0 * math.sqrt(n)) for n in sizes[1:-1]))
        arithmetic = amplification * _UNIT * units
        casting = 0.0
        if dtype != compute_dtype(dtype):
            # see _casting_error: a unit of the whole per core, and what a basis feels of later cuts
            unit = torch.finfo(dtype).eps / 2
            casting = (len(caps) - 1) * unit * (1.0 + math.sqrt(max(caps)) * eps)
        reserve = arithmetic + casting + _evaluation_error(dtype, caps)
        # Where rounding alone is beyond eps, no cut can keep the promise; half of eps still finds the ranks.
        return cls(cut=max(eps - reserve, eps / 2), arithmetic=arithmetic)


@dataclass(frozen=True)
class Sweep:
    """Cores from a left-to-right sweep: all but the last are left-orthogonal. Sizes are relative to the whole.

    Attributes:
        cores: ``(.., r, n, s)`` each, in the compute dtype; times ``2**exponent`` the last one is that of the train.
        spectra: The kept singular values at each of the ``d - 1`` bonds, ``(.., r)``, relative to the norm.
        tails: Relative root-sum-square of what was cut at each bond, ``batch_shape``.
        norm: Frobenius norm of what was swept is ``norm * 2**exponent``, ``batch_shape``; 0 only where all is zero.
        exponent: Integers, ``batch_shape``.
        before: Relative error made before the sweep, orthogonal to the cuts.
    """

    cores: list[Tensor]
    spectra: list[Tensor]
    tails: list[Tensor]
    norm: Tensor
    exponent: Tensor
    before: Tensor | float = 0.0


@dataclass(frozen=True)
class Finished:
    """What a sweep stored: cores, their center, and the promised error, of the worst member of a batch."""

    cores: tuple[Tensor, ...]
    center: tuple[int, int]
    bound: float
    bond_errors: tuple[float, ...]
    bounds: Tensor
    is_zero: bool


def finish(sweep: Sweep, *, dtype: torch.dtype, budget: Budget) -> Finished:
    """Scale and cast the cores of a sweep, and add up what is promised.

    Args:
        sweep: Cores and what was cut.
        dtype: Storage dtype.
        budget: Gives the rounding of the sweep itself.
    """
    last = len(sweep.cores) - 1
    placed, single = place_pow2(sweep.cores, sweep.exponent, last, dtype)
    stored = [core.to(dtype) for core in placed]
    casting: Tensor | float = 0.0
    if dtype != compute_dtype(dtype):
        casting = _casting_error(sweep, placed, stored)
    ranks = [1, *(spectrum.shape[-1] for spectrum in sweep.spectra), 1]
    rounding = budget.arithmetic + _evaluation_error(dtype, ranks)
    tails = torch.stack([*sweep.tails, torch.zeros_like(sweep.norm)])
    squares = tails.square().sum(0) + sweep.before**2
    bounds = torch.where(sweep.norm > 0, squares.sqrt() + casting + rounding, 0.0)
    worst = torch.cat((sweep.norm.reshape(1, -1), bounds.reshape(1, -1), tails[:-1].reshape(last, sweep.norm.numel())))
    numbers = worst.amax(1).tolist() if worst.shape[1] else [0.0] * (last + 2)  # one sync for all
    center = (last, last) if single else (0, last)
    return Finished(tuple(stored), center, numbers[1], tuple(numbers[2:]), bounds, is_zero=numbers[0] == 0.0)


def _evaluation_error(dtype: torch.dtype, ranks: Sequence[int]) -> float:
    """Relative error of ``to_dense()``, which sums ``r`` products per bond in the storage dtype."""
    unit = torch.finfo(dtype).eps / 2
    return unit * math.hypot(*(max(1.0, 0.5 * math.sqrt(r)) for r in ranks[1:-1]))


def _casting_error(sweep: Sweep, placed: Sequence[Tensor], stored: Sequence[Tensor]) -> Tensor:
    """Bound on what rounding the cores to storage changes, relative to the whole, ``batch_shape``.

    A change D of core k changes the whole by ``||D W||``, W being what lies right of it, since all to its
    left is orthonormal. At the time of the cut ``W W^H`` was the square of the kept singular values;
    later cuts move W by no more than their tails.
    """
    later = total = torch.zeros_like(sweep.norm)
    for k in range(len(stored) - 1, -1, -1):
        # relative to the core as placed, which may carry a power of two
        change = torch.where(placed[k] == 0, 0.0, (stored[k].to(placed[k].dtype) - placed[k]) / placed[k])
        change = change * sweep.cores[k]
        if k < len(stored) - 1:
            total = total + later * torch.linalg.vector_norm(change, dim=(-3, -2, -1))
            later = torch.hypot(later, sweep.tails[k])
            change = change * sweep.spectra[k][..., None, None, :]
        else:
            change = change / over_core(sweep.norm.where(sweep.norm > 0, 1.0))
        total = total + torch.linalg.vector_norm(change, dim=(-3, -2, -1))
    return total
