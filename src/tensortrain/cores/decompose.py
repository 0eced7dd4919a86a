"""From a dense tensor to cores with a promised error: TT-SVD, and the spectra that tell the error beforehand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from tensortrain.cores.linalg import cut, cut_along, gram_singular_values, singular_values
from tensortrain.cores.ranks import RankLike, max_ranks, resolve_ranks
from tensortrain.cores.scaling import split_pow2, times_pow2
from tensortrain.cores.tolerance import (
    ErrorBudget,
    Finished,
    Sweep,
    checked_eps,
    compute_dtype,
    settled,
    with_derivatives,
)
from tensortrain.cores.unfold import as_left
from tensortrain.cores.unfolding import METHODS, Unfolded
from tensortrain.cores.validation import DTYPES
from tensortrain.errors import DTypeError, KindError, NonFiniteError, ShapeError

__all__ = ["check_method", "check_tensor", "decompose", "unfolding_spectra"]


def decompose(
    x: Tensor, *, eps: float | None = None, max_rank: RankLike | None = None, method: str = "auto", n_batch: int = 0
) -> Finished:
    """Cores of a tensor in memory, with derivatives where it has them; see ``tt_svd``.

    Args:
        x: ``(n_1, .., n_d)`` behind ``n_batch`` axes.
        eps, max_rank, method: As for ``tt_svd``.
        n_batch: Number of batch axes, 0 or 1.
    """
    check_method(method)
    check_tensor(x, n_batch)
    x = x.resolve_conj().resolve_neg()
    with torch.no_grad():
        done = _decomposed(x.detach(), eps, max_rank, method, n_batch)
    if torch.is_grad_enabled() and x.requires_grad:
        return replace(done, cores=_cut_again(x, done, n_batch))
    return done


def _decomposed(x: Tensor, eps: float | None, max_rank: RankLike | None, method: str, n_batch: int) -> Finished:
    shape = tuple(x.shape[n_batch:])
    caps = max_ranks(shape) if max_rank is None else resolve_ranks(shape, max_rank)
    tolerance = checked_eps(eps, x.dtype, len(shape))
    problem = Unfolded.of(*_unit_scale(x, n_batch), n_batch)
    if x.numel() == 0 or not bool((problem.norm > 0).any()):
        return replace(Finished.zero(shape, x.shape[:n_batch], x, tolerance), method=method)
    budget = ErrorBudget.of(tolerance, x.dtype, max_ranks(shape), caps)
    sweep, used = METHODS[method](problem, float(budget.cut), caps)

    def again(closer: float) -> Sweep:
        return METHODS[method](problem, closer, caps)[0]

    limits = caps if max_rank is not None else [_NO_CAP] * len(caps)
    return replace(settled(sweep, again, dtype=x.dtype, budget=budget, caps=limits), method=used)


_NO_CAP = 1 << 62


def _cut_again(x: Tensor, done: Finished, n_batch: int) -> tuple[Tensor, ...]:
    """The same cores, their cuts made once more along the bases that were found, by steps that have derivatives."""
    batch, modes, ranks = x.shape[:n_batch], x.shape[n_batch:], done.ranks
    rest, exponent = split_pow2(x.to(compute_dtype(x.dtype)), n_batch)
    cores = []
    for k, (n, left, right) in enumerate(zip(modes[:-1], ranks[:-2], ranks[1:-1], strict=True)):
        unfolding = rest.reshape(*batch, left * n, -1)
        known = None if done.sweep is None else as_left(done.sweep.cores[k])
        u, rest = cut(unfolding, right) if known is None else cut_along(unfolding, known)
        cores.append(u.unflatten(-2, (left, n)))
    cores.append(rest.reshape(*batch, ranks[-2], modes[-1], 1))
    if done.sweep is None:  # all is zero
        return tuple(core.to(x.dtype) for core in cores)
    cores[-1] = times_pow2(cores[-1], exponent - done.sweep.exponent)
    return with_derivatives(done, cores)


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
    check_tensor(x)
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


def check_method(name: str) -> None:
    if name not in list(METHODS):
        raise KindError(
            f"a method must be known: method has {name!r}, expected one of {sorted(METHODS)}. Use 'auto' if in doubt."
        )


def check_tensor(x: Tensor, batch_dims: int = 0) -> None:
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
            f"a tensor must be finite to be decomposed: x has {n_bad} NaN or Inf among {x.numel()} entries, expected "
            "none. Find where they come from, or replace them with torch.nan_to_num."
        )
    if smallest > 1e-100 and largest < 1e100:
        return x, nothing  # spares a copy
    return split_pow2(x.to(compute_dtype(x.dtype)), n_batch)


def _extremes(x: Tensor, n_batch: int) -> tuple[Tensor, Tensor]:
    flat = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return torch.aminmax(flat.reshape(*x.shape[:n_batch], -1), dim=-1) if n_batch else torch.aminmax(flat)
