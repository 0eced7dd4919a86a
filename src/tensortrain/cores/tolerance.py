"""Tolerances: what counts as exact in a dtype, and how a promised error is made up.

A decomposition computes in float64 and stores in the dtype of its input. Its error has three parts: what was
cut off, what casting the cores lost, and the rounding of the arithmetic. Each is bounded, and the cut gets
only what the other two leave of ``eps``.

Rounding is relative to what is added up, which may be larger than the sum: between two cores there may lie a matrix and
its inverse, or two trains may nearly cancel. By how much larger is called growth here. It is 1 for orthonormal cores,
and what a train brings is measured on the way (see ``growths``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensortrain.cores.algebra import add_cores
from tensortrain.cores.canonical import norm_parts
from tensortrain.cores.scaling import in_dtype, multiplied_pow2, shares_pow2, times_pow2
from tensortrain.cores.sizes import BondSizes, Size, least_of, nothing_like, root_sum, worst_of
from tensortrain.cores.unfold import over_core
from tensortrain.errors import RankError

__all__ = [
    "ErrorBudget",
    "Finished",
    "Sizes",
    "Sweep",
    "checked_eps",
    "compute_dtype",
    "default_eps",
    "finish",
    "growths",
    "settled",
    "with_derivatives",
]

_UNIT = torch.finfo(torch.float64).eps / 2
_LARGEST_DEFAULT = 0.5  # of the default tolerance: thousands of cores of a half precision hold no more than that
_LARGEST_NOISE = 1e-6  # of what is taken for rounding and cut even if nothing is to be cut


def default_eps(dtype: torch.dtype, order: int = 1) -> float:
    """The relative tolerance that counts as exact: 1e-12, or ``2 (order + 1)`` roundings of a lower dtype, at most 0.5.

    For order 4 this is 1e-12 in float64 and complex128, 1.2e-6 in float32 and complex64, 0.078 in bfloat16.
    """
    return min(_LARGEST_DEFAULT, max(1e-12, 2 * (order + 1) * torch.finfo(dtype).eps))


def checked_eps(eps: float | None, dtype: torch.dtype, order: int) -> float:
    """``eps`` as a float, or the default.

    Raises:
        RankError: It does not lie in ``[0, 1)``.
    """
    if eps is None:
        return default_eps(dtype, order)
    try:
        holds = 0.0 <= float(eps) < 1.0  # NaN does not
    except (TypeError, ValueError):
        holds = False
    if not holds:
        raise RankError(
            f"a tolerance must lie in [0, 1): eps has {eps}, expected a relative Frobenius error. "
            "Pass eps=1e-6, for instance."
        )
    return float(eps)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64, or complex128 for complex data."""
    return torch.complex128 if dtype.is_complex else torch.float64


@dataclass(frozen=True)
class ErrorBudget:
    """How much of ``eps`` may be cut off.

    Attributes:
        eps: The tolerance asked for.
        cut: Relative error that all cuts together may make; one, or one for each member of a batch.
        arithmetic: Relative error counted for the float64 arithmetic of the decomposition, likewise.
    """

    eps: float
    cut: Size
    arithmetic: Size

    @classmethod
    def of(
        cls,
        eps: float,
        dtype: torch.dtype,
        sizes: Sequence[int],
        caps: Sequence[int],
        growth: BondSizes | None = None,
        before: Size = 0.0,
    ) -> ErrorBudget:
        """ErrorBudget for a decomposition.

        Args:
            eps: Tolerance asked for.
            dtype: Storage dtype.
            sizes: Smaller sides of the matrices factorized, length ``order + 1`` with the ends.
            caps: Largest ranks, same length.
            growth: By how much rounding grows at each inner bond, ``(order - 1, ..)``; left out, not at all.
            before: Relative error that was made already.
        """
        # Roundings at different bonds do not conspire, so their squares add. Sweeps over random tensors
        # erred by 26 units at sides of 64, 77 at 256 and 124 at 512: less than half of this.
        units = [max(16.0, 12.0 * math.sqrt(n)) for n in sizes[1:-1]]
        arithmetic: Size = _UNIT * math.hypot(*units)
        if growth is not None and units:
            # Where it grew, rounding came to a third of this in the worst of 15,000 trains.
            arithmetic = _UNIT * root_sum(_grown(units, [4.0 * math.sqrt(n) for n in sizes[1:-1]], growth))
        casting = stored = 0.0
        if dtype != compute_dtype(dtype):
            # see _casting_error: a unit of the whole per core, and what a basis feels of later cuts
            unit = torch.finfo(dtype).eps / 2
            casting = (len(caps) - 1) * unit * (1.0 + math.sqrt(max(caps)) * eps)
            stored = 2.0 * unit * math.sqrt(len(units))
        reserve = arithmetic + casting + _evaluation_error(dtype, caps) + before
        # Where rounding alone is beyond eps, no cut can keep the promise; half of eps still finds the ranks. And
        # singular values that rounding makes are never worth keeping.
        if not isinstance(reserve, Tensor):
            noise = min(0.5 * least_of(arithmetic), _LARGEST_NOISE) + stored
            return cls(eps, max(eps - reserve, eps / 2, noise), arithmetic)
        noises = torch.clamp(0.5 * torch.as_tensor(arithmetic, dtype=torch.float64), max=_LARGEST_NOISE) + stored
        cut = torch.clamp(eps - reserve, min=eps / 2).maximum(noises)
        return cls(eps, cut if cut.ndim else float(cut), arithmetic)


def _grown(units: Sequence[float], more: Sequence[float], growth: BondSizes) -> BondSizes:
    """Roundings at every bond, and by how much more they are for what they grew."""
    if not isinstance(growth, Tensor):
        return [unit + step * (grown - 1.0) for unit, step, grown in zip(units, more, growth, strict=True)]
    like = growth.new_tensor([units, more])
    plain, steps = (row.reshape(-1, *(1,) * (growth.ndim - 1)) for row in like)
    return plain + steps * (growth - 1.0)


@dataclass(frozen=True)
class Sweep:
    """Cores from a left-to-right sweep: all but the last are left-orthogonal. Sizes are relative to the whole.

    They are numbers of Python where kernels made them, of a train without a batch.

    Attributes:
        cores: ``(.., r, n, s)`` each, in the compute dtype; times ``2**exponent`` the last one is that of the train.
        spectra: The kept singular values at each of the ``d - 1`` bonds, ``(.., r)``, relative to the norm; an empty
            tensor where they are not known, an empty list where none are.
        tails: Relative root-sum-square of what was cut at each bond, ``batch_shape``.
        norm: Frobenius norm of what was swept is ``norm * 2**exponent``, ``batch_shape``; 0 only where all is zero.
        exponent: Integers, ``batch_shape``.
        before: Relative error made before the sweep; the cuts need not be orthogonal to it.
        unseen: Relative size of what may have been cut without showing in ``tails``.
        growth: By how much rounding grew at each bond, ``(d - 1, ..)``; ``None`` for not at all.
        least: The least of the kept singular values at each bond, or less, ``(d - 1, ..)``; left out: see ``spectra``.
        last: Frobenius norm and largest modulus of the last core, where they are known.
    """

    cores: list[Tensor]
    spectra: list[Tensor]
    tails: Sequence[Size]
    norm: Size
    exponent: Tensor | int
    before: Size = 0.0
    unseen: Size = 0.0
    growth: BondSizes | None = None
    least: BondSizes | None = None
    last: tuple[float, float] | None = None


@dataclass(frozen=True)
class Finished:
    """What an inner algorithm stored: cores, their center, and the promised error, of the worst member of a batch.

    ``sweep`` and ``shares`` tell how the cores came about: those of the sweep, each times its power of two. There is
    none where all is zero.
    """

    cores: tuple[Tensor, ...]
    center: tuple[int, int]
    bound: float
    bond_errors: tuple[float, ...]
    bounds: Size
    eps: float
    sweep: Sweep | None = None
    shares: Sequence[Tensor | int] = ()
    method: str = ""
    n_pieces: int | None = None

    @classmethod
    def zero(cls, modes: Sequence[int], batch: Sequence[int], like: Tensor, eps: float) -> Finished:
        """Zero cores of rank 1, in the dtype and on the device of ``like``."""
        cores = tuple(like.new_zeros((*batch, 1, n, 1)) for n in modes)
        nothing = torch.zeros(tuple(batch), dtype=torch.float64, device=like.device)
        return cls(cores, (0, len(cores) - 1), 0.0, (0.0,) * (len(cores) - 1), nothing, eps)

    @property
    def ranks(self) -> tuple[int, ...]:
        return (1, *(core.shape[-1] for core in self.cores))

    @property
    def info(self) -> dict[str, Any]:
        """How it came about, as an ``Approximation`` tells it."""
        has_batch = isinstance(self.bounds, Tensor) and self.bounds.ndim > 0
        batch = {"rel_error_bounds": self.bounds} if has_batch else {}
        pieces = {} if self.n_pieces is None else {"n_pieces": self.n_pieces}
        return {"method": self.method, "eps": self.eps, "bond_errors": self.bond_errors, **batch, **pieces}


def settled(
    sweep: Sweep,
    again: Callable[[float], Sweep],
    *,
    dtype: torch.dtype,
    budget: ErrorBudget,
    caps: Sequence[int],
) -> Finished:
    """A sweep finished, or one at a lower tolerance than that of the budget if the first missed ``eps``.

    What casting and rounding come to is known in the end only: then the cuts get what these left of ``eps``.
    """
    done = finish(sweep, dtype=dtype, budget=budget)
    is_capped = all(core.shape[-1] >= cap for core, cap in zip(done.cores, caps[1:], strict=True))
    if done.bound <= budget.eps or is_capped or not math.isfinite(done.bound):
        return done
    cuts = _total(sweep) - sweep.before
    left = least_of(budget.eps - (done.bounds - cuts))
    if left < 0.1 * budget.eps:
        return done
    closer = finish(again(0.95 * left), dtype=dtype, budget=budget)
    return closer if closer.bound < done.bound else done


def _total(sweep: Sweep) -> Size:
    return root_sum([*sweep.tails, sweep.unseen, nothing_like(sweep.norm)]) + sweep.before


def finish(sweep: Sweep, *, dtype: torch.dtype, budget: ErrorBudget) -> Finished:
    """Scale and cast the cores of a sweep, and add up what is promised.

    Args:
        sweep: Cores and what was cut.
        dtype: Storage dtype.
        budget: Gives the rounding of the sweep itself.
    """
    last = len(sweep.cores) - 1
    largest = None if sweep.last is None else sweep.last[1]
    shares, single = shares_pow2(sweep.cores, sweep.exponent, last, dtype, largest)
    stored = in_dtype(multiplied_pow2(sweep.cores, shares), dtype)
    ranks = [*(core.shape[-3] for core in sweep.cores), 1]
    others = _total(sweep) + budget.arithmetic + _evaluation_error(dtype, ranks)
    casting: Size = 0.0
    if dtype != compute_dtype(dtype) or not single:
        casting = _casting_error(sweep, stored, shares, budget.eps - others)
    bounds = _relative_to_exact(others + casting, budget.arithmetic)
    if isinstance(sweep.norm, Tensor) and isinstance(bounds, Tensor):
        bounds = bounds.where(sweep.norm > 0, 0.0)
    norm, bound, *tails = worst_of([sweep.norm, bounds, *sweep.tails])
    if norm == 0.0:
        return Finished.zero([core.shape[-2] for core in stored], stored[0].shape[:-3], stored[0], budget.eps)
    center = (last, last) if single else (0, last)
    return Finished(tuple(stored), center, bound, tuple(tails), bounds, budget.eps, sweep, shares)


def with_derivatives(done: Finished, cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The stored cores to the bit, with the derivatives of ``cores``, which equal those of the sweep to rounding."""
    placed = [core.to(kept.dtype) for core, kept in zip(multiplied_pow2(cores, done.shares), done.cores, strict=True)]
    return tuple(kept + (core - core.detach()) for core, kept in zip(placed, done.cores, strict=True))


def _relative_to_exact(bounds: Size, arithmetic: Size) -> Size:
    """Bounds relative to the norm that was computed, made relative to the norm itself.

    The two differ by the rounding of the arithmetic; where that may be half of it, nothing is known.
    """
    if not isinstance(bounds, Tensor):
        rounding = least_of(arithmetic)
        return bounds / (1.0 - rounding) if rounding < 0.5 else math.inf
    roundings = torch.as_tensor(arithmetic, dtype=bounds.dtype, device=bounds.device)
    return torch.where(roundings < 0.5, bounds / (1.0 - roundings.clamp_max(0.5)), math.inf)


Sizes = tuple[Tensor, Tensor]  # positive numbers m ``(.., r)`` and integers e ``(..)``, for m 2^e


def growths(cores: Sequence[Tensor], left: Sequence[Sizes], right: Sequence[Sizes], whole: Sizes) -> Tensor:
    """By how much the terms of the sums at each bond are larger than the whole.

    A core ``g`` with ``a`` left of it and ``c`` right of it is summed over its ranks; each term ``a_r g_rs c_s`` is
    rounded by itself, so it is their root-sum-square that counts. That is the same however the bonds are scaled.

    Args:
        cores: ``(.., r, n, s)`` each.
        left: Norms of the columns of what lies left of bonds 0 to d.
        right: Norms of the rows of what lies right of bonds 0 to d.
        whole: Norm of the train, ``(..)``.

    Returns:
        ``(d - 1, ..)``, at least 1: the worst of what is summed over a bond and in the two cores beside it.
    """
    ends = [_sizes_product(left[k], right[k], whole) for k in range(1, len(cores))]
    inner = []
    for k, core in enumerate(cores):
        sizes, exponent = left[k]
        passed = (sizes.square().unsqueeze(-2) @ core.abs().square().sum(-2)).squeeze(-2).sqrt()
        inner.append(_sizes_product((passed, exponent), right[k + 1], whole))
    if not ends:
        return whole[0].new_ones((0, *whole[0].shape))
    both = [torch.stack(parts).amax(0) for parts in zip(ends, inner[:-1], inner[1:], strict=True)]
    growth = torch.stack(both)
    # A norm of 0 made of parts that are not 0 is one that squares cannot show: nothing is known of it.
    cancelled = growth.nan_to_num(1.0, math.inf).clamp_min(1.0)
    return torch.where(whole[0] > 0, growth.nan_to_num(math.inf, math.inf).clamp_min(1.0), cancelled)


def _sizes_product(left: Sizes, right: Sizes, whole: Sizes) -> Tensor:
    size = (left[0] * right[0]).square().sum(-1).sqrt()
    return times_pow2(size, left[1] + right[1] - whole[1]) / whole[0]


def _evaluation_error(dtype: torch.dtype, ranks: Sequence[int]) -> float:
    """Relative error of ``to_dense()``, which sums ``r`` products per bond in the storage dtype.

    Products of equal entries are all rounded alike, so their errors add; beyond some thirty cores no array holds all.
    """
    unit = torch.finfo(dtype).eps / 2
    apart = math.hypot(*(max(1.5, 0.6 * math.sqrt(r)) for r in ranks[1:-1]))
    of_products = 1.5 if dtype.is_complex else 1.0
    return unit * of_products * max(apart, min(30, len(ranks) - 2))


def _casting_error(sweep: Sweep, stored: Sequence[Tensor], shares: Sequence[Tensor | int], spare: Size) -> Size:
    """Bound on what rounding the cores to storage changes, relative to the whole, ``batch_shape``.

    Where the sum of the worst cases is more than there is to spare, the change is measured.
    """
    wide = [core.to(sweep.cores[0].dtype) for core in stored]
    back = multiplied_pow2(wide, [-share for share in shares])
    total = _sum_of_changes(sweep, [a - b for a, b in zip(back, sweep.cores, strict=True)])
    if len(stored) > 1 and not bool((total <= spare).all()) and bool(total.isfinite().all()):
        difference = add_cores(back, [-sweep.cores[0], *sweep.cores[1:]])
        norm = torch.as_tensor(sweep.norm, dtype=torch.float64)
        measured = times_pow2(*norm_parts(difference, (0, len(stored) - 1))) / norm.where(norm > 0, 1.0)
        total = torch.minimum(total, measured + 1e-14)
    return total if isinstance(sweep.norm, Tensor) else float(total)


def _sum_of_changes(sweep: Sweep, changes: Sequence[Tensor]) -> Tensor:
    """How much changes of the cores come to at most.

    A change D of core k changes the whole by ``||D W||``, W being what lies right of it, since all to its
    left is orthonormal. At the time of the cut ``W W^H`` was the square of the kept singular values;
    later cuts move W by no more than their tails.
    """
    norm = torch.as_tensor(sweep.norm, dtype=torch.float64)
    later = total = torch.zeros_like(norm)
    for k in range(len(changes) - 1, -1, -1):
        change = changes[k]
        if k < len(changes) - 1:
            total = total + later * torch.linalg.vector_norm(change, dim=(-3, -2, -1))
            later = torch.hypot(later, torch.as_tensor(sweep.tails[k], dtype=later.dtype))
            is_known = bool(sweep.spectra) and sweep.spectra[k].numel() > 0
            change = change * sweep.spectra[k][..., None, None, :] if is_known else change  # they are at most 1
        else:
            change = change / over_core(norm.where(norm > 0, 1.0))
        total = total + torch.linalg.vector_norm(change, dim=(-3, -2, -1))
    return total
