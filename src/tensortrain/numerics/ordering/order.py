"""One door to all ways of finding an order of the sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tensortrain.errors import KindError, NonFiniteError
from tensortrain.numerics.ordering.exact import exact_order
from tensortrain.numerics.ordering.fiedler import fiedler_order
from tensortrain.numerics.ordering.greedy import greedy_order
from tensortrain.numerics.ordering.information import mutual_information
from tensortrain.numerics.ordering.swap import improved_order, swapped_train
from tensortrain.tensor import TensorTrain

__all__ = ["order_sites"]

_METHODS: dict[str, Callable[[Tensor], list[int]]] = {
    "fiedler": fiedler_order,
    "greedy": greedy_order,
    "swap": improved_order,
    "exact": exact_order,
}


def order_sites(
    x: Tensor | TensorTrain,
    *,
    method: Literal["fiedler", "greedy", "swap", "exact"] | str = "fiedler",
    eps: float | None = None,
) -> tuple[int, ...]:
    """Find an order in which sites that know much of each other stand close together.

    Ranks of a train depend on the order of its modes alone: what is shared across a bond must pass through it.

    Args:
        x: Samples ``(n, d)`` of integers or floats; or a symmetric ``(d, d)`` float matrix, which is taken for mutual
            information or any other likeness, 0 or more; or a train.
        method: ``"fiedler"``: by the Fiedler vector of the mutual information. ``"greedy"``: a chain grown from the
            closest pair at both ends. ``"swap"``: of a train, neighbouring cores are exchanged while this saves
            parameters, and no mutual information is needed; of the rest, sites are exchanged and moved while the sum
            of ``I_ij |place_i - place_j|`` falls. ``"exact"``: the least such sum of all orders, up to 20 sites.
        eps: What a swap of two cores may cut, a share of the norm; exact to the dtype when left out.

    Returns:
        tuple: ``order[k]`` is the old site at place k; ``x.permute(order)`` of a train, ``x[:, order]`` of samples. Of
        an order and its reverse, the one that begins with the lower number.

    Raises:
        KindError: The method is not known.
        RankError: ``"exact"`` has too many sites, or ``eps`` lies outside [0, 1).
        DataError, ShapeError: As for ``mutual_information``.
        NonFiniteError: A matrix has negative, NaN or infinite numbers beside its diagonal.

    Cost: O(d^3) flops, "exact" O(2^d d); "swap" of a train O(d^2 n^3 r^3) for each time through its sites.

    Source: Barcza, Legeza et al., arXiv:1008.4607 (Fiedler vector); Rudell, ICCAD 1993 (sites moved one by one).

    Example:
        >>> likeness = torch.tensor([[0.0, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 0]])
        >>> order_sites(likeness)
        (0, 2, 1, 3)
    """
    if method not in _METHODS:
        known = ", ".join(map(repr, _METHODS))
        raise KindError(f"a method must be known: method has {method!r}, expected one of {known}. Take 'fiedler'.")
    with torch.no_grad():
        if isinstance(x, TensorTrain) and method == "swap":
            found = swapped_train(x, eps)
        else:
            found = _METHODS[method](_likeness(x))
    return tuple(found if found[0] <= found[-1] else found[::-1])


def _likeness(x: Tensor | TensorTrain) -> Tensor:
    """``(d, d)`` float64 on the CPU, with a diagonal of zeros."""
    is_matrix = isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 2 and x.shape[0] == x.shape[1]
    if isinstance(x, Tensor) and is_matrix and torch.allclose(x, x.T, equal_nan=True):
        found = ((x + x.T) / 2).double().cpu().fill_diagonal_(0.0)
        if not bool((torch.isfinite(found) & (found >= 0)).all()):
            raise NonFiniteError(
                "mutual information must be finite and not negative: the matrix has other numbers beside its diagonal. "
                "Pass x.abs() of correlations, for instance."
            )
        return found
    return mutual_information(x).cpu().fill_diagonal_(0.0)
