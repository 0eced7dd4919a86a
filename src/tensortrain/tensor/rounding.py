"""Lower the ranks of a train with a promised error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from tensortrain.errors import KindError, NonFiniteError
from tensortrain.tensor import chain
from tensortrain.tensor.approximation import Approximation
from tensortrain.tensor.base import CoreChain
from tensortrain.tensor.linalg import choose_rank, left_basis
from tensortrain.tensor.ranks import RankLike, max_ranks, resolve_ranks
from tensortrain.tensor.scaling import split_pow2
from tensortrain.tensor.tolerance import Budget, Sweep, checked_eps, compute_dtype, finish

__all__ = ["round_tt"]

Chain = TypeVar("Chain", bound=CoreChain)


@torch.no_grad()
def round_tt(
    x: Chain,
    *,
    eps: float | None = None,
    max_rank: RankLike | None = None,
    method: Literal["svd"] | str = "svd",
) -> Approximation[Chain]:
    r"""Approximate a TensorTrain or TTMatrix by one of lower rank.

    Computed in float64 or complex128, and stored in the dtype of ``x``. All cores but the last are
    left-orthogonal. The result carries no gradient.

    Args:
        x: Order d, modes ``n_1 .. n_d``, ranks ``r_0 .. r_d``.
        eps: Largest relative Frobenius error, a fraction in ``[0, 1)``; the default is that of ``tt_svd``.
        max_rank: Cap on the ranks, an int or a tuple; it goes before ``eps``, see ``rel_error_bound``.
        method: ``"svd"``.

    Returns:
        Approximation: ``value`` of the kind and modes of ``x``; ``rel_error_bound``, dimensionless. Where
        ``x`` is a sum that nearly cancels, rounding of its cores weighs more, and the bound says so.
        ``info``: ``method``, ``eps``, ``bond_errors``.

    Raises:
        NonFiniteError: A core holds NaN or Inf.
        RankError: ``eps`` or ``max_rank`` lies outside its range.
        KindError: ``x`` is no train, or the method has no such name.

    Cost: O(d n r^3) flops.  Accuracy: ``||x - value|| <= rel_error_bound ||x|| <= eps ||x||`` without a cap.
    Source: Oseledets, SIAM J. Sci. Comput. 33(5), 2011, Algorithm 2.

    Example:
        >>> from tensortrain.tensor import randn
        >>> a = randn((4, 5, 6), 3, dtype=torch.float64)
        >>> round_tt(a + a, eps=1e-10).value.ranks
        (1, 3, 3, 1)
    """
    if not isinstance(x, CoreChain):
        raise KindError(
            f"only a train can be rounded: x has {type(x).__name__}, expected TensorTrain or TTMatrix. "
            "Decompose a dense tensor with tensortrain.tt_svd."
        )
    if method not in _METHODS:
        raise KindError(
            f"a method must be known: method has {method!r}, expected one of {sorted(_METHODS)}. Use 'svd' if in doubt."
        )
    cores = _finite_cores(x)
    modes = [core.shape[1] for core in cores]
    caps = max_ranks(modes) if max_rank is None else resolve_ranks(modes, max_rank)
    eps = checked_eps(eps, x.dtype, x.order)
    # In lower dtypes cores are orthonormal to 1e-7 at best: not good enough for float64 to build on.
    center = x.center if x.dtype == cores[0].dtype else (0, x.order - 1)
    right, exponent, amplification = _right_orthogonal(cores, center)
    norm = float(torch.linalg.vector_norm(right[0]))
    info = {"method": method, "eps": eps, "bond_errors": (0.0,) * (x.order - 1)}
    if norm == 0.0:
        zeros = [core.new_zeros((1, n, 1), dtype=x.dtype) for core, n in zip(cores, modes, strict=True)]
        return Approximation(x._like(zeros), 0.0, info)
    budget = Budget.of(eps, x.dtype, x.ranks, tuple(map(min, caps, x.ranks)), amplification)
    delta = budget.cut * norm / math.sqrt(max(1, x.order - 1))
    sweep = _METHODS[method](right, delta, caps)
    stored, found, bound, bond_errors = finish(sweep, norm=norm, exponent=exponent, dtype=x.dtype, budget=budget)
    return Approximation(x._like(stored, found), bound, {**info, "bond_errors": bond_errors})


def _svd_sweep(right: Sequence[Tensor], delta: float, caps: Sequence[int]) -> Sweep:
    """Left to right over right-orthogonal cores: cut every bond to a tail of at most ``delta``."""
    cores, spectra, tails = [], [], []
    current = right[0]
    for following, cap in zip(right[1:], caps[1:-1], strict=True):
        unfolding = current.flatten(0, 1)
        basis, s = left_basis(unfolding)
        rank, tail = choose_rank(s, delta, cap)
        basis = basis[:, :rank]
        cores.append(basis.reshape(*current.shape[:2], rank))
        spectra.append(s[:rank])
        tails.append(tail)
        current = torch.tensordot(basis.mH @ unfolding, following, dims=1)
    cores.append(current)
    return Sweep(cores, spectra, tails)


_METHODS: dict[str, Callable[[Sequence[Tensor], float, Sequence[int]], Sweep]] = {"svd": _svd_sweep}


def _finite_cores(x: CoreChain) -> list[Tensor]:
    cores = [core.detach().to(compute_dtype(x.dtype)) for core in x._merged()]
    finite = torch.stack([torch.isfinite(core).all() for core in cores]).tolist()  # one sync for all cores
    if not all(finite):
        raise NonFiniteError(
            f"a train must be finite to be rounded: cores[{finite.index(False)}] has NaN or Inf, expected "
            f"none. "
            "Find where they come from before rounding."
        )
    return cores


def _right_orthogonal(cores: list[Tensor], center: tuple[int, int]) -> tuple[list[Tensor], int, float]:
    """Cores with the norm in the first one, its power of two, and the growth of rounding errors."""
    left_logs = _left_norm_logs(cores[: center[1] + 1])
    out, carry_logs = list(cores), []
    total = cores[0].real.new_zeros(())
    for at in range(center[1], 0, -1):
        out[at], carry = chain.right_qr(out[at])
        carry, step = split_pow2(carry)
        out[at - 1] = torch.tensordot(out[at - 1], carry, dims=1)
        total = total + step
        carry_logs.append(torch.linalg.vector_norm(carry).log2() + total)
    out[0], step = split_pow2(out[0])
    total = total + step
    if not carry_logs:
        return out, int(total), 1.0
    # An error of one unit in the carry at a bond reaches the whole through everything left of it.
    whole = torch.linalg.vector_norm(out[0]).log2() + total
    growth = float((torch.stack(carry_logs).flip(0) + torch.stack(left_logs) - whole).max())
    amplification = 2.0 ** min(max(growth, 0.0), 1000.0) if math.isfinite(growth) else 1.0
    return out, int(total), amplification


def _left_norm_logs(cores: Sequence[Tensor]) -> list[Tensor]:
    """``log2`` of a bound on the spectral norm of all that lies left of each inner bond."""
    logs = []
    gram, total = cores[0].new_ones((1, 1)), cores[0].real.new_zeros(())
    for core in cores[:-1]:
        gram = torch.tensordot(core.conj(), torch.tensordot(gram, core, dims=1), dims=([0, 1], [0, 1]))
        gram, step = split_pow2(gram)
        total = total + step
        logs.append(0.5 * (torch.linalg.matrix_norm(gram, 1).log2() + total))
    return logs
