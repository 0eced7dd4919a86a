"""Lower the ranks of a train with a promised error."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch

from tensortrain.cores.ranks import RankLike
from tensortrain.cores.rounding import METHODS, round_cores
from tensortrain.errors import KindError
from tensortrain.tensor.approximation import Approximation
from tensortrain.tensor.base import CoreChain, checked_chain

__all__ = ["round_and_store", "round_tt"]

AnyTrain = TypeVar("AnyTrain", bound=CoreChain)
RoundingMethod = Literal["svd", "gram", "randomized"]


def round_tt(
    x: AnyTrain,
    *,
    eps: float | None = None,
    max_rank: RankLike | None = None,
    method: RoundingMethod | str = "svd",
    max_params: int | None = None,
) -> Approximation[AnyTrain]:
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
    checked_chain("round_tt", x)
    if method not in METHODS:
        raise KindError(
            f"a method must be known: method has {method!r}, expected one of {sorted(METHODS)}. Use 'svd' if in doubt."
        )
    return x._approximated(
        round_cores(x._merged(), x.center, eps=eps, max_rank=max_rank, method=method, max_params=max_params)
    )


@torch.no_grad()
def round_and_store(
    x: AnyTrain, dtype: torch.dtype, *, eps: float, max_rank: RankLike | None = None
) -> Approximation[AnyTrain]:
    """``round_tt`` of a train in a wide dtype, stored in another one, all of it within ``eps``."""
    return x._approximated(round_cores(x._merged(), x.center, eps=eps, max_rank=max_rank, dtype=dtype))
