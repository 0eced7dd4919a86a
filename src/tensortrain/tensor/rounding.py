"""Lower the ranks of a train with a promised error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from tensortrain.cores.canonical import balanced, singular_values_at
from tensortrain.cores.linalg import (
    choose_rank,
    cut,
    cut_along,
    cut_basis,
    gram_basis,
    gram_root,
    reorthonormalized,
    triangle,
)
from tensortrain.cores.ranks import RankLike, count_params, max_ranks, ranks_within, resolve_ranks
from tensortrain.cores.scaling import balanced_pow2, keep_pow2, split_pow2, splitter, times_pow2
from tensortrain.cores.sketch import OVERSAMPLING, Plain, sketched_cores
from tensortrain.cores.tolerance import (
    Budget,
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
from tensortrain.errors import KindError, NonFiniteError, RankError
from tensortrain.tensor.approximation import Approximation
from tensortrain.tensor.base import CoreChain

__all__ = ["round_and_store", "round_tt"]

Chain = TypeVar("Chain", bound=CoreChain)
Method = Literal["svd", "gram", "randomized"]
Cut = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]

# Below this relative tolerance a square (a Gram matrix, the difference of two squared norms) holds no information:
# rounding is 1e-16 of the square of the norm, hence 2e-8 of the norm, and sums of some hundred terms make it worse.
SQUARED_FLOOR = 4e-7
SQUARED_UNIT = SQUARED_FLOOR / 10


def round_tt(
    x: Chain,
    *,
    eps: float | None = None,
    max_rank: RankLike | None = None,
    method: Method | str = "svd",
    max_params: int | None = None,
) -> Approximation[Chain]:
    r"""Approximate a TensorTrain or TTMatrix by one of lower rank.

    Computed in float64 or complex128, and stored in the dtype of ``x``. All cores but the last are
    left-orthogonal. Differentiable: the result carries the gradient of the cuts at the ranks that were found.

    Args:
        x: Order d, modes ``n_1 .. n_d``, ranks ``r_0 .. r_d``; in a batch every member gets the same ranks, and
            ``eps`` holds for each.
        eps: Largest relative Frobenius error, a fraction in ``[0, 1)``; the default is that of ``tt_svd``.
        max_rank: Cap on the ranks, an int or a tuple; it goes before ``eps``, see ``rel_error_bound``.
        method: ``"svd"``; ``"gram"``, which squares the singular values, is the fastest as a rule, and suits GPUs;
            ``"randomized"``, which sketches the train first, for ranks that fall a lot. The last two resolve
            tolerances down to 4e-7: below that (so also for the default ``eps`` in float64) ``"svd"`` takes over, and
            ``info.method`` says so.
        max_params: Largest number of stored entries (of one member): the ranks that lose least within it.

    Returns:
        Approximation: ``value`` of the kind and modes of ``x``; ``rel_error_bound``, dimensionless. Where
        ``x`` is a sum that nearly cancels, rounding of its cores weighs more, and the bound says so.
        ``info``: ``method``, ``eps``, ``bond_errors`` and, for a batch, ``rel_error_bounds`` of its members.

    Raises:
        NonFiniteError: A core holds NaN or Inf.
        RankError: ``eps``, ``max_rank`` or ``max_params`` lies outside its range.
        KindError: ``x`` is no train, or the method has no such name.

    Cost: O(d n r^3) flops; ``"randomized"`` O(d n r^2 s) for new ranks s.
    Accuracy: ``||x - value|| <= rel_error_bound ||x|| <= eps ||x||`` without a cap.
    Source: Oseledets, SIAM J. Sci. Comput. 33(5), 2011, Algorithm 2, without forming the orthogonal factors of
        its first half; Al Daas et al., arXiv:2110.04393 (randomized).

    Example:
        >>> from tensortrain.tensor import randn
        >>> a = randn((4, 5, 6), 3, dtype=torch.float64)
        >>> round_tt(a + a, eps=1e-10).value.ranks
        (1, 3, 3, 1)
    """
    _check_arguments(x, method)
    needs_grad = torch.is_grad_enabled() and any(core.requires_grad for core in x.cores)
    with torch.no_grad():
        found, done = _rounded(x, eps, max_rank, method, max_params, x.dtype)
    if not needs_grad:
        return found
    return Approximation(_differentiable(x, found.value, done), found.rel_error_bound, found.info)


def round_and_store(
    x: Chain, dtype: torch.dtype, *, eps: float, max_rank: RankLike | None = None
) -> Approximation[Chain]:
    """``round_tt`` of a train in a wide dtype, stored in another one, all of it within ``eps``."""
    with torch.no_grad():
        return _rounded(x, eps, max_rank, "svd", None, dtype)[0]


def _rounded(
    x: Any,
    eps: float | None,
    max_rank: RankLike | None,
    method: str,
    max_params: int | None,
    dtype: torch.dtype,
) -> tuple[Approximation[Any], Finished]:
    cores = _finite_cores(x)
    modes = [core.shape[-2] for core in cores]
    limits = max_ranks(modes) if max_rank is None else resolve_ranks(modes, max_rank)
    caps = tuple(map(min, limits, x.ranks))
    eps = checked_eps(eps, dtype, x.order)
    # In lower dtypes cores are orthonormal to 1e-7 at best: not good enough for float64 to build on.
    center = x.center if x.dtype == cores[0].dtype else (0, x.order - 1)
    problem = _Problem.of(cores, center, dtype, eps, x.ranks)
    if max_params is not None:
        caps = _caps_within(problem, caps, max_params)
    if method != "svd" and eps < SQUARED_FLOOR and (max_rank is None and max_params is None):
        method = "svd"
    done, method = _by_method(problem, caps, method)
    info = {"method": method, "eps": eps, "bond_errors": done.bond_errors}
    if x.batch_shape:
        info["rel_error_bounds"] = done.bounds
    if done.is_zero:
        return Approximation(x._zeros().to(dtype), 0.0, info), done
    return Approximation(x._like(done.cores, done.center), done.bound, info), done


def _by_method(problem: _Problem, caps: Sequence[int], method: str) -> tuple[Finished, str]:
    """By the method asked for, unless what that cannot see keeps it from the tolerance."""
    if method != "svd":
        found = _METHODS[method](problem, caps)
        if found is not None and (found.bound <= problem.eps or _is_held_by(found, caps)):
            return found, method
    return _round_svd(problem, caps), "svd"


def _is_held_by(found: Finished, caps: Sequence[int]) -> bool:
    """Whether it is a cap that makes the bound what it is, not what squares cannot show."""
    is_capped = any(core.shape[-1] >= cap for core, cap in zip(found.cores[:-1], caps[1:], strict=False))
    return is_capped and bool((found.sweep.unseen <= 0.02 * found.bounds).all())


@dataclass(frozen=True)
class _Problem:
    """What is to be rounded, in the compute dtype: a train times ``2**exponent``."""

    cores: list[Tensor]
    center: tuple[int, int]
    dtype: torch.dtype
    eps: float
    ranks: tuple[int, ...]
    split: Callable[..., tuple[Tensor, Tensor]]
    exponent: Tensor

    @classmethod
    def of(
        cls, cores: list[Tensor], center: tuple[int, int], dtype: torch.dtype, eps: float, ranks: tuple[int, ...]
    ) -> _Problem:
        """Where numbers may leave the range, the cores that are not orthonormal are balanced first."""
        split = splitter(cores)
        total = torch.zeros(cores[0].shape[:-3], dtype=torch.int32, device=cores[0].device)
        if split is not keep_pow2:
            lo, hi = center
            inner, total = balanced_pow2(balanced(cores[lo : hi + 1]))
            cores = [*cores[:lo], *inner, *cores[hi + 1 :]]
        return cls(cores, center, dtype, eps, tuple(ranks), split, total)

    def budget(self, caps: Sequence[int], past: _Past, growth: Tensor | None = None) -> Budget:
        return Budget.of(self.eps, self.dtype, self.ranks, caps, growth, past.before)

    @property
    def one(self) -> Sizes:
        """What lies left of the first core, and right of the last."""
        batch, like = self.cores[0].shape[:-3], self.cores[0].real
        return like.new_ones((*batch, 1)), torch.zeros(batch, dtype=torch.int32, device=like.device)


def _round_svd(problem: _Problem, caps: Sequence[int]) -> Finished:
    return _swept(problem, caps, _triangles(problem), cut_basis)


def _round_gram(problem: _Problem, caps: Sequence[int]) -> Finished:
    roots = _gram_roots(problem)
    left, _ = _left_sizes(problem, problem.cores)
    growth = growths(problem.cores, left, roots.sizes(problem), (roots.norm, roots.exponent))
    return _swept(problem, caps, roots, _gram_cut, _Past(unseen=_unseen(growth), growth=growth))


def _unseen(growth: Tensor) -> Tensor:
    """Relative size of what squares cannot show."""
    return SQUARED_UNIT * growth.square().sum(0).sqrt()


def _round_randomized(problem: _Problem, caps: Sequence[int]) -> Finished | None:
    """Sketch at growing ranks until the norm shows that little is lost, then round what is left by Gram matrices.

    The sketch works on the mirrored train: its result, mirrored back, is right-orthogonal, so that the cuts from the
    left need no sweep from the right before them. ``None`` where the norms show too little.
    """
    mirrored = Plain(_mirrored(problem.cores))
    left, whole = _left_sizes(problem, problem.cores)
    right = _left_sizes(problem, mirrored.cores)[0][::-1]
    growth = growths(problem.cores, left, right, whole)
    unseen = _unseen(growth)
    if bool((unseen > 0.3).any()):
        return None
    guess = max(16, min(max(problem.ranks) // 2, 64))
    while True:
        tops = [min(r, max(cap, 1) + OVERSAMPLING) for r, cap in zip(problem.ranks, caps, strict=True)]
        widths = [min(top, guess + OVERSAMPLING) for top in tops]
        if widths == list(problem.ranks):
            return None
        sketched, exponent = sketched_cores(mirrored, widths[::-1])
        cores = _mirrored(sketched)
        lost = torch.hypot(_lost(whole, cores, exponent), unseen)
        if widths == tops or bool((lost <= 0.3 * problem.eps).all()):
            break
        guess *= 2
    after = replace(problem, cores=cores, center=(0, 0), ranks=tuple(widths), exponent=problem.exponent + exponent)
    return _swept(after, caps, _gram_roots(after), _gram_cut, _Past(lost, unseen, growth))


def _mirrored(cores: Sequence[Tensor]) -> list[Tensor]:
    """The train with its modes in reverse order."""
    return [core.transpose(-3, -1).contiguous() for core in reversed(cores)]


def _left_sizes(problem: _Problem, cores: Sequence[Tensor]) -> tuple[list[Sizes], Sizes]:
    """Norms of the columns of what lies left of bonds 0 to d, and the norm of the whole, from Gram matrices.

    Good to the roundings that squares resolve.
    """
    n_batch = cores[0].ndim - 3
    env = cores[0].new_ones((*cores[0].shape[:-3], 1, 1))
    _, exponent = problem.one
    sizes = [problem.one]
    for core in cores:
        env, step = problem.split(as_left(core).mH @ as_left(absorb_left(env, core)), n_batch)
        exponent = exponent + step  # of the square
        squares = env.diagonal(dim1=-2, dim2=-1).real.clamp_min(0.0)
        sizes.append(((squares * (1 + exponent % 2).unsqueeze(-1)).sqrt(), exponent // 2))
    size, power = sizes[-1]
    return sizes, (size[..., 0], power)


def _lost(whole: Sizes, cores: Sequence[Tensor], exponent: Tensor) -> Tensor:
    """Relative size of what an orthogonal projection removed, from the norms before and after."""
    norm, power = whole
    kept = times_pow2(torch.linalg.vector_norm(cores[0], dim=(-3, -2, -1)), exponent - power)
    return (1.0 - (kept / norm.where(norm > 0, 1.0)).square()).clamp_min(0.0).sqrt()


@dataclass(frozen=True)
class _Past:
    """What happened to a train before a sweep: see ``Sweep``."""

    before: Tensor | float = 0.0
    unseen: Tensor | float = 0.0
    growth: Tensor | None = None


def _swept(problem: _Problem, caps: Sequence[int], roots: _Roots, cut_with: Cut, past: _Past | None = None) -> Finished:
    """Left to right: cut every bond to a tail that its share of the tolerance allows.

    With ``b_k`` what lies right of bond k, ``b_k b_k^H = c_k c_k^H``: the singular vectors of ``current b_k`` are
    those of ``current c_k``. The next core is taken as it was given, so no orthogonal factor is ever formed.
    """
    past = past or _Past()

    def make(tolerance: Tensor | float) -> Sweep:
        return _cut_all(problem, caps, roots, cut_with, tolerance, past)

    budget = problem.budget(caps, past)
    sweep = make(budget.cut)
    grown = _largest_growth(sweep, past.growth)
    if bool((grown > 1.5).any()):
        # Rounding weighs more than was thought: where the cuts leave it no room, or leave what it made, they are
        # made anew.
        budget = problem.budget(caps, past, grown)
        if _calls_for_other_cuts(sweep, budget.cut, caps):
            sweep = make(budget.cut)
    return settled(sweep, make, dtype=problem.dtype, budget=budget, caps=caps)


def _largest_growth(sweep: Sweep, before: Tensor | None) -> Tensor:
    assert sweep.growth is not None
    if before is None or not before.numel():
        return sweep.growth
    return torch.maximum(sweep.growth, before)


def _calls_for_other_cuts(sweep: Sweep, tolerance: Tensor | float, caps: Sequence[int]) -> bool:
    if all(core.shape[-1] >= cap for core, cap in zip(sweep.cores, caps[1:], strict=True)):
        return False  # the caps decide every rank
    share = tolerance / math.sqrt(max(1, len(sweep.tails)))
    is_too_much = _total(sweep.tails) > tolerance
    has_noise = [(s[..., -1] <= share).all() for s in sweep.spectra]
    return bool(is_too_much.any()) or bool(torch.stack(has_noise).any())


def _cut_all(
    problem: _Problem,
    caps: Sequence[int],
    roots: _Roots,
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
    left = [problem.one]
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
        current, step = problem.split(current, n_batch)
        shift = shift + step
    last = times_pow2(current, shift - exponent)
    growth = growths(cores, left, roots.sizes(problem), (norm, exponent))
    return Sweep([*done, last], spectra, tails, norm, exponent + problem.exponent, past.before, past.unseen, growth)


def _total(tails: Sequence[Tensor]) -> Tensor:
    """Root-sum-square of the cuts."""
    return torch.stack(list(tails)).square().sum(0).sqrt()


@dataclass(frozen=True)
class _Roots:
    """For every inner bond k a matrix ``c_k`` with ``c_k c_k^H = b_k b_k^H``, b_k all that lies right of it."""

    matrices: dict[int, Tensor]
    exponents: dict[int, Tensor]
    norm: Tensor
    exponent: Tensor

    def of(self, bond: int) -> tuple[Tensor | None, Tensor]:
        """The root and its power of two; ``None`` for the identity, right of the center."""
        return self.matrices.get(bond), self.exponents.get(bond, torch.zeros_like(self.exponent))

    def sizes(self, problem: _Problem) -> list[Sizes]:
        """Norms of the rows of what lies right of bonds 0 to d."""
        nothing = torch.zeros_like(self.exponent)
        found = [(self.norm[..., None], self.exponent)]
        for bond, core in enumerate(problem.cores[1:], start=1):
            root, exponent = self.of(bond)
            ones = self.norm.new_ones((*self.norm.shape, core.shape[-3]))
            found.append((ones if root is None else torch.linalg.vector_norm(root, dim=-1), exponent))
        return [*found, (problem.one[0], nothing)]


def _triangles(problem: _Problem) -> _Roots:
    return _roots(problem, lambda core: triangle(as_right(core).mH).mH)


def _gram_roots(problem: _Problem) -> _Roots:
    def root(core: Tensor) -> Tensor:
        unfolding = as_right(core)
        return gram_root(unfolding @ unfolding.mH)

    return _roots(problem, root)


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


def _roots(problem: _Problem, root_of: Callable[[Tensor], Tensor]) -> _Roots:
    cores, (_, hi) = problem.cores, problem.center
    n_batch = cores[0].ndim - 3
    zero = torch.zeros(cores[0].shape[:-3], dtype=torch.int32, device=cores[0].device)
    matrices: dict[int, Tensor] = {}
    exponents: dict[int, Tensor] = {}
    carried, total = cores[hi], zero
    for at in range(hi, 0, -1):
        root, step = problem.split(root_of(carried), n_batch)
        total = total + step
        matrices[at], exponents[at] = root, total
        carried = absorb_right(cores[at - 1], root)
    carried, step = problem.split(carried, n_batch)
    norm, total = torch.linalg.vector_norm(carried, dim=(-3, -2, -1)), total + step
    return _Roots(matrices, exponents, norm, total)


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
    sweep = _swept(problem, caps, _triangles(problem), cut_basis).sweep
    last = len(modes) - 1
    spectra = []
    for bond in range(last, 0, -1):
        s, exponent = singular_values_at(sweep.cores, (last, last), bond)
        spectra.append(times_pow2(s, exponent).square().reshape(-1, s.shape[-1]).amax(0))
    return ranks_within(modes, [s.tolist() for s in spectra[::-1]], max_params)


def _differentiable(x: Chain, value: Chain, done: Finished) -> Chain:
    """The same value, its cuts made once more along the bases that were found, by steps that have derivatives."""
    cores, total = _right_orthogonal(x, value.ranks)
    for k in range(x.order - 1):
        unfolding = as_left(cores[k])
        u, carry = (
            cut(unfolding, value.ranks[k + 1]) if done.is_zero else cut_along(unfolding, as_left(done.sweep.cores[k]))
        )
        cores[k] = u.unflatten(-2, cores[k].shape[-3:-1])
        cores[k + 1] = absorb_left(carry, cores[k + 1])
    if done.is_zero:
        moved = [(core - core.detach()).to(x.dtype) for core in cores]
        return value._like([zero + part for zero, part in zip(value.cores, moved, strict=True)], value.center)
    cores[-1] = times_pow2(cores[-1], total - done.sweep.exponent)
    return value._like(with_derivatives(done, cores), value.center)


def _right_orthogonal(x: Chain, ranks: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Cores in the compute dtype, all but the first right-orthogonal, times a power of two."""
    cores = [core.to(compute_dtype(x.dtype)) for core in x._merged()]
    total = torch.zeros(x.batch_shape, dtype=torch.int32, device=x.device)
    for at in range(x.order - 1, 0, -1):
        cores[at], step = split_pow2(cores[at], x._n_batch)
        total = total + step
        unfolding = as_right(cores[at])
        # Directions that are zero to rounding have no derivative of their own, and the result does not need them.
        rank = max(ranks[at], _numerical_rank(unfolding))
        u, carry = cut(unfolding.mH, rank)
        cores[at] = u.mH.unflatten(-1, cores[at].shape[-2:])
        cores[at - 1] = absorb_right(cores[at - 1], carry.mH)
    cores[0], step = split_pow2(cores[0], x._n_batch)
    return cores, total + step


def _numerical_rank(a: Tensor) -> int:
    s = torch.linalg.svdvals(a.detach())
    return int((s > 1e-13 * s[..., :1]).sum(-1).amax())


_METHODS: dict[str, Callable[[_Problem, Sequence[int]], Finished | None]] = {
    "svd": _round_svd,
    "gram": _round_gram,
    "randomized": _round_randomized,
}


def _check_arguments(x: object, method: str) -> None:
    if not isinstance(x, CoreChain):
        raise KindError(
            f"only a train can be rounded: x has {type(x).__name__}, expected TensorTrain or TTMatrix. "
            "Decompose a dense tensor with tensortrain.tt_svd."
        )
    if method not in list(_METHODS):
        raise KindError(
            f"a method must be known: method has {method!r}, expected one of {sorted(_METHODS)}. Use 'svd' if in doubt."
        )


def _finite_cores(x: CoreChain) -> list[Tensor]:
    cores = [core.detach().to(compute_dtype(x.dtype)) for core in x._merged()]
    # The norms show it at once; only where one overflows every entry is looked at.
    if bool(torch.stack(torch._foreach_norm(cores)).isfinite().all()):
        return cores
    finite = torch.stack([torch.isfinite(core).all() for core in cores]).tolist()
    if not all(finite):
        raise NonFiniteError(
            f"a train must be finite to be rounded: cores[{finite.index(False)}] has NaN or Inf, expected "
            f"none. "
            "Find where they come from before rounding."
        )
    return cores
