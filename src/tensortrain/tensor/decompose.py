"""From a dense tensor to a train with a promised error: TT-SVD."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tensortrain.errors import DTypeError, KindError, NonFiniteError, ShapeError
from tensortrain.tensor.approximation import Approximation
from tensortrain.tensor.base import DTYPES
from tensortrain.tensor.linalg import (
    choose_rank,
    gram_singular_values,
    left_basis,
    randomized_basis,
    singular_values,
)
from tensortrain.tensor.matrix import TTMatrix, dense_to_paired
from tensortrain.tensor.ranks import RankLike, max_ranks, resolve_ranks
from tensortrain.tensor.scaling import split_pow2
from tensortrain.tensor.tolerance import Budget, Sweep, checked_eps, compute_dtype, finish
from tensortrain.tensor.train import TensorTrain

__all__ = ["Method", "tt_svd", "unfolding_spectra"]

Method = Literal["auto", "svd", "randomized"]


@torch.no_grad()
def tt_svd(
    x: Tensor,
    *,
    eps: float | None = None,
    max_rank: RankLike | None = None,
    method: Method | str = "auto",
    out_modes: Sequence[int] | None = None,
    in_modes: Sequence[int] | None = None,
) -> Approximation[Any]:
    r"""Decompose a dense tensor, or with modes a dense matrix.

    Computed in float64 or complex128, and stored in the dtype of ``x``. All cores but the last are
    left-orthogonal. The result carries no gradient.

    Args:
        x: ``(n_1, .., n_d)``, or ``(M, N)`` where modes are given.
        eps: Largest relative Frobenius error, a fraction in ``[0, 1)``. The default finds the numerical rank:
            1e-12 in float64, ``2 (d + 1)`` roundings in lower dtypes (about 1e-6 in float32).
        max_rank: Cap on the ranks, an int or a tuple (inner ranks, or with the boundary ones). It goes before
            ``eps``; the bound tells the error that is then promised.
        method: ``"svd"``; ``"randomized"`` sketches where ``max_rank`` is far below the unfolding's sides, a few
            per mille from the best error; ``"auto"`` chooses, today always ``"svd"``.
        out_modes, in_modes: Row and column modes, with products ``M`` and ``N``; the value is then
            a TTMatrix.

    Returns:
        Approximation: ``value`` a TensorTrain or TTMatrix; ``rel_error_bound`` covers the cuts, the cast
        to the dtype of ``x`` and rounding. ``info``: ``method``, ``eps``, ``bond_errors`` (the relative cut
        at each bond).

    Raises:
        NonFiniteError: ``x`` holds NaN or Inf.
        ShapeError: ``x`` has no mode, or modes do not fit its shape.
        RankError: ``eps`` or ``max_rank`` lies outside its range.
        DTypeError: ``x`` is neither floating nor complex.
        KindError: ``x`` is no tensor, or the method has no such name.
        ConvergenceError: No factorization of an unfolding converged.

    Cost: O(N n r) flops for N entries.
    Accuracy: ``||x - value|| <= rel_error_bound ||x|| <= eps ||x||`` without a cap, as long as ``eps`` is
    above what the dtype can hold; within ``sqrt(d - 1)`` of the best error at the ranks found.
    Source: Oseledets, SIAM J. Sci. Comput. 33(5), 2011, Algorithm 1.

    Example:
        >>> i = torch.arange(1.0, 9.0, dtype=torch.float64)
        >>> tt_svd(i[:, None, None] + i[:, None] + i).value.ranks
        (1, 2, 2, 1)
    """
    _check_tensor(x)
    sweep_with = _method(method)
    tensor, modes = _as_train_shape(x, out_modes, in_modes)
    caps = max_ranks(tensor.shape) if max_rank is None else resolve_ranks(tensor.shape, max_rank)
    eps = checked_eps(eps, x.dtype, tensor.ndim)
    scaled, exponent = _unit_scale(tensor)
    norm = float(torch.linalg.vector_norm(scaled))
    if norm == 0.0:
        cores = [x.new_zeros((1, n, 1)) for n in tensor.shape]
        center, bound, bond_errors = (0, len(cores) - 1), 0.0, (0.0,) * (len(cores) - 1)
    else:
        budget = Budget.of(eps, x.dtype, max_ranks(tensor.shape), caps)
        delta = budget.cut * norm / math.sqrt(max(1, tensor.ndim - 1))
        sweep = sweep_with(scaled, delta, caps)
        cores, center, bound, bond_errors = finish(sweep, norm=norm, exponent=exponent, dtype=x.dtype, budget=budget)
    info = {"method": "svd" if method == "auto" else method, "eps": eps, "bond_errors": bond_errors}
    if modes is None:
        return Approximation(TensorTrain(tuple(cores), center), bound, info)
    pairs = zip(cores, zip(*modes, strict=True), strict=True)
    return Approximation(TTMatrix(tuple(core.unflatten(1, pair) for core, pair in pairs), center), bound, info)


@torch.no_grad()
def unfolding_spectra(x: Tensor, *, method: Literal["svd", "gram"] = "svd") -> list[Tensor]:
    """Singular values of all unfoldings, which tell the error of every choice of ranks.

    Cutting bond k to rank r costs at least ``||s_k[r:]||``, and TT-SVD at ranks ``r_k`` makes an error of at
    most the root of the sum of these squares.

    Args:
        x: ``(n_1, .., n_d)``.
        method: ``"gram"`` is several times faster and blind below 1e-8 of the largest value.

    Returns:
        ``d - 1`` tensors, float64 and descending; the k-th is of the ``(n_1 .. n_k)`` by ``(n_{k+1} .. n_d)``
        unfolding and has ``max_ranks(x.shape)[k]`` entries.

    Raises:
        NonFiniteError, ShapeError, DTypeError, KindError: As for ``tt_svd``.

    Cost: O(N p) flops per bond, for N entries and a smaller side p.

    Example:
        >>> [s.shape for s in unfolding_spectra(torch.ones(2, 3, 4))]
        [torch.Size([2]), torch.Size([4])]
    """
    _check_tensor(x)
    scaled, exponent = _unit_scale(x)
    values_of = {"svd": singular_values, "gram": gram_singular_values}[method]
    spectra: list[Tensor] = []
    rows = 1
    for k, n in enumerate(x.shape[:-1]):
        if n == 1 and k > 0:  # the unfolding before, once more
            spectra.append(spectra[-1].clone())
            continue
        rows *= n
        unfolding = scaled.reshape(rows, scaled.numel() // rows if rows else 0)
        spectra.append(values_of(unfolding) * 2.0**exponent)
    return spectra


def _svd_sweep(x: Tensor, delta: float, caps: Sequence[int]) -> Sweep:
    """Left to right: cut every unfolding of what is left to a tail of at most ``delta``."""
    return _sweep(x, delta, caps, lambda unfolding, cap: _exact_cut(unfolding, delta, cap))


def _randomized_sweep(x: Tensor, delta: float, caps: Sequence[int]) -> Sweep:
    """The same with sketches, wherever the cap decides the rank and is small."""

    def cut(unfolding: Tensor, cap: int) -> tuple[Tensor, Tensor, Tensor]:
        if 4 * (cap + 10) > min(unfolding.shape):
            return _exact_cut(unfolding, delta, cap)
        basis, s = randomized_basis(unfolding, cap)
        energy = torch.linalg.vector_norm(unfolding).square()
        # What the sketch missed is known to half the digits only: the difference of two squares.
        tail = (energy - s.square().sum()).clamp_min(1e-15 * energy).sqrt()
        # A tail within the tolerance means that a lower rank may do: that takes exact singular values.
        return _exact_cut(unfolding, delta, cap) if float(tail) <= delta else (basis, s, tail)

    return _sweep(x, delta, caps, cut)


def _exact_cut(unfolding: Tensor, delta: float, cap: int) -> tuple[Tensor, Tensor, Tensor]:
    """Basis (p, r) of the kept columns, their singular values, and the tail that is cut."""
    basis, s = left_basis(unfolding)
    rank, tail = choose_rank(s, delta, cap)
    return basis[:, :rank], s[:rank], tail


def _sweep(
    x: Tensor, delta: float, caps: Sequence[int], cut: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]
) -> Sweep:
    cores, spectra, tails = [], [], []
    rest, rank = x, 1
    for n, cap in zip(x.shape[:-1], caps[1:-1], strict=True):
        unfolding = rest.reshape(rank * n, -1)
        basis, s, tail = cut(unfolding, cap)
        left, rank = rank, basis.shape[1]
        cores.append(basis.reshape(left, n, rank))
        spectra.append(s)
        tails.append(tail)
        rest = basis.mH @ unfolding
    cores.append(rest.reshape(rank, x.shape[-1], 1))
    return Sweep(cores, spectra, tails)


_METHODS: dict[str, Callable[[Tensor, float, Sequence[int]], Sweep]] = {
    "auto": _svd_sweep,
    "svd": _svd_sweep,
    "randomized": _randomized_sweep,
}


def _method(name: str) -> Callable[[Tensor, float, Sequence[int]], Sweep]:
    if name not in _METHODS:
        raise KindError(
            f"a method must be known: method has {name!r}, expected one of {sorted(_METHODS)}. Use 'auto' if in doubt."
        )
    return _METHODS[name]


def _check_tensor(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise KindError(
            f"only a tensor can be decomposed: x has {type(x).__name__}, expected torch.Tensor. "
            "Convert it with torch.as_tensor."
        )
    if x.dtype not in DTYPES:
        raise DTypeError(
            f"x must be of a floating or complex dtype: x has {x.dtype}, expected one of "
            f"{', '.join(str(dtype) for dtype in DTYPES)}. Cast it with .to(torch.float64)."
        )
    if x.ndim == 0:
        raise ShapeError("x must have a mode: x has shape (), expected one axis or more. Use x.reshape(1).")


def _as_train_shape(
    x: Tensor, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None
) -> tuple[Tensor, tuple[tuple[int, ...], tuple[int, ...]] | None]:
    """The tensor ``(n_1, .., n_d)`` to sweep, and the two mode tuples of a matrix."""
    if out_modes is None and in_modes is None:
        return x, None
    if out_modes is None or in_modes is None:
        missing = "out_modes" if out_modes is None else "in_modes"
        raise ShapeError(f"a matrix needs both mode tuples: {missing} has None, expected a tuple. Pass both.")
    out, into = tuple(int(n) for n in out_modes), tuple(int(n) for n in in_modes)
    if len(out) != len(into) or not out:
        raise ShapeError(
            f"out_modes and in_modes must have one length: they have {len(out)} and {len(into)} entries, "
            f"expected "
            "equal lengths of at least 1. Pad the shorter one with modes of size 1."
        )
    if x.ndim != 2:
        raise ShapeError(f"modes are for a matrix: x has shape {tuple(x.shape)}, expected (M, N). Reshape it to 2-D.")
    for name, modes, size in (("out_modes", out, x.shape[0]), ("in_modes", into, x.shape[1])):
        if math.prod(modes) != size or min(modes) < 1:
            raise ShapeError(
                f"{name} must multiply to the size of its axis: {name} has {modes} with product "
                f"{math.prod(modes)}, "
                f"expected {size} (x has shape {tuple(x.shape)}). Choose factors of {size}."
            )
    return dense_to_paired(x, out, into), (out, into)


def _unit_scale(x: Tensor) -> tuple[Tensor, int]:
    """``x`` in the compute dtype, divided by a power of two, so that squares neither overflow nor vanish."""
    wide = x.detach().to(compute_dtype(x.dtype))
    if wide.numel() == 0:
        return wide, 0
    size = float(torch.linalg.vector_norm(wide, float("inf")))  # NaN and Inf show up in the maximum
    if not math.isfinite(size):
        n_bad = int((~torch.isfinite(x)).sum())
        raise NonFiniteError(
            f"a tensor must be finite to be decomposed: x has {n_bad} NaN or Inf among {x.numel()} entries, "
            f"expected "
            "none. Find where they come from, or replace them with torch.nan_to_num."
        )
    if 1e-100 < size < 1e100:
        return wide, 0  # spares a copy
    scaled, exponent = split_pow2(wide)
    return scaled, int(exponent)
