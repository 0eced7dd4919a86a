"""From a dense tensor to a train with a promised error: TT-SVD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tensortrain.cores.linalg import cut, cut_along, gram_singular_values, singular_values
from tensortrain.cores.ranks import RankLike, max_ranks, resolve_ranks
from tensortrain.cores.scaling import split_pow2, times_pow2
from tensortrain.cores.tolerance import (
    Budget,
    Finished,
    Sweep,
    checked_eps,
    compute_dtype,
    settled,
    with_derivatives,
)
from tensortrain.cores.unfold import as_left
from tensortrain.cores.unfolding import METHODS, SweepMethod, Unfolded
from tensortrain.cores.validation import DTYPES
from tensortrain.errors import DTypeError, KindError, NonFiniteError, ShapeError
from tensortrain.tensor.approximation import Approximation
from tensortrain.tensor.matrix import TTMatrix, dense_to_paired
from tensortrain.tensor.streaming import is_stream, stream_tt_svd
from tensortrain.tensor.train import TensorTrain

__all__ = ["Method", "tt_svd", "unfolding_spectra"]

Method = Literal["auto", "svd", "qr", "gram", "randomized"]


def tt_svd(
    x: Tensor | Any,
    *,
    eps: float | None = None,
    max_rank: RankLike | None = None,
    method: Method | str = "auto",
    out_modes: Sequence[int] | None = None,
    in_modes: Sequence[int] | None = None,
    shape: Sequence[int] | None = None,
    batch_dims: int = 0,
    slab_bytes: int = 1 << 28,
) -> Approximation[Any]:
    r"""Decompose a dense tensor, or with modes a dense matrix.

    Computed in float64 or complex128, and stored in the dtype of ``x``. All cores but the last are
    left-orthogonal. Differentiable: the result carries the gradient of the cuts at the ranks that were found.

    Args:
        x: ``(n_1, .., n_d)``, or ``(M, N)`` where modes are given. What does not fit the memory may be a NumPy
            array (memory-mapped), a slice of a safetensors file (``safe_open(..).get_slice(name)``), or an iterable
            of slabs along the first mode with ``shape``.
        eps: Largest relative Frobenius error, a fraction in ``[0, 1)``. The default finds the numerical rank:
            1e-12 in float64, ``2 (d + 1)`` roundings in lower dtypes (about 1e-6 in float32).
        max_rank: Cap on the ranks, an int or a tuple (inner ranks, or with the boundary ones). It goes before
            ``eps``; the bound tells the error that is then promised.
        method: How bases of the unfoldings are found.

            - ``"svd"``: a singular value decomposition of each.
            - ``"qr"``: of the triangle of a blocked QR that forms no Q; as exact, and faster.
            - ``"gram"``: of the product with its own transpose, two passes over the data. It resolves errors down
              to 4e-7; below that ``"qr"`` takes over.
            - ``"randomized"``: a sketch shrinks the tensor first, and what it misses is measured, not estimated.
              Where no small sketch will do, each unfolding is sketched at the cap, or ``"qr"`` takes over.
            - ``"auto"``: a sketch if the tensor is large and its ranks turn out to be small; else ``"gram"`` or
              ``"qr"`` by ``eps``; ``"svd"`` for small tensors.
        out_modes, in_modes: Row and column modes, with products ``M`` and ``N``; the value is then
            a TTMatrix.
        shape: Shape of the whole where ``x`` is an iterable of slabs.
        batch_dims: 1 if the first axis of ``x`` counts trains: they get the same ranks, and ``eps`` holds for each.
        slab_bytes: How much of a stored array is read at a time.

    Returns:
        Approximation: ``value`` a TensorTrain or TTMatrix; ``rel_error_bound`` covers the cuts, the cast
        to the dtype of ``x`` and rounding. ``info``: ``method`` (the one that did it), ``eps``, ``bond_errors``
        (the relative cut at each bond) and, for a batch, ``rel_error_bounds``.

    Raises:
        NonFiniteError: ``x`` holds NaN or Inf.
        ShapeError: ``x`` has no mode, or modes do not fit its shape.
        RankError: ``eps`` or ``max_rank`` lies outside its range.
        DTypeError: ``x`` is neither floating nor complex.
        KindError: ``x`` is no tensor, or the method has no such name.
        ConvergenceError: No factorization of an unfolding converged.

    Cost: O(N n r) flops for N entries; ``"auto"`` reads a tensor of low rank about three times.
    Accuracy: ``||x - value|| <= rel_error_bound ||x|| <= eps ||x||`` without a cap, as long as ``eps`` is
    above what the dtype can hold; within ``sqrt(d - 1)`` of the best error at the ranks found.
    Source: Oseledets, SIAM J. Sci. Comput. 33(5), 2011, Algorithm 1; Roehrig-Zoellner et al., arXiv:2102.00104 (no Q);
    Huber, Schneider, Wolf, 2017 (sketches).

    Example:
        >>> i = torch.arange(1.0, 9.0, dtype=torch.float64)
        >>> tt_svd(i[:, None, None] + i[:, None] + i).value.ranks
        (1, 2, 2, 1)
    """
    _check_method(method)
    if is_stream(x):
        if out_modes is not None or in_modes is not None or batch_dims:
            raise KindError(
                "a stream is decomposed as a plain tensor: out_modes, in_modes or batch_dims were given, expected "
                "none. Load the tensor, or reshape the train."
            )
        return stream_tt_svd(x, shape, eps=eps, max_rank=max_rank, method=method, slab_bytes=slab_bytes, one=tt_svd)
    _check_tensor(x, batch_dims)
    x = x.resolve_conj().resolve_neg()
    tensor, modes = _as_train_shape(x, out_modes, in_modes, batch_dims)
    with torch.no_grad():
        found, done = _decomposed(tensor.detach(), eps, max_rank, method, batch_dims)
    train = found.value
    if torch.is_grad_enabled() and x.requires_grad:
        train = _differentiable(tensor, train, done, batch_dims)
    if modes is None:
        return Approximation(train, found.rel_error_bound, found.info)
    pairs = zip(train.cores, zip(*modes, strict=True), strict=True)
    matrix = TTMatrix(tuple(core.unflatten(-2, pair) for core, pair in pairs), train.center)
    return Approximation(matrix, found.rel_error_bound, found.info)


def _decomposed(
    x: Tensor, eps: float | None, max_rank: RankLike | None, method: str, batch_dims: int
) -> tuple[Approximation[TensorTrain], Finished | None]:
    shape = tuple(x.shape[batch_dims:])
    caps = max_ranks(shape) if max_rank is None else resolve_ranks(shape, max_rank)
    tolerance = checked_eps(eps, x.dtype, len(shape))
    problem = Unfolded.of(*_unit_scale(x, batch_dims), batch_dims)
    info = {"method": method, "eps": tolerance, "bond_errors": (0.0,) * (len(shape) - 1)}
    if x.numel() == 0 or not bool((problem.norm > 0).any()):
        cores = tuple(x.new_zeros((*x.shape[:batch_dims], 1, n, 1)) for n in shape)
        return Approximation(TensorTrain(cores), 0.0, info), None
    budget = Budget.of(tolerance, x.dtype, max_ranks(shape), caps)
    limits = caps if max_rank is not None else [_NO_CAP] * len(caps)
    done, used = _settled_sweep(problem, METHODS[method], x.dtype, budget, caps, limits)
    info = {"method": used, "eps": tolerance, "bond_errors": done.bond_errors}
    if batch_dims:
        info["rel_error_bounds"] = done.bounds
    return Approximation(TensorTrain(done.cores, done.center), done.bound, info), done


_NO_CAP = 1 << 62


def _settled_sweep(
    problem: Unfolded,
    sweep_by: SweepMethod,
    dtype: torch.dtype,
    budget: Budget,
    caps: Sequence[int],
    limits: Sequence[int],
) -> tuple[Finished, str]:
    def again(tolerance: float) -> Sweep:
        return sweep_by(problem, tolerance, caps)[0]

    sweep, used = sweep_by(problem, float(budget.cut), caps)
    return settled(sweep, again, dtype=dtype, budget=budget, caps=limits), used


def _differentiable(x: Tensor, train: TensorTrain, done: Finished | None, batch_dims: int) -> TensorTrain:
    """The same train, its cuts made once more along the bases that were found, by steps that have derivatives."""
    batch, modes, ranks = x.shape[:batch_dims], x.shape[batch_dims:], train.ranks
    rest, exponent = split_pow2(x.to(compute_dtype(x.dtype)), batch_dims)
    cores = []
    for k, (n, left, right) in enumerate(zip(modes[:-1], ranks[:-2], ranks[1:-1], strict=True)):
        unfolding = rest.reshape(*batch, left * n, -1)
        u, rest = cut(unfolding, right) if done is None else cut_along(unfolding, as_left(done.sweep.cores[k]))
        cores.append(u.unflatten(-2, (left, n)))
    cores.append(rest.reshape(*batch, ranks[-2], modes[-1], 1))
    if done is None:  # all is zero
        return TensorTrain(tuple(core.to(x.dtype) for core in cores), train.center)
    cores[-1] = times_pow2(cores[-1], exponent - done.sweep.exponent)
    return TensorTrain(with_derivatives(done, cores), train.center)


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
    if method not in list(_SPECTRA):
        raise KindError(
            f"a method must be known: method has {method!r}, expected one of {sorted(_SPECTRA)}. Use 'svd' if in doubt."
        )
    scaled, exponent = _unit_scale(x.detach().resolve_conj().resolve_neg(), 0)
    scaled = scaled.to(compute_dtype(x.dtype))
    values_of = _SPECTRA[method]
    spectra: list[Tensor] = []
    rows = 1
    for k, n in enumerate(x.shape[:-1]):
        if n == 1 and k > 0:  # the unfolding before, once more
            spectra.append(spectra[-1].clone())
            continue
        rows *= n
        unfolding = scaled.reshape(rows, scaled.numel() // rows if rows else 0)
        spectra.append(times_pow2(values_of(unfolding), exponent))
    return spectra


_SPECTRA = {"svd": singular_values, "gram": gram_singular_values}


def _check_method(name: str) -> None:
    if name not in list(METHODS):
        raise KindError(
            f"a method must be known: method has {name!r}, expected one of {sorted(METHODS)}. Use 'auto' if in doubt."
        )


def _check_tensor(x: Tensor, batch_dims: int = 0) -> None:
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
    if batch_dims not in (0, 1):
        raise ShapeError(
            f"a batch has one axis: batch_dims has {batch_dims}, expected 0 or 1. Flatten the others to one."
        )
    if x.ndim <= batch_dims:
        raise ShapeError(
            f"x must have a mode: x has shape {tuple(x.shape)}, expected one axis or more beside the batch. "
            "Use x.reshape(.., 1)."
        )


def _as_train_shape(
    x: Tensor, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None, batch_dims: int
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
    if x.ndim != 2 + batch_dims:
        raise ShapeError(f"modes are for a matrix: x has shape {tuple(x.shape)}, expected (M, N). Reshape it to 2-D.")
    for name, modes, size in (("out_modes", out, x.shape[-2]), ("in_modes", into, x.shape[-1])):
        if math.prod(modes) != size or min(modes) < 1:
            raise ShapeError(
                f"{name} must multiply to the size of its axis: {name} has {modes} with product "
                f"{math.prod(modes)}, "
                f"expected {size} (x has shape {tuple(x.shape)}). Choose factors of {size}."
            )
    return dense_to_paired(x, out, into), (out, into)


def _unit_scale(x: Tensor, n_batch: int) -> tuple[Tensor, Tensor]:
    """``x`` divided by a power of two, so that squares neither overflow nor vanish, and its exponent.

    Each member of a batch has its own. Lower dtypes stay as they are: they are widened block by block, or where they
    are small.
    """
    nothing = torch.zeros(x.shape[:n_batch], dtype=torch.int32, device=x.device)
    if x.numel() == 0:
        return x, nothing
    lowest, highest = _extremes(x, n_batch)  # NaN and Inf show up here
    sizes = torch.maximum(lowest.abs(), highest.abs()).double()
    smallest, largest = (float(v) for v in torch.aminmax(sizes.where(sizes != 0, 1.0)))
    if not math.isfinite(largest):
        n_bad = int((~torch.isfinite(x)).sum())
        raise NonFiniteError(
            f"a tensor must be finite to be decomposed: x has {n_bad} NaN or Inf among {x.numel()} entries, "
            f"expected "
            "none. Find where they come from, or replace them with torch.nan_to_num."
        )
    if smallest > 1e-100 and largest < 1e100:
        return x, nothing  # spares a copy
    return split_pow2(x.to(compute_dtype(x.dtype)), n_batch)


def _extremes(x: Tensor, n_batch: int) -> tuple[Tensor, Tensor]:
    flat = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return torch.aminmax(flat.reshape(*x.shape[:n_batch], -1), dim=-1) if n_batch else torch.aminmax(flat)
