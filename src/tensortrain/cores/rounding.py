"""Lower the ranks of a list of cores with a promised error."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from tensortrain.cores.canonical import Span, singular_values_at
from tensortrain.cores.linalg import choose_rank, cut, cut_along, cut_basis, gram_basis, reorthonormalized
from tensortrain.cores.ranks import RankLike, count_params, max_ranks, ranks_within, resolve_ranks
from tensortrain.cores.roots import Roots, Scaled, gram_roots, left_sizes, triangles
from tensortrain.cores.scaling import in_dtype, split_pow2, times_pow2
from tensortrain.cores.sizes import BondSizes, Size, any_above, larger, root_sum
from tensortrain.cores.sketch import OVERSAMPLING, Plain, sketched_cores
from tensortrain.cores.tolerance import (
    ErrorBudget,
    Finished,
    Sizes,
    Sweep,
    checked_eps,
    compute_dtype,
    growths,
    settled,
    with_derivatives,
)
from tensortrain.cores.unfold import absorb_left, absorb_right, as_left, as_right
from tensortrain.cores.walks import rounding_walk
from tensortrain.errors import NonFiniteError, RankError

__all__ = ["METHODS", "SQUARED_FLOOR", "round_cores"]

Cut = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]

# Below this relative tolerance a square (a Gram matrix, the difference of two squared norms) holds no information:
# rounding is 1e-16 of the square of the norm, hence 2e-8 of the norm, and sums of some hundred terms make it worse.
SQUARED_FLOOR = 4e-7
SQUARED_UNIT = SQUARED_FLOOR / 10
# What a walk by squares leaves unseen at a bond.
_WALK_UNIT = 1e-8
_ROOM = 0.15  # of the tolerance, whose square then has all but a fortieth left: cuts are at most a ninetieth smaller


def round_cores(
    cores: Sequence[Tensor],
    center: Span,
    *,
    eps: float | None = None,
    max_rank: RankLike | None = None,
    method: str = "svd",
    max_params: int | None = None,
    dtype: torch.dtype | None = None,
) -> Finished:
    """Cores of lower rank, with derivatives where the given ones have them; see ``round_tt``.

    Args:
        cores: ``(.., r, n, s)`` each, of any dtype.
        center: Range outside which they are orthonormal.
        eps, max_rank, method, max_params: As for ``round_tt``.
        dtype: What the result is stored in, within ``eps`` all the same; that of the cores if left out.
    """
    dtype = dtype or cores[0].dtype
    modes = [core.shape[-2] for core in cores]
    with torch.no_grad():
        plain = [core.detach() if core.requires_grad else core for core in cores]
        wide = in_dtype(plain, compute_dtype(cores[0].dtype))
        limits = max_ranks(modes) if max_rank is None else resolve_ranks(modes, max_rank)
        ranks = (*(core.shape[-3] for core in cores), 1)
        eps = checked_eps(eps, dtype, len(cores))
        # In lower dtypes cores are orthonormal to 1e-7 at best: not good enough for float64 to build on.
        span = center if cores[0].dtype == wide[0].dtype else (0, len(cores) - 1)
        problem, caps = _Problem(wide, span, dtype, eps, ranks), tuple(map(min, limits, ranks))
        if method != "svd" or problem.walk is None:  # a walk meets every entry
            _check_finite(wide)
        if max_params is not None:
            caps = _caps_within(problem, caps, max_params)
        resolves = eps >= SQUARED_FLOOR or max_rank is not None or max_params is not None
        done = _by_method(problem, caps, method if resolves else "svd")
    if torch.is_grad_enabled() and any(core.requires_grad for core in cores):
        return replace(done, cores=_cut_again(cores, done))
    return done


def _by_method(problem: _Problem, caps: Sequence[int], method: str) -> Finished:
    """By the method asked for, unless what that cannot see keeps it from the tolerance."""
    if method != "svd":
        found = METHODS[method](problem, caps)
        if found is not None and (found.bound <= problem.eps or _is_held_by(found, caps)):
            return replace(found, method=method)
    return replace(_round_svd(problem, caps), method="svd")


def _is_held_by(found: Finished, caps: Sequence[int]) -> bool:
    """Whether it is a cap that makes the bound what it is, not what squares cannot show."""
    assert found.sweep is not None  # of zeros the bound is zero
    is_capped = any(core.shape[-1] >= cap for core, cap in zip(found.cores[:-1], caps[1:], strict=False))
    return is_capped and bool(torch.as_tensor(found.sweep.unseen <= 0.02 * found.bounds).all())


@dataclass(frozen=True)
class _Problem:
    """What is to be rounded: a train, the dtype that it goes to, and how closely."""

    given: list[Tensor]
    center: Span
    dtype: torch.dtype
    eps: float
    ranks: tuple[int, ...]
    scaled: Scaled | None = None

    @cached_property
    def train(self) -> Scaled:
        """The train with numbers that no step takes out of the range."""
        return self.scaled or Scaled.of(self.given, self.center)

    @cached_property
    def walk(self) -> Any | None:
        """What lies right of each bond, where kernels know it. Most trains need no scaling but one power of two."""
        return None if self.scaled else rounding_walk(self.given, self.center[1], squares=self.may_square)

    @property
    def least_unseen(self) -> float:
        """What squares cannot show of a train whose roundings do not grow: two of them at every bond."""
        return _WALK_UNIT * math.sqrt(2.0 * max(1, len(self.given) - 1))

    @property
    def may_square(self) -> bool:
        """Whether the tolerance leaves squares their room."""
        return self.least_unseen <= _ROOM * self.eps

    @property
    def cores(self) -> list[Tensor]:
        return self.train.cores

    def budget(self, caps: Sequence[int], past: _Past, growth: BondSizes | None = None) -> ErrorBudget:
        return ErrorBudget.of(self.eps, self.dtype, self.ranks, caps, growth, past.before)


def _round_svd(problem: _Problem, caps: Sequence[int]) -> Finished:
    walk, exponent = problem.walk, 0
    if walk is not None and problem.may_square:
        found = _swept_by(partial(_cut_by_squares, problem, caps, walk), problem, caps, _Past())
        # Where rounding grows a little the cuts give way; where it grows more, triangles see better.
        if found.sweep is None or float(found.sweep.unseen) <= 1.5 * _ROOM * problem.eps:
            return found
        walk = rounding_walk(problem.given, problem.center[1])
    if walk is None:
        walk = rounding_walk(problem.cores, problem.train.center[1])
        exponent = 0 if walk is None else int(problem.train.exponent)
    if walk is None:
        return _swept(problem, caps, triangles(problem.train), cut_basis)
    return _swept_by(partial(_cut_by_walk, problem, caps, walk, exponent), problem, caps, _Past())


def _cut_by_squares(problem: _Problem, caps: Sequence[int], walk: Any, tolerance: Size) -> Sweep:
    """``_cut_by_walk`` of a walk by Gram matrices: the cuts get what these leave."""
    left = math.sqrt(max(0.0, float(tolerance) ** 2 - problem.least_unseen**2))
    sweep = _cut_by_walk(problem, caps, walk, 0, left)
    assert sweep.growth is not None
    unseen = math.sqrt(2.0) * _unseen(sweep.growth, _WALK_UNIT)
    return replace(sweep, unseen=root_sum([unseen, _missing(sweep)]))


def _missing(sweep: Sweep) -> float:
    """What of the norm is neither in the result nor cut away, as a share: rounding that passed for a part of the train.

    Squares of cores of very different scales may hold nothing else, and sizes beside such a norm show no growth. The
    result, behind orthonormal cores, is what the train itself holds there.
    """
    if not sweep.norm:
        return 0.0
    size = float(torch.linalg.vector_norm(sweep.cores[-1])) if sweep.last is None else sweep.last[0]
    kept, lost = size / float(sweep.norm), float(root_sum(sweep.tails))
    known = 2 * sys.float_info.epsilon * len(sweep.cores)  # the comparison is no better than its own rounding
    gap = abs(1.0 - kept * kept - lost * lost)  # powers of large numbers raise, products do not
    return math.inf if math.isnan(gap) else math.sqrt(max(0.0, gap - known))


def _cut_by_walk(problem: _Problem, caps: Sequence[int], walk: Any, before: int, tolerance: Size) -> Sweep:
    """``_cut_all`` in one call, of a train times ``2**before``.

    Where nothing is cut a basis need not be one of singular vectors, unless casting asks for their values.
    """
    share = float(tolerance) / math.sqrt(max(1, len(caps) - 2))
    found = walk.cut(share, list(caps), problem.dtype != problem.given[0].dtype)
    if found is None:  # an SVD did not converge: the steps in Python know other ways
        return _cut_all(problem, caps, triangles(problem.train), cut_basis, tolerance, _Past())
    cores, spectra, tails, least, growth, last = found
    norm, exponent = walk.norm()
    return Sweep(cores, spectra, tails, norm, exponent + before, growth=growth, least=least, last=last)


def _round_gram(problem: _Problem, caps: Sequence[int]) -> Finished:
    roots = gram_roots(problem.train)
    left, _ = left_sizes(problem.train, problem.cores)
    growth = growths(problem.cores, left, roots.sizes(problem.train), (roots.norm, roots.exponent))
    return _swept(problem, caps, roots, _gram_cut, _Past(unseen=_unseen(growth), growth=growth))


def _unseen(growth: BondSizes, unit: float = SQUARED_UNIT) -> Size:
    """Relative size of what squares cannot show."""
    return unit * root_sum(growth)


def _round_randomized(problem: _Problem, caps: Sequence[int]) -> Finished | None:
    """Sketch at growing ranks until the norm shows that little is lost, then round what is left by Gram matrices.

    The sketch works on the mirrored train: its result, mirrored back, is right-orthogonal, so that the cuts from the
    left need no sweep from the right before them. ``None`` where the norms show too little.
    """
    mirrored = Plain(_mirrored(problem.cores))
    left, whole = left_sizes(problem.train, problem.cores)
    right = left_sizes(problem.train, mirrored.cores)[0][::-1]
    growth = growths(problem.cores, left, right, whole)
    unseen = torch.as_tensor(_unseen(growth))
    if any_above(unseen, 0.3):
        return None
    sketch = _sketch_that_shows_all(problem, caps, mirrored, whole, unseen)
    if sketch is None:
        return None
    after, lost = sketch
    return _swept(after, caps, gram_roots(after.train), _gram_cut, _Past(lost, unseen, growth))


def _sketch_that_shows_all(
    problem: _Problem, caps: Sequence[int], mirrored: Plain, whole: Sizes, unseen: Tensor
) -> tuple[_Problem, Tensor] | None:
    """A smaller train to round, and what it lost; ``None`` where it would be no smaller."""
    guess = max(16, min(max(problem.ranks) // 2, 64))
    tops = [min(r, max(cap, 1) + OVERSAMPLING) for r, cap in zip(problem.ranks, caps, strict=True)]
    while True:
        widths = [min(top, guess + OVERSAMPLING) for top in tops]
        if widths == list(problem.ranks):
            return None
        sketched, exponent = sketched_cores(mirrored, widths[::-1])
        cores = _mirrored(sketched)
        lost = torch.hypot(_lost(whole, cores, exponent), unseen)
        if widths == tops or bool((lost <= 0.3 * problem.eps).all()):
            train = replace(problem.train, cores=cores, center=(0, 0), exponent=problem.train.exponent + exponent)
            return replace(problem, scaled=train, ranks=tuple(widths)), lost
        guess *= 2


def _mirrored(cores: Sequence[Tensor]) -> list[Tensor]:
    """The train with its modes in reverse order."""
    return [core.transpose(-3, -1).contiguous() for core in reversed(cores)]


def _lost(whole: Sizes, cores: Sequence[Tensor], exponent: Tensor) -> Tensor:
    """Relative size of what an orthogonal projection removed, from the norms before and after."""
    norm, power = whole
    kept = times_pow2(torch.linalg.vector_norm(cores[0], dim=(-3, -2, -1)), exponent - power)
    return (1.0 - (kept / norm.where(norm > 0, 1.0)).square()).clamp_min(0.0).sqrt()


@dataclass(frozen=True)
class _Past:
    """What happened to a train before a sweep: see ``Sweep``."""

    before: Size = 0.0
    unseen: Size = 0.0
    growth: BondSizes | None = None


def _swept(problem: _Problem, caps: Sequence[int], roots: Roots, cut_with: Cut, past: _Past | None = None) -> Finished:
    """Left to right: cut every bond to a tail that its share of the tolerance allows.

    With ``b_k`` what lies right of bond k, ``b_k b_k^H = c_k c_k^H``: the singular vectors of ``current b_k`` are
    those of ``current c_k``. The next core is taken as it was given, so no orthogonal factor is ever formed.
    """
    past = past or _Past()
    return _swept_by(partial(_cut_all, problem, caps, roots, cut_with, past=past), problem, caps, past)


def _swept_by(make: Callable[[Size], Sweep], problem: _Problem, caps: Sequence[int], past: _Past) -> Finished:
    """A sweep that ``make`` makes at a tolerance: at the one that the rounding it turns out to have leaves."""
    budget = problem.budget(caps, past)
    sweep = make(budget.cut)
    assert sweep.growth is not None
    grown = sweep.growth if past.growth is None or not len(past.growth) else larger(sweep.growth, past.growth)
    if any_above(grown, 1.5):
        # Rounding weighs more than was thought: where the cuts leave it no room, or leave what it made, they are
        # made anew.
        budget = problem.budget(caps, past, grown)
        if _calls_for_other_cuts(sweep, budget.cut, caps):
            sweep = make(budget.cut)
    return settled(sweep, make, dtype=problem.dtype, budget=budget, caps=caps)


def _calls_for_other_cuts(sweep: Sweep, tolerance: Size, caps: Sequence[int]) -> bool:
    if all(core.shape[-1] >= cap for core, cap in zip(sweep.cores, caps[1:], strict=True)):
        return False  # the caps decide every rank
    share = tolerance / math.sqrt(max(1, len(sweep.tails)))
    if any_above(root_sum(sweep.tails) - tolerance, 0.0):
        return True
    if sweep.least is not None and not isinstance(sweep.least, Tensor):
        return any(value <= share for value in sweep.least)
    least = torch.stack([s[..., -1] for s in sweep.spectra]) if sweep.least is None else sweep.least
    has_noise = (least <= share).flatten(1).all(1) if least.ndim > 1 else least <= share
    return bool(has_noise.any())


def _cut_all(
    problem: _Problem,
    caps: Sequence[int],
    roots: Roots,
    cut_with: Cut,
    tolerance: Tensor | float,
    past: _Past,
) -> Sweep:
    cores = problem.cores
    n_batch, d = cores[0].ndim - 3, len(cores)
    norm, exponent = roots.norm, roots.exponent
    scale = norm.where(norm > 0, 1.0)
    share = tolerance / math.sqrt(max(1, d - 1))
    done: list[Tensor] = []
    spectra: list[Tensor] = []
    tails: list[Tensor] = []
    left = [problem.train.one]
    current, shift = cores[0], torch.zeros_like(exponent)
    for k in range(d - 1):
        unfolding = as_left(current)
        left.append((torch.linalg.vector_norm(unfolding, dim=-2), shift))
        root, root_exponent = roots.of(k + 1)
        # in units of the scaled matrix the whole has this norm
        whole = times_pow2(scale, exponent - shift - root_exponent)
        basis, s, tail = cut_with(unfolding if root is None else unfolding @ root, share * whole, caps[k + 1])
        done.append(basis.unflatten(-2, current.shape[-3:-1]))
        spectra.append(s / whole[..., None])
        tails.append(tail / whole)
        current = absorb_left(basis.mH @ unfolding, cores[k + 1])
        current, step = problem.train.split(current, n_batch)
        shift = shift + step
    last = times_pow2(current, shift - exponent)
    growth = growths(cores, left, roots.sizes(problem.train), (norm, exponent))
    return Sweep(
        [*done, last], spectra, tails, norm, exponent + problem.train.exponent, past.before, past.unseen, growth
    )


def _gram_cut(a: Tensor, delta: Tensor, cap: int) -> tuple[Tensor, Tensor, Tensor]:
    if a.shape[-2] <= a.shape[-1]:
        return cut_basis(a, delta, cap)
    v, s = gram_basis(a.mH)
    rank, tail = choose_rank(s, delta, cap)
    floor = SQUARED_UNIT * torch.linalg.vector_norm(s, dim=-1)  # what squares cannot show
    kept = s[..., :rank]
    # columns of norm one, nearly orthogonal as far as squares can show
    basis = reorthonormalized(a @ (v[..., :rank] / kept.clamp_min(1e-300).unsqueeze(-2)))
    return basis, kept, torch.hypot(tail, floor) if rank < s.shape[-1] else tail


def _caps_within(problem: _Problem, caps: Sequence[int], max_params: int) -> tuple[int, ...]:
    """Ranks that lose least among those that store at most so many entries."""
    modes = [core.shape[-2] for core in problem.cores]
    least = count_params(modes, (1,) * (len(modes) + 1))
    if max_params < least:
        raise RankError(
            f"a budget must hold a train of rank 1: max_params has {max_params}, expected at least {least} for modes "
            f"{tuple(modes)}. Raise it."
        )
    # The singular values of all bonds of what the tolerance and the caps leave.
    sweep = _round_svd(problem, caps).sweep
    if sweep is None:  # all is zero
        return tuple(caps)
    last = len(modes) - 1
    spectra = []
    for bond in range(last, 0, -1):
        s, exponent = singular_values_at(sweep.cores, (last, last), bond)
        spectra.append(times_pow2(s, exponent).square().reshape(-1, s.shape[-1]).amax(0))
    return ranks_within(modes, [s.tolist() for s in spectra[::-1]], max_params)


def _cut_again(given: Sequence[Tensor], done: Finished) -> tuple[Tensor, ...]:
    """The same cores, their cuts made once more along the bases that were found, by steps that have derivatives."""
    cores, total = _right_orthogonal(given, done.ranks)
    for k, rank in enumerate(done.ranks[1:-1]):
        unfolding = as_left(cores[k])
        u, carry = cut(unfolding, rank) if done.sweep is None else cut_along(unfolding, as_left(done.sweep.cores[k]))
        cores[k] = u.unflatten(-2, cores[k].shape[-3:-1])
        cores[k + 1] = absorb_left(carry, cores[k + 1])
    if done.sweep is None:
        return tuple(zero + (core - core.detach()).to(zero.dtype) for zero, core in zip(done.cores, cores, strict=True))
    cores[-1] = times_pow2(cores[-1], total - done.sweep.exponent)
    return with_derivatives(done, cores)


def _right_orthogonal(given: Sequence[Tensor], ranks: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Cores in the compute dtype, all but the first right-orthogonal, times a power of two."""
    cores = [core.to(compute_dtype(core.dtype)) for core in given]
    n_batch = cores[0].ndim - 3
    total = torch.zeros(cores[0].shape[:-3], dtype=torch.int32, device=cores[0].device)
    for at in range(len(cores) - 1, 0, -1):
        cores[at], step = split_pow2(cores[at], n_batch)
        total = total + step
        unfolding = as_right(cores[at])
        # Directions that are zero to rounding have no derivative of their own, and the result does not need them.
        rank = max(ranks[at], _numerical_rank(unfolding))
        u, carry = cut(unfolding.mH, rank)
        cores[at] = u.mH.unflatten(-1, cores[at].shape[-2:])
        cores[at - 1] = absorb_right(cores[at - 1], carry.mH)
    cores[0], step = split_pow2(cores[0], n_batch)
    return cores, total + step


def _numerical_rank(a: Tensor) -> int:
    s = torch.linalg.svdvals(a.detach())
    return int((s > 1e-13 * s[..., :1]).sum(-1).amax())


def _check_finite(cores: Sequence[Tensor]) -> None:
    # The norms show it at once; only where one overflows every entry is looked at.
    if bool(torch.stack(torch._foreach_norm(list(cores))).isfinite().all()):
        return
    finite = torch.stack([torch.isfinite(core).all() for core in cores]).tolist()
    if not all(finite):
        raise NonFiniteError(
            f"a train must be finite to be rounded: cores[{finite.index(False)}] has NaN or Inf, expected none. "
            "Find where they come from before rounding."
        )


METHODS: dict[str, Callable[[_Problem, Sequence[int]], Finished | None]] = {
    "svd": _round_svd,
    "gram": _round_gram,
    "randomized": _round_randomized,
}
