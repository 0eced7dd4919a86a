"""Lower the ranks of a train with a promised error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from tensortrain.errors import KindError, NonFiniteError, RankError
from tensortrain.tensor import chain
from tensortrain.tensor.approximation import Approximation
from tensortrain.tensor.base import CoreChain
from tensortrain.tensor.linalg import choose_rank, cut, cut_basis, gram_basis, gram_root, reorthonormalized, triangle
from tensortrain.tensor.ranks import RankLike, count_params, max_ranks, ranks_within, resolve_ranks
from tensortrain.tensor.scaling import split_pow2, splitter, times_pow2
from tensortrain.tensor.sketch import OVERSAMPLING, Plain, sketched_cores
from tensortrain.tensor.tolerance import Budget, Finished, Sweep, checked_eps, compute_dtype, finish

__all__ = ["round_tt"]

Chain = TypeVar("Chain", bound=CoreChain)
Method = Literal["svd", "gram", "randomized"]
Cut = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]

# Below this relative tolerance a square (a Gram matrix, the difference of two squared norms) holds no information:
# rounding is 1e-16 of the square of the norm, hence 2e-8 of the norm, and sums of some hundred terms make it worse.
SQUARED_FLOOR = 4e-7


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
        found = _rounded(x, eps, max_rank, method, max_params)
    if not needs_grad:
        return found
    value = _differentiable(x, found.value.ranks)
    return Approximation(value, found.rel_error_bound, found.info)


def _rounded(x: Any, eps: float | None, max_rank: RankLike | None, method: str, max_params: int | None) -> Any:
    cores = _finite_cores(x)
    modes = [core.shape[-2] for core in cores]
    caps = max_ranks(modes) if max_rank is None else resolve_ranks(modes, max_rank)
    caps = tuple(map(min, caps, x.ranks))
    eps = checked_eps(eps, x.dtype, x.order)
    # In lower dtypes cores are orthonormal to 1e-7 at best: not good enough for float64 to build on.
    center = x.center if x.dtype == cores[0].dtype else (0, x.order - 1)
    if center == (0, x.order - 1):
        cores = chain.balanced(cores)
    problem = _Problem(cores, center, x.dtype, eps, x.ranks, splitter(cores))
    if max_params is not None:
        caps = _caps_within(problem, caps, max_params)
    if method != "svd" and eps < SQUARED_FLOOR and (max_rank is None and max_params is None):
        method = "svd"
    done = _METHODS[method](problem, caps)
    info = {"method": method, "eps": eps, "bond_errors": done.bond_errors}
    if x.batch_shape:
        info["rel_error_bounds"] = done.bounds
    if done.is_zero:
        return Approximation(x._zeros(), 0.0, info)
    return Approximation(x._like(done.cores, done.center), done.bound, info)


@dataclass(frozen=True)
class _Problem:
    """What is to be rounded, in the compute dtype."""

    cores: list[Tensor]
    center: tuple[int, int]
    dtype: torch.dtype
    eps: float
    ranks: tuple[int, ...]
    split: Callable[..., tuple[Tensor, Tensor]]

    def budget(self, caps: Sequence[int], amplification: float) -> Budget:
        return Budget.of(self.eps, self.dtype, self.ranks, caps, amplification)


def _round_svd(problem: _Problem, caps: Sequence[int]) -> Finished:
    return _swept(problem, caps, _triangles(problem), cut_basis)


def _round_gram(problem: _Problem, caps: Sequence[int]) -> Finished:
    return _swept(problem, caps, _gram_roots(problem), _gram_cut)


def _round_randomized(problem: _Problem, caps: Sequence[int]) -> Finished:
    """Sketch at growing ranks until the norm shows that little is lost, then round what is left by Gram matrices.

    The sketch works on the mirrored train: its result, mirrored back, is right-orthogonal, so that the cuts from the
    left need no sweep from the right before them.
    """
    norm, exponent = _squared_norm_parts(problem)
    mirrored = Plain(_mirrored(problem.cores))
    guess = max(16, min(max(problem.ranks) // 2, 64))
    while True:
        tops = [min(r, max(cap, 1) + OVERSAMPLING) for r, cap in zip(problem.ranks, caps, strict=True)]
        widths = [min(top, guess + OVERSAMPLING) for top in tops]
        if widths == list(problem.ranks):
            return _round_svd(problem, caps)
        cores = _mirrored(sketched_cores(mirrored, widths[::-1]))
        lost = _lost(norm, exponent, cores)
        if widths == tops or bool((lost <= 0.5 * problem.eps).all()):
            break
        guess *= 2
    # What the sketch lost is orthogonal to what is left, and so are the cuts within it.
    rest = math.sqrt(max(problem.eps**2 - float(lost.amax()) ** 2, 0.0)) or problem.eps
    left = replace(problem, cores=cores, center=(0, 0), eps=rest, ranks=tuple(widths), split=splitter(cores))
    return _swept(left, caps, _gram_roots(left), _gram_cut, before=lost)


def _mirrored(cores: Sequence[Tensor]) -> list[Tensor]:
    """The train with its modes in reverse order."""
    return [core.transpose(-3, -1).contiguous() for core in reversed(cores)]


def _squared_norm_parts(problem: _Problem) -> tuple[Tensor, Tensor]:
    """``(m, e)``, the norm ``m * 2**e``, from an inner product: good to the roundings that squares resolve."""
    if problem.center[0] == problem.center[1]:
        return chain.norm_parts(problem.cores, problem.center)
    square, exponent = chain.dot_parts(problem.cores, problem.cores)
    square = square.real if square.is_complex() else square
    return (square * (1 + exponent % 2)).clamp_min(0.0).sqrt(), exponent // 2


def _lost(norm: Tensor, exponent: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """Relative size of what an orthogonal projection removed, from the norms before and after, and their rounding."""
    end, step = split_pow2(cores[0], cores[0].ndim - 3)
    kept = times_pow2(torch.linalg.vector_norm(end, dim=(-3, -2, -1)), step - exponent) / norm.where(norm > 0, 1.0)
    # each norm comes from a chain of d factorizations, each wrong by some roundings
    return ((1.0 - kept.square()).clamp_min(0.0) + 2e-15 * (len(cores) + 5)).sqrt()


def _swept(
    problem: _Problem,
    caps: Sequence[int],
    roots: _Roots,
    cut_with: Cut,
    before: Tensor | float = 0.0,
) -> Finished:
    """Left to right: cut every bond to a tail that its share of the tolerance allows.

    With ``b_k`` what lies right of bond k, ``b_k b_k^H = c_k c_k^H``: the singular vectors of ``current b_k`` are
    those of ``current c_k``. The next core is taken as it was given, so no orthogonal factor is ever formed.
    """
    budget = problem.budget(caps, 1.0)
    sweep, amplification = _cut_all(problem, caps, roots, cut_with, budget.cut, before)
    if amplification > 1.0:
        wary = problem.budget(caps, amplification)
        # Rounding weighs more than was thought: where the cuts leave it no room, they are made anew, unless the caps
        # decide every rank.
        is_capped = all(core.shape[-1] >= cap for core, cap in zip(sweep.cores, caps[1:], strict=True))
        if _total(sweep.tails) > wary.cut and not is_capped:
            sweep, _ = _cut_all(problem, caps, roots, cut_with, wary.cut, before)
        budget = wary
    return finish(sweep, dtype=problem.dtype, budget=budget)


def _cut_all(
    problem: _Problem, caps: Sequence[int], roots: _Roots, cut_with: Cut, tolerance: float, before: Tensor | float
) -> tuple[Sweep, float]:
    """The cuts at one tolerance, and by how much an error in what is carried grows on its way to the whole."""
    cores = problem.cores
    n_batch, d = cores[0].ndim - 3, len(cores)
    norm, exponent = roots.norm, roots.exponent
    scale = norm.where(norm > 0, 1.0)
    share = tolerance / math.sqrt(max(1, d - 1))
    done: list[Tensor] = []
    spectra: list[Tensor] = []
    tails: list[Tensor] = []
    growths = [torch.ones_like(norm)]
    current, shift = cores[0], torch.zeros_like(exponent)
    for k in range(d - 1):
        unfolding = chain.as_left(current)
        root, root_exponent = roots.of(k + 1)
        # in units of the scaled matrix the whole has this norm
        whole = scale * torch.exp2((exponent - shift - root_exponent).to(scale.dtype))
        if root is not None:
            growths.append(_size(unfolding) * _size(root) / whole)
        basis, s, tail = cut_with(unfolding if root is None else unfolding @ root, share * whole, caps[k + 1])
        done.append(basis.unflatten(-2, current.shape[-3:-1]))
        spectra.append(s / whole[..., None])
        tails.append(tail / whole)
        current = chain.absorb_left(basis.mH @ unfolding, cores[k + 1])
        current, step = problem.split(current, n_batch)
        shift = shift + step
    last = times_pow2(current, shift - exponent)
    growth = torch.stack(growths)
    worst = float(growth.where(torch.isfinite(growth), 1.0).amax()) if growth.numel() else 1.0
    return Sweep([*done, last], spectra, tails, norm, exponent, before), worst


def _total(tails: Sequence[Tensor]) -> float:
    """Root-sum-square of the cuts, of the worst member of a batch."""
    if not tails or not tails[0].numel():
        return 0.0
    return float(torch.stack(list(tails)).square().sum(0).sqrt().amax())


def _size(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=(-2, -1))


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


def _triangles(problem: _Problem) -> _Roots:
    return _roots(problem, lambda core: triangle(chain.as_right(core).mH).mH)


def _gram_roots(problem: _Problem) -> _Roots:
    def root(core: Tensor) -> Tensor:
        unfolding = chain.as_right(core)
        return gram_root(unfolding @ unfolding.mH)

    return _roots(problem, root)


def _gram_cut(a: Tensor, delta: Tensor, cap: int) -> tuple[Tensor, Tensor, Tensor]:
    if a.shape[-2] <= a.shape[-1]:
        return cut_basis(a, delta, cap)
    v, s = gram_basis(a.mH)
    rank, tail = choose_rank(s, delta, cap)
    floor = 4e-8 * torch.linalg.vector_norm(s, dim=-1)  # what squares cannot show
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
        carried = chain.absorb_right(cores[at - 1], root)
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
    sweep = _swept(problem, caps, _triangles(problem), cut_basis)
    spectra = []
    cores, center = [core.to(compute_dtype(problem.dtype)) for core in sweep.cores], sweep.center
    for bond in range(len(cores) - 1, 0, -1):
        s, exponent = chain.singular_values_at(cores, center, bond)
        spectra.append(times_pow2(s, exponent).square().reshape(-1, s.shape[-1]).amax(0))
    return ranks_within(modes, [s.tolist() for s in spectra[::-1]], max_params)


def _differentiable(x: Chain, ranks: Sequence[int]) -> Chain:
    """The cuts once more at known ranks, by steps that have derivatives."""
    wide = compute_dtype(x.dtype)
    cores = [core.to(wide) for core in x._merged()]
    n_batch, d = x._n_batch, x.order
    total = torch.zeros(x.batch_shape, dtype=torch.int32, device=x.device)
    for at in range(d - 1, 0, -1):
        unfolding = chain.as_right(cores[at])
        # Directions that are zero to rounding have no derivative of their own, and the result does not need them.
        rank = max(ranks[at], _numerical_rank(unfolding))
        u, carry = cut(unfolding.mH, rank)
        cores[at] = u.mH.unflatten(-1, cores[at].shape[-2:])
        cores[at - 1] = chain.absorb_right(cores[at - 1], carry.mH)
        cores[at - 1], step = split_pow2(cores[at - 1], n_batch)
        total = total + step
    for k in range(d - 1):
        u, carry = cut(chain.as_left(cores[k]), ranks[k + 1])
        cores[k] = u.unflatten(-2, cores[k].shape[-3:-1])
        cores[k + 1] = chain.absorb_left(carry, cores[k + 1])
    placed, single = chain.place_pow2(cores, total, d - 1, x.dtype)
    return x._like([core.to(x.dtype) for core in placed], (d - 1, d - 1) if single else (0, -1))


def _numerical_rank(a: Tensor) -> int:
    s = torch.linalg.svdvals(a.detach())
    return int((s > 1e-13 * s[..., :1]).sum(-1).amax())


_METHODS: dict[str, Callable[[_Problem, Sequence[int]], Finished]] = {
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
